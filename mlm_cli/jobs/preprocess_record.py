"""What a preprocessing run writes down: documents and where they came from, bad lines, the sidecar, the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlm_cli import __version__
from mlm_cli.config.clean_section import CleanSection
from mlm_cli.data.encode import SegmentResult
from mlm_cli.data.partial import PartialRun, fresh_counts, origins_of
from mlm_cli.data.segment import Segment
from mlm_cli.data.sidecar import Sidecar
from mlm_cli.data.tokenizer_backends import Choice
from mlm_cli.errors import DataError, MlmError
from mlm_cli.jobs.preprocess_clean import Duplicates, filter_report, filter_text, removal_lines, shown
from mlm_cli.jobs.preprocess_plan import Plan, absolute

_BAD_SHOWN = 20


def commit(
    segment: Segment, result: SegmentResult, work: Plan, partial: PartialRun, duplicates: Duplicates | None = None
) -> None:
    """Append one segment's documents, origins, bad lines and what was removed."""
    source, at = work.sources[segment.source], partial.position
    name = shown(source)
    if result.bad and work.request.on_bad_line == "stop":
        number, reason = result.bad[0]
        where = f"{name}:{at.line + number}" if number else name
        hint = "mend it, or give --on-bad-line skip to leave such lines out (they are counted and listed)"
        if segment.mode == "long":
            lines = ", give --txt-documents line" if source.format == "txt" else ""
            hint = f"raise --max-line-mb{lines}, or give --on-bad-line skip to leave it out (counted and listed)"
        raise DataError(f"{where}: {reason}", hint=hint)
    removed = _clean(segment, result, work, partial, duplicates)
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
    at.here["removed"] = at.here.get("removed", 0) + removed
    for count, number in counts.items():
        setattr(at, count, getattr(at, count) + number)
        at.here[count] += number
    if "characters" in at.here:  # not where an unfinished run of an older version is continued inside an input
        at.here["characters"] += sum(int(encoded.characters.sum()) for encoded in result.encoded.values())
        at.here["text_tokens"] += sum(encoded.text_tokens for encoded in result.encoded.values())
    at.line, at.resume = at.line + result.lines, segment.resume
    if segment.last:
        entry = {"path": absolute(source.path), "bytes": segment.consumed, "sha256": segment.sha256}
        entry |= {"lines": at.line, "documents": at.here["documents"], "skipped": at.here["skipped"]}
        entry |= {"empty_documents": at.here["empty"]}
        entry |= {"removed": at.here["removed"]} if result.cleaning is not None else {}
        entry |= {name: at.here[name] for name in ("characters", "text_tokens") if name in at.here}
        partial.sources.append(json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n")
        at.source, at.resume, at.line, at.here = at.source + 1, 0, 0, fresh_counts()


def _clean(
    segment: Segment, result: SegmentResult, work: Plan, partial: PartialRun, duplicates: Duplicates | None
) -> int:
    """Take duplicates out of ``result``, and write down all that was removed; returns how much."""
    cleaning, at = result.cleaning, partial.position
    if cleaning is None:
        return 0
    removed, redacted = cleaning.removed, cleaning.redacted
    if duplicates is not None:
        keep, again = duplicates.remove(cleaning, result.numbers, segment.source)
        removed = sorted(removed + again, key=lambda entry: entry[0])
        if again:
            eod = work.encode.eod is not None
            result.encoded = {key: encoded.keep(keep, eod=eod) for key, encoded in result.encoded.items()}
            result.numbers = result.numbers[keep]
            redacted = [counts for counts, stays in zip(redacted, keep, strict=False) if stays]
    partial.removed.append(removal_lines(shown(work.sources[segment.source]), at.line, removed))
    for _, removal in removed:
        at.removed[removal.name] = at.removed.get(removal.name, 0) + 1
    for counts in redacted:
        at.changed += bool(counts)
        for kind, count in counts.items():
            at.redacted[kind] = at.redacted.get(kind, 0) + count
    return len(removed)


def nothing_good(partial: PartialRun, section: CleanSection) -> DataError:
    """The error for an input without one good document. Its list of bad lines goes with the run: the first is named."""
    if partial.position.removed:
        return _all_removed(partial, section)
    if not partial.position.skipped:
        return DataError("no document in the input: every line is blank")
    first = json.loads(_first_bad(partial)[0])
    return DataError(
        f"no document in the input: all {partial.position.skipped:,} were bad, "
        f"the first at {first['file']}:{first['line']}: {first['reason']}",
        hint="without --on-bad-line skip the run stops at the first bad line",
    )


def _all_removed(partial: PartialRun, section: CleanSection) -> DataError:
    at = partial.position
    with partial.removed.path.open("rb") as stream:
        first = json.loads(stream.readline())
    where = f"{first.pop('file')}:{first.pop('line')}"
    told = ", ".join(str(value) for value in first.values())
    filters = "; ".join(filter_text(entry) for entry in filter_report(section, partial) if entry["removed"])
    skipped = f" ({at.skipped:,} more were bad)" if at.skipped else ""
    return DataError(
        f"no document is left of {sum(at.removed.values()):,}{skipped}: {filters}. The first is {where}: {told}",
        hint="loosen that filter, a key of `preprocess.clean` (docs/cleaning.md)",
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
    removed = sum(at.removed.values())
    if at.documents + at.skipped + removed != at.read:
        raise MlmError(
            f"{at.documents} documents written + {at.skipped} skipped + {removed} removed are not the {at.read} read"
        )
    section = work.request.clean
    cleaned = {"removed": removed, "filters": filter_report(section, partial)} if section.active else {}
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
    } | cleaned


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
        filters=filter_report(work.request.clean, partial),
        bad_lines=bad,
        made_by={"mlm": __version__, "backend": choice.encoder.name, "reason": choice.reason},
        settings=work.settings,
    )
