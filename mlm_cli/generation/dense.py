"""Dense retrieval: passages by the cosine of their embedding with the query's (Karpukhin et al. 2020).

The embeddings are those of one of our models of the task ``embedding``; the search is exact, one product with all
vectors.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mlm_cli.checkpoint.hub import check_vocabulary
from mlm_cli.config.schema import TaskSection
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.generation.bm25 import best
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.tasks.batches import evaluation_batches
from mlm_cli.tasks.embedding import Embedding
from mlm_cli.tasks.encoding import TextEncoder
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.task_folder import load_task_model, read_facts

_TOGETHER = 4096  # texts whose ids are held at once
_BATCH = 32


class Embedder:
    """Texts as vectors of length 1, by a model of the task ``embedding``, on this rank alone. Long ones lose their end.

    Raises:
        CheckpointError: the folder holds no such model.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, facts = folder, read_facts(folder, Embedding)
        tokenizer = load_tokenizer(str(folder))
        check_vocabulary(facts.section, tokenizer, str(folder))
        section = TaskSection(name="embedding", train="", dev="", text_pair_column="", **facts.settings)
        self._encoder = TextEncoder(tokenizer, facts.section, min(facts.max_length, facts.section.seq_length))
        head = Embedding(section, self._encoder, ()).head
        self._model = load_task_model(folder, ParallelContext.single(device), head).eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def vectors(self, texts: Iterable[str]) -> np.ndarray:
        """float32 ``[texts, h]``, in their order."""
        texts, parts = iter(texts), list[np.ndarray]()
        while group := list(islice(texts, _TOGETHER)):
            features = Features(tuple(self._encoder.rows(group)), self._encoder.pad_id)
            found, places = list[np.ndarray](), list[np.ndarray]()  # batches come with the long texts first
            for batch in evaluation_batches(features, batch_size=_BATCH):
                here = {name: tensor.to(self._device) for name, tensor in batch.items()}
                found.append(self._model(here).float().cpu().numpy())
                places.append(batch["sample_ids"].numpy())
            parts.append(np.concatenate(found)[np.argsort(np.concatenate(places))])
        return np.concatenate(parts)


class Dense:
    """Passages by their vectors, float32 ``[passages, h]``."""

    FILE = "vectors.npy"

    def __init__(self, embedder: Embedder, vectors: np.ndarray) -> None:
        self._embedder, self._vectors = embedder, vectors

    @classmethod
    def of(cls, texts: Iterable[str], embedder: Embedder) -> Dense:
        return cls(embedder, embedder.vectors(texts))

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """The best ``k`` passages with their cosines."""
        return best(self._vectors @ self._embedder.vectors([query])[0], k)

    @staticmethod
    def can_ask(query: str) -> bool:
        """Is there anything but white space?"""
        return bool(query.strip())

    def save(self, folder: Path) -> None:
        folder.mkdir()
        np.save(folder / self.FILE, self._vectors, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, num_passages: int, embedder: Embedder) -> Dense:
        """What :meth:`save` wrote, mapped. Raises OSError, ValueError: damaged, or not of so many passages."""
        vectors = np.load(folder / cls.FILE, mmap_mode="r", allow_pickle=False)
        if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != num_passages:
            raise ValueError("its vectors are not those of its passages")
        return cls(embedder, vectors)
