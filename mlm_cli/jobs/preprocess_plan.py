"""What `mlm preprocess` was asked for, and what that means: looked up before anything is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_cli import log
from mlm_cli.config.clean_section import CleanSection
from mlm_cli.data.encode import EncodeSettings
from mlm_cli.data.indexed import optimal_dtype
from mlm_cli.data.sidecar import read_sidecar
from mlm_cli.data.sources import Source, bytes_of, find_sources
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs.preprocess_clean import prepare_cleaning


@dataclass(frozen=True)
class PreprocessRequest:
    """What `mlm preprocess` was asked for; see its `--help`."""

    inputs: tuple[str, ...]
    tokenizer: str
    output: str
    json_key: tuple[str, ...] = ("text",)
    input_format: str = "auto"
    txt_documents: str = "file"
    append_eod: bool = True
    split_sentences: bool = False
    on_bad_line: str = "stop"
    max_line_mb: float = 32.0
    workers: int | None = None
    backend: str = "auto"
    overwrite: bool = False
    journal_seconds: float = 5.0
    clean: CleanSection = field(default_factory=CleanSection)


@dataclass
class Plan:
    """A request with everything looked up: what will be read and what will be written."""

    request: PreprocessRequest
    sources: list[Source]
    tokenizer: Tokenizer
    encode: EncodeSettings
    names: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.request.workers or cores or 1

    @property
    def resumable(self) -> bool:
        """False where the input cannot be read a second time."""
        return not any(source.is_stream for source in self.sources)

    @property
    def total_bytes(self) -> int:
        return sum(source.size for source in self.sources)


def plan(request: PreprocessRequest) -> Plan:
    """Look everything up that can be wrong before anything is written.

    Raises:
        DataError: a missing input, a tokenizer that does not load or cannot end documents.
        UsageError: options that do not go together.
    """
    if len(set(request.json_key)) < len(request.json_key):
        raise UsageError("a --json-key is given twice")
    max_line = bytes_of("--max-line-mb", request.max_line_mb)
    sources = find_sources(request.inputs, request.input_format)
    text = [source.path for source in sources if source.format == "txt"]
    if text and request.json_key != ("text",):
        raise UsageError(f"--json-key says nothing about `{text[0]}`, which is plain text", hint="leave it out")
    tokenizer = load_tokenizer(request.tokenizer)
    if request.append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"tokenizer `{request.tokenizer}` has no end-of-document token to append",
            hint="give --no-append-eod, or a tokenizer with `<|endoftext|>` or an `eos_token`",
        )
    cleaning = prepare_cleaning(request.clean, request.json_key)
    encode = EncodeSettings(
        keys=request.json_key,
        dtype=optimal_dtype(tokenizer.vocab_size).__name__,
        eod=tokenizer.eod_id if request.append_eod else None,
        split_sentences=request.split_sentences,
        max_line=max_line,
        cleaner=cleaning.cleaner if cleaning is not None else None,
    )
    level = "sentence" if request.split_sentences else "document"
    settings = {
        "tokenizer": tokenizer.fingerprint,
        "json_key": list(request.json_key),
        "append_eod": request.append_eod,
        "split_sentences": request.split_sentences,
        "txt_documents": request.txt_documents,
        "max_line": encode.max_line,
        "sources": [[absolute(s.path), s.format, s.packed, s.size, s.modified] for s in sources],
    }
    if cleaning is not None:
        settings["clean"] = cleaning.settings
    return Plan(request, sources, tokenizer, encode, {key: f"{key}_{level}" for key in request.json_key}, settings)


def absolute(path: str) -> str:
    return path if path == "-" or path.startswith("hf://") else str(Path(path).absolute())


def existing(work: Plan) -> dict[str, Any] | None:
    """The summary of a finished data set under this name, if it is just what was asked for."""
    prefix = work.request.output
    there = [f"{prefix}_{name}.idx" for name in work.names.values() if Path(f"{prefix}_{name}.idx").exists()]
    if not there:
        return None
    sidecar = read_sidecar(f"{prefix}.json") if Path(f"{prefix}.json").exists() else None
    asked = json.loads(json.dumps(work.settings))
    same = sidecar is not None and sidecar.settings == asked and len(there) == len(work.names)
    if not same or not work.resumable:
        raise UsageError(
            f"`{there[0]}` exists already, made from other input or with other settings",
            hint="give --overwrite to replace it, or another --output",
        )
    assert sidecar is not None
    log.info(f"`{prefix}` is there already, made from the same input with the same settings: nothing to do")
    skipped = sidecar.bad_lines.get("count", 0)
    removed = sum(entry["removed"] for entry in sidecar.filters)
    cleaned = {"removed": removed, "filters": sidecar.filters} if work.request.clean.active else {}
    return {
        "prefix": prefix,
        "outputs": sidecar.outputs,
        "documents": sidecar.documents,
        "read": sidecar.documents + skipped + removed,
        "skipped": skipped,
        "empty_documents": sum(source["empty_documents"] for source in sidecar.sources),
        "bytes": work.total_bytes,
        "already_there": True,
    } | cleaned
