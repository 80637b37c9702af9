"""`mlm tokenizer train` and `mlm tokenizer show`."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_cli import log
from mlm_cli.data.chunks import Chunker
from mlm_cli.data.parse import parse_segment
from mlm_cli.data.segment import drop_spool
from mlm_cli.data.sources import Source, bytes_of, find_sources
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.data.tokenizer_backends import choose_encoder, disagreement
from mlm_cli.data.tokenizer_train import train_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs.progress import ByteProgress

_WRITTEN = ("tokenizer.json", "tokenizer_config.json")  # all that Tokenizer.save writes
_PIECE = 1 << 16  # characters handed to the trainer at a time: it splits a text in one go, at many times its size


@dataclass(frozen=True)
class TrainRequest:
    """What `mlm tokenizer train` was asked for."""

    inputs: tuple[str, ...]
    output: str
    kind: str
    vocab_size: int
    json_key: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    txt_documents: str = "file"
    on_bad_line: str = "stop"
    max_line_mb: float = 32.0
    lowercase: bool = False
    min_frequency: int = 2
    max_train_mb: float | None = None
    overwrite: bool = False
    special_tokens: str | None = None
    byte_fallback: bool = False


def train(request: TrainRequest) -> dict[str, Any]:
    """Train a tokenizer and write its folder in one step. Returns a summary.

    Raises:
        UsageError: the output exists, or a vocabulary too small. DataError: bad input, naming file and line.
    """
    target = Path(request.output)
    _check_target(target, overwrite=request.overwrite)
    sources = find_sources(request.inputs, request.input_format)
    total = sum(source.size for source in sources)
    begun = time.monotonic()
    building = _scratch(target.absolute())
    try:
        counts: dict[str, int] = {}
        with ByteProgress("reading", total) as show:

            def read() -> Iterator[str] | None:
                if counts and any(source.is_stream for source in sources):
                    return None
                counts.update(read=0, skipped=0, bytes=0)
                return _texts(request, sources, building / "spool", show, counts)

            tokenizer = train_tokenizer(
                read,
                kind=request.kind,
                vocab_size=request.vocab_size,
                lowercase=request.lowercase,
                min_frequency=request.min_frequency,
                special_tokens=request.special_tokens,
                byte_fallback=request.byte_fallback,
            )
        shutil.rmtree(building / "spool", ignore_errors=True)
        tokenizer.save(building)
        building.chmod(0o755)
        if target.exists():
            for name in _WRITTEN:
                (target / name).unlink(missing_ok=True)
        building.replace(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if tokenizer.vocab_size < request.vocab_size:
        log.warn(f"the text gave only {tokenizer.vocab_size:,} of {request.vocab_size:,} tokens")
    report = describe(load_tokenizer(str(target)))
    return report | {"documents": counts["read"], "skipped": counts["skipped"], "seconds": time.monotonic() - begun}


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that is there: --overwrite means another tokenizer, never a folder with anything else in it."""
    if not target.exists() and not target.is_symlink():
        return
    inside = {entry.name for entry in target.iterdir()} if target.is_dir() else None
    if inside is None or inside - set(_WRITTEN):
        raise UsageError(
            f"`{target}` exists already, and is more than a trained tokenizer", hint="choose another --output"
        )
    if inside and not overwrite:
        raise UsageError(f"`{target}` exists already", hint="give --overwrite, or another --output")


def _scratch(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"`{target}` cannot be made: {error.strerror}", hint="choose another --output") from error


def _texts(
    request: TrainRequest, sources: list[Source], spool: Path, show: ByteProgress, counts: dict[str, int]
) -> Iterator[str]:
    """Texts of the inputs in pieces of bounded size, cut at line ends or spaces."""
    spool.mkdir(exist_ok=True)
    limit = bytes_of("--max-line-mb", request.max_line_mb)
    enough = None if request.max_train_mb is None else bytes_of("--max-train-mb", request.max_train_mb)
    chunker = Chunker(request.json_key, request.txt_documents, spool, max_line=limit)
    before = 0
    for number, source in enumerate(sources):
        line = 0
        for segment in chunker.segments(number, source):
            parsed = parse_segment(segment, request.json_key, limit)
            if parsed.bad and request.on_bad_line == "stop":
                at, reason = parsed.bad[0]
                where = f"{source.path}:{line + at}" if at else source.path
                raise DataError(f"{where}: {reason}", hint="mend it, or give --on-bad-line skip")
            drop_spool(segment)
            line += parsed.lines
            counts["read"] += parsed.read
            counts["skipped"] += len(parsed.bad)
            for documents in parsed.documents.values():
                for document in documents:
                    for text in [document] if isinstance(document, str) else document:
                        yield from _pieces(text)
                        counts["bytes"] += len(text)
            show.update(before + segment.consumed)
            if enough is not None and counts["bytes"] >= enough:
                return
        before += source.size


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        cut = max(text.rfind("\n", start, start + _PIECE), text.rfind(" ", start, start + _PIECE))
        cut = cut if cut > start else start + _PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `mlm tokenizer show` says."""
    choice = choose_encoder(tokenizer)
    difference = None if choice.proven else disagreement(choice.encoder, tokenizer)
    backend, reason = choice.encoder.name, choice.reason
    if difference is not None:
        backend, reason = "tokenizers", f"{backend} differs from tokenizers on the check sample ({difference})"
    sample = "The quick brown fox, naïve café: 12345 + 0.5 = 日本語 🙂"
    ids = tokenizer.encode(sample)
    names = {number: token for token, number in tokenizer.token_ids.items()}
    return {
        "tokenizer": tokenizer.spec,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "eod": None if tokenizer.eod_token is None else {"token": tokenizer.eod_token, "id": tokenizer.eod_id},
        "special": {
            role: {"token": token, "id": tokenizer.token_ids[token]} for role, token in tokenizer.special.items()
        },
        "sentinels": len(tokenizer.sentinel_ids),
        "backend": backend,
        "backend_reason": reason,
        "sample": {
            "text": sample,
            "ids": ids,
            "tokens": [names[number] for number in ids],
            "back": tokenizer.decode(ids),
        },
    }


def show(spec: str) -> dict[str, Any]:
    """Describe the tokenizer that ``spec`` names."""
    return describe(load_tokenizer(spec))


def description_text(report: dict[str, Any]) -> str:
    """The description for people."""
    end, sample = report["eod"], report["sample"]
    lines = [
        f"{report['tokenizer']}: {report['kind']}, {report['vocab_size']:,} tokens, "
        f"fingerprint {report['fingerprint'][:16]}",
        f"end of document: {end['token']} (id {end['id']})" if end else "end of document: none",
        *(
            f"{role.removesuffix('_token')}: {entry['token']} (id {entry['id']})"
            for role, entry in report["special"].items()
        ),
        *([f"sentinels: {report['sentinels']} (<extra_id_0> ...)"] if report["sentinels"] else []),
        f"backend: {report['backend']} ({report['backend_reason']})",
        f"sample: {sample['text']}",
        f"  {len(sample['ids'])} tokens: {' '.join(sample['tokens'])}",
        f"  back: {sample['back']}",
    ]
    if "seconds" in report:
        skipped = f", {report['skipped']:,} skipped" if report["skipped"] else ""
        lines.append(f"trained on {report['documents']:,} documents{skipped} in {report['seconds']:.1f} s")
    return "\n".join(lines)
