"""What a preprocessing run writes down: documents and where they came from, bad lines, the sidecar, the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlm_cli import __version__
from mlm_cli.data.encode import SegmentResult
from mlm_cli.data.partial import PartialRun, fresh_counts, origins_of
from mlm_cli.data.segment import Segment
from mlm_cli.data.sidecar import Sidecar
from mlm_cli.data.tokenizer_backends import Choice
from mlm_cli.errors import DataError, MlmError
from mlm_cli.jobs.preprocess_plan import Plan, absolute

_BAD_SHOWN = 20


def commit(segment: Segment, result: SegmentResult, work: Plan, partial: PartialRun) -> None:
    """Append one segment's documents, origins and bad lines."""
    source, at = work.sources[segment.source], partial.position
    name = "standard input" if source.path == "-" else source.path
    if result.bad and work.request.on_bad_line == "stop":
        number, reason = result.bad[0]
        where = f"{name}:{at.line + number}" if number else name
        hint = "mend it, or give --on-bad-line skip to leave such lines out (they are counted and listed)"
        if segment.mode == "long":
            lines = ", give --txt-documents line" if source.format == "txt" else ""
            hint = f"raise --max-line-mb{lines}, or give --on-bad-line skip to leave it out (counted and listed)"
        raise DataError(f"{where}: {reason}", hint=hint)
    for key, encoded in result.encoded.items():
        partial.parts[key].append(encoded.tokens, encoded.lengths, encoded.sequences)
        at.max_token[key] = max(at.max_token.get(key, -1), encoded.max_token)
    documents, empty = len(result.numbers), 0
    if documents:
        partial.origins.append(origins_of(result.numbers, segment.source, at.line))
        empty = int(min((encoded.sequences == 0).sum() for encoded in result.encoded.values()))
    for line, reason in result.bad:
        entry = {"file": name, "line": at.line + line, "reason": reason}
        partial.bad.append(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n")
    counts = {"documents": documents, "read": result.read, "skipped": len(result.bad), "empty": empty}
    for count, number in counts.items():
        setattr(at, count, getattr(at, count) + number)
        at.here[count] += number
    if "characters" in at.here:  # not where an unfinished run of an older version is continued inside an input
        at.here["characters"] += sum(encoded.characters for encoded in result.encoded.values())
        at.here["text_tokens"] += sum(encoded.text_tokens for encoded in result.encoded.values())
    at.line, at.resume = at.line + result.lines, segment.resume
    if segment.last:
        entry = {"path": absolute(source.path), "bytes": segment.consumed, "sha256": segment.sha256}
        entry |= {"lines": at.line, "documents": at.here["documents"], "skipped": at.here["skipped"]}
        entry |= {"empty_documents": at.here["empty"]}
        entry |= {name: at.here[name] for name in ("characters", "text_tokens") if name in at.here}
        partial.sources.append(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n")
        at.source, at.resume, at.line, at.here = at.source + 1, 0, 0, fresh_counts()


def nothing_good(partial: PartialRun) -> DataError:
    """The error for an input without one good document. Its list of bad lines goes with the run: the first is named."""
    if not partial.position.skipped:
        return DataError("no document in the input: every line is blank")
    first = json.loads(_first_bad(partial)[0])
    return DataError(
        f"no document in the input: all {partial.position.skipped:,} were bad, "
        f"the first at {first['file']}:{first['line']}: {first['reason']}",
        hint="without --on-bad-line skip the run stops at the first bad line",
    )


def _first_bad(partial: PartialRun) -> list[bytes]:
    with partial.bad.path.open("rb") as stream:
        return [line for line, _ in zip(stream, range(_BAD_SHOWN), strict=False)]


def _outputs(work: Plan, partial: PartialRun) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "prefix": f"{Path(work.request.output).name}_{name}",
            "dtype": work.encode.dtype,
            "documents": partial.parts[key].num_documents,
            "sequences": partial.parts[key].num_sequences,
            "tokens": partial.parts[key].sizes[0] // partial.parts[key].dtype.itemsize,
            "max_token_id": partial.position.max_token.get(key, -1),
        }
        for key, name in work.names.items()
    ]


def summary(work: Plan, partial: PartialRun, choice: Choice) -> dict[str, Any]:
    at = partial.position
    if at.documents + at.skipped != at.read:
        raise MlmError(f"{at.documents} documents written + {at.skipped} skipped are not the {at.read} read")
    return {
        "prefix": work.request.output,
        "outputs": _outputs(work, partial),
        "documents": at.documents,
        "read": at.read,
        "skipped": at.skipped,
        "empty_documents": at.empty,
        "bytes": at.consumed,
        "backend": choice.encoder.name,
        "backend_reason": choice.reason,
        "workers": work.workers,
        "continued": partial.continued,
        "already_there": False,
    }


def sidecar(work: Plan, partial: PartialRun, choice: Choice) -> Sidecar:
    at, base = partial.position, Path(work.request.output).name
    bad = {"count": at.skipped, "first": [json.loads(line) for line in _first_bad(partial)]}
    if at.skipped:
        bad["file"] = f"{base}.bad.jsonl"
    spec = work.request.tokenizer
    return Sidecar(
        tokenizer_fingerprint=work.tokenizer.fingerprint,
        tokenizer_spec=str(Path(spec).absolute()) if Path(spec).exists() else spec,
        vocab_size=work.tokenizer.vocab_size,
        eod_id=work.tokenizer.eod_id,
        append_eod=work.request.append_eod,
        documents=at.documents,
        outputs=_outputs(work, partial),
        sources=[json.loads(line) for line in partial.sources.path.read_bytes().splitlines()],
        origins=f"{base}.origins.npy",
        bad_lines=bad,
        made_by={"mlm": __version__, "backend": choice.encoder.name, "reason": choice.reason},
        settings=work.settings,
    )
