"""`mlm preprocess`: text -> Megatron `.bin/.idx`, in one pass, in order, in flat memory; a kill loses next to nothing.

This process reads, hashes and cuts the input, and writes what the workers (``data/workers.py``) encode.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlm_cli import log
from mlm_cli.data.chunks import Chunker
from mlm_cli.data.encode import EncodeSettings
from mlm_cli.data.parse import parse_segment
from mlm_cli.data.partial import PartialRun, finish_publishing
from mlm_cli.data.segment import Segment, drop_spool
from mlm_cli.data.sources import Source
from mlm_cli.data.tokenizer_backends import Choice, ReferenceEncoder, choose_encoder
from mlm_cli.data.workers import BackendDisagreesError, EncoderPool, Task
from mlm_cli.errors import DataError, ResourceError
from mlm_cli.jobs.preprocess_clean import Duplicates, filter_report, filter_text
from mlm_cli.jobs.preprocess_plan import Plan, PreprocessRequest, existing, plan
from mlm_cli.jobs.preprocess_record import commit, nothing_good, sidecar, summary
from mlm_cli.jobs.progress import ByteProgress

_SAMPLE_CHARACTERS = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(request: PreprocessRequest) -> dict[str, Any]:
    """Do it. Returns a summary; a set that is there already, made from the same, is left as it is.

    Raises:
        DataError: bad input (naming file and line). RankLostError: a worker died. ResourceError: disk or memory full.
        UsageError: the output exists or is in use.
    """
    begun = time.monotonic()
    work = plan(request)
    prefix = request.output
    done_before = finish_publishing(prefix)
    if (done_before or not request.overwrite) and (found := existing(work)) is not None:
        return found
    fresh = request.overwrite or not work.resumable
    partial = PartialRun(prefix, work.names, work.encode.dtype, work.settings, fresh=fresh)
    if partial.restarted_because:
        log.warn(f"`{partial.folder}` is started again: {partial.restarted_because}")
    if partial.continued:
        log.info(f"continuing `{partial.folder}` after {partial.position.documents:,} documents")
    before = partial.position.consumed
    try:
        choice = _encode_all(work, partial)
        if partial.position.documents == 0:
            raise nothing_good(partial, request.clean)
        report = summary(work, partial, choice)
        partial.publish(sidecar(work, partial, choice).text())
    except BaseException as error:
        _leave(partial, begun, work)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise ResourceError(
                f"the disk is full: writing in `{partial.folder}` failed",
                hint="free some space and give the same command again: it goes on where it stopped",
            ) from error
        raise
    seconds = time.monotonic() - begun
    report |= {"seconds": round(seconds, 3), "mb_per_s": round((report["bytes"] - before) / 1e6 / seconds, 2)}
    return report


def _leave(partial: PartialRun, begun: float, work: Plan) -> None:
    """Keep what is worth continuing: what the journal has, and more if it took long to make."""
    if work.resumable and partial.marked_documents and time.monotonic() - begun >= work.request.journal_seconds:
        with contextlib.suppress(OSError):  # the disk is full: the journal's last line still holds
            partial.checkpoint()
    partial.stop(keep=work.resumable)


def _encode_all(work: Plan, partial: PartialRun) -> Choice:
    """Encode everything from the partial run's position on; start again if the fast backend turns out to differ."""
    choice = choose_encoder(work.tokenizer, work.request.backend)
    try:
        _encode_with(choice, work, partial)
        return choice
    except BackendDisagreesError as difference:
        reason = f"{choice.encoder.name} differs from tokenizers on the check sample ({difference})"
        if work.request.backend != "auto":
            raise DataError(f"backend `{work.request.backend}` cannot be used: {reason}") from difference
        log.warn(f"{reason}: using tokenizers")
    partial.start_again()
    choice = Choice(ReferenceEncoder(work.tokenizer), reason, True)
    _encode_with(choice, work, partial)
    return choice


def _encode_with(choice: Choice, work: Plan, partial: PartialRun) -> None:
    request, workers = work.request, work.workers
    log.info(_opening(work, choice, workers))
    chunk = max(1 << 17, min(2 << 20, work.total_bytes // (8 * workers) or 2 << 20))
    chunker = Chunker(
        request.json_key, request.txt_documents, partial.spool, chunk_bytes=chunk, max_line=work.encode.max_line
    )
    tasks = _tasks(_segments(chunker, work.sources, partial), chunk)
    sample: list[str] = []
    if not choice.proven and (first := next(tasks, None)) is not None:
        sample = _sample(first, work.encode)
        tasks = itertools.chain([first], tasks)
    sizes = [0, *itertools.accumulate(source.size for source in work.sources)]
    journaled = time.monotonic()
    show = ByteProgress("preprocess", work.total_bytes, partial.position.consumed)
    deduplicate = request.clean.deduplicate != "none"
    duplicates = Duplicates(request.clean, partial, work.sources) if deduplicate else None
    closing = contextlib.closing(duplicates) if duplicates is not None else contextlib.nullcontext()
    with closing, EncoderPool(work.tokenizer, choice, work.encode, workers) as pool, show:
        for task, results in pool.run(tasks, sample):
            for segment, result in zip(task, results, strict=True):
                commit(segment, result, work, partial, duplicates)
                partial.position.consumed = sizes[segment.source] + segment.consumed
                drop_spool(segment)
            partial.mark()
            show.update(partial.position.consumed)
            if work.resumable and pool.proven and time.monotonic() - journaled >= request.journal_seconds:
                partial.checkpoint()
                journaled = time.monotonic()


def _opening(work: Plan, choice: Choice, workers: int) -> str:
    number = len(work.sources)
    text = f"{number:,} input{'s' * (number != 1)}, {work.total_bytes / 1e6:,.1f} MB"
    if any(source.format == "txt" for source in work.sources):
        other = "line" if work.request.txt_documents == "file" else "file"
        text += f"; .txt: one document a {work.request.txt_documents} (--txt-documents {other} for one a {other})"
    name = f"{work.tokenizer.name} ({work.tokenizer.kind}, {work.tokenizer.vocab_size:,} tokens)"
    text += f"\ntokenizer {name}, backend {choice.encoder.name}: {choice.reason}"
    text += f"; {workers} worker{'s' * (workers != 1)}"
    return "\n".join([text, *(f"filter {filter_text(entry)}" for entry in filter_report(work.request.clean))])


def _segments(chunker: Chunker, sources: list[Source], partial: PartialRun) -> Iterator[Segment]:
    start = partial.position
    for number in range(start.source, len(sources)):
        yield from chunker.segments(number, sources[number], start.resume if number == start.source else 0)


def _tasks(segments: Iterator[Segment], chunk: int) -> Iterator[Task]:
    """Small segments go together; never many, because a task must fit into a pipe that nobody reads yet."""
    task: Task = []
    size = 0
    for segment in segments:
        task.append(segment)
        size += segment.stop - segment.start + (chunk // 32)
        if size >= chunk or segment.mode in ("long", "empty"):
            yield task
            task, size = [], 0
    if task:
        yield task


def _sample(task: Task, settings: EncodeSettings) -> list[str]:
    """The first texts of a task, up to some 64 thousand characters."""
    segment = replace(task[0], stop=min(task[0].stop, task[0].start + (1 << 18)))
    if task[0].mode in ("whole", "arrow", "long"):
        segment = task[0]
    texts: list[str] = []
    room = _SAMPLE_CHARACTERS
    for documents in parse_segment(segment, settings.keys, settings.max_line).documents.values():
        for document in documents:
            for text in [document] if isinstance(document, str) else document:
                if room > 0:
                    texts.append(text[:room])
                    room -= len(text)
    return texts
