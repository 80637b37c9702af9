"""A knowledge base: the passages of some documents and what finds them, made anew or kept in a folder.

The folder holds ``mlm-retrieval.json`` (what the index was made of and how), the passages as arrays, and the
retriever's own files. All are numbers, text or JSON: opening an index runs nothing of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mlm_cli import log
from mlm_cli.checkpoint.manifest import check_weights
from mlm_cli.checkpoint.resolve import resolve_best
from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.data.sources import Source, find_sources
from mlm_cli.errors import DataError, MlmError, ResourceError, UsageError
from mlm_cli.generation.bm25 import BM25
from mlm_cli.generation.dense import Dense, Embedder
from mlm_cli.generation.passages import Passage, Passages, Retrieved, read_documents

_FORMAT = 1
_HEAD, _FINDER = "mlm-retrieval.json", "retriever"
_KNOWN = {_HEAD, _FINDER, *(f"{name}.npy" for name in Passages.ARRAYS)}
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, ImportError)
# What the reader of `mlm preprocess` advises, in the words of a recipe.
_ADVICE = {
    "; otherwise say which with --input-format": "",
    "; a Hub data set is written hf://owner/name": "",
    "give --json-key": "set `retrieval.json_key`",
}
# Settings that an index depends on; the others are read anew by each command.
_INDEXED = ("json_key", "retriever", "passage_words", "passage_overlap", "k1", "b")


class Retriever(Protocol):
    """Finds passages by their numbers."""

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """At most ``k`` numbers of passages with their scores, best first."""

    def can_ask(self, query: str) -> bool:
        """Is there anything in the query to look up?"""

    def save(self, folder: Path) -> None:
        """Write it into a new folder."""


class KnowledgeBase:
    """Passages, and the retriever that finds them."""

    def __init__(self, passages: Passages, retriever: Retriever) -> None:
        self.passages, self._retriever = passages, retriever

    def check(self, query: str, where: str) -> None:
        """Raises DataError: there is nothing in the query to look up; ``where`` says whose it is."""
        if not self._retriever.can_ask(query):
            raise DataError(
                f"{where}: an empty prompt, and nothing to look up in the knowledge base", hint="give at least one word"
            )

    def search(self, query: str, k: int, where: str) -> Retrieved:
        """The best ``k`` passages for ``query``; of BM25 fewer where no more share a word. Raises: as ``check``."""
        self.check(query, where)
        found: list[tuple[Passage, float]] = [
            (self.passages[number], score) for number, score in self._retriever.search(query, k)
        ]
        return Retrieved(tuple(found))


def open_knowledge_base(section: RetrievalSection, device: torch.device | str = "cpu") -> KnowledgeBase:
    """The base of ``section.documents``: from ``section.index`` where that is up to date, else made, and kept there.

    Args:
        device: where an embedding model runs.

    Raises:
        UsageError: documents that are no files, a package that is missing, an ``index`` folder of something else.
        DataError: documents that cannot be read, or hold no text. CheckpointError: no embedding model.
        ResourceError: the index cannot be written.
    """
    try:
        return _open(section, device)
    except DataError as error:
        hint = error.hint
        for flag, key in _ADVICE.items():
            hint = hint.replace(flag, key) if hint is not None else None
        raise DataError(error.message, hint=hint) from None


def _open(section: RetrievalSection, device: torch.device | str) -> KnowledgeBase:
    sources = find_sources(section.documents)
    for source in sources:
        if source.format == "hub" or source.is_stream:
            raise UsageError(
                f"`retrieval.documents`: `{source.path}` is no file", hint="name files, folders or patterns"
            )
    folder = Path(section.index).expanduser() if section.index is not None else None
    if folder is not None:
        _check_place(folder, section.documents)
    embedder = open_embedder(section, device)
    made_of = _made_of(section, sources, embedder.folder if embedder is not None else None)
    kept = _load(folder, made_of, embedder) if folder is not None else None
    if kept is not None:
        return kept
    log.info(f"knowledge base: reading {_count(len(sources), 'file')}")
    passages = Passages.of(read_documents(sources, section.json_key), section.passage_words, section.passage_overlap)
    base = KnowledgeBase(passages, make_retriever(section, passages.texts(), embedder))
    log.info(f"knowledge base: {_count(len(passages), 'passage')}")
    if folder is not None:
        _save(base, folder, made_of)
    return base


def open_embedder(section: RetrievalSection, device: torch.device | str = "cpu") -> Embedder | None:
    """The section's embedding model, of a run its best checkpoint; None: it has none.

    Raises:
        CheckpointError: no model of the task ``embedding``, or a damaged one.
    """
    if section.embedding_model is None:
        return None
    folder = resolve_best(section.embedding_model)
    check_weights(folder)
    return Embedder(folder, device)


def make_retriever(section: RetrievalSection, texts: Iterable[str], embedder: Embedder | None) -> Retriever:
    """What finds ``texts``, as the section says."""
    if embedder is not None:
        return Dense.of(texts, embedder)
    return BM25.of(texts, k1=section.k1, b=section.b)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _made_of(section: RetrievalSection, sources: Sequence[Source], model: Path | None) -> dict[str, Any]:
    """What an index depends on. A file counts as changed when its size or time has: it need not be read to tell."""
    found: dict[str, Any] = {"format": _FORMAT, **{key: getattr(section, key) for key in _INDEXED}}
    found["documents"] = [[source.path, source.size, source.modified] for source in sources]
    if model is not None:
        files = sorted(path for path in model.iterdir() if path.suffix in (".json", ".safetensors"))
        stats = [(path.name, path.stat()) for path in files]
        found["embedding_model"] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return found


def _check_place(folder: Path, documents: Sequence[str]) -> None:
    """An index is replaced as a whole: nothing else may be in its folder; nor are its own files documents."""
    if folder.exists():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if names and not (_HEAD in names <= _KNOWN):
            raise UsageError(
                f"`retrieval.index`: {folder} is there, and no index", hint="name a folder that does not exist yet"
            )
    for given in documents:
        if Path(given).is_dir() and folder.resolve().is_relative_to(Path(given).resolve()):
            raise UsageError(
                f"`retrieval.index`: {folder} is among the documents in {given}", hint="name a folder elsewhere"
            )


def _load(folder: Path, made_of: dict[str, Any], embedder: Embedder | None) -> KnowledgeBase | None:
    """The index kept in ``folder``; None where there is none, or one of other documents or settings, or damaged."""
    if not (folder / _HEAD).is_file():
        return None
    try:
        head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
        if head["made_of"] != made_of:
            log.info(f"{folder}: documents or settings have changed since this index was made; making it anew")
            return None
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in Passages.ARRAYS]
        passages = Passages(head["files"], *arrays)
        where = folder / _FINDER
        retriever: Retriever = (
            BM25.load(where, len(passages)) if embedder is None else Dense.load(where, len(passages), embedder)
        )
    except MlmError:
        raise
    except _DAMAGE as error:
        log.warn(f"{folder}: the index is damaged, and is made anew ({error})")
        return None
    log.detail(f"{folder}: {_count(len(passages), 'passage')} of {_count(len(passages.files), 'file')}")
    return KnowledgeBase(passages, retriever)


def _save(base: KnowledgeBase, folder: Path, made_of: dict[str, Any]) -> None:
    """Write beside ``folder``, then put in its place: a reader finds a whole index or none."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name in Passages.ARRAYS:
            np.save(partial / f"{name}.npy", getattr(base.passages, name), allow_pickle=False)
        base._retriever.save(partial / _FINDER)
        head = {"made_of": made_of, "files": base.passages.files}
        (partial / _HEAD).write_text(json.dumps(head, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise ResourceError(
            f"cannot write the index {folder}: {error.strerror or error}", hint="choose another `retrieval.index`"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info(f"index kept in {folder}")
