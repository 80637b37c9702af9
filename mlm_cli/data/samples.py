"""The recipe's ``data`` section -> the sample sources of train, valid and test, checked before the first step.

What a source is lies in ``packed.py``; the samples of each family in ``packed.py``, ``bert_samples.py`` and
``t5_samples.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mlm_cli import log
from mlm_cli.data.bert_samples import BertSamples
from mlm_cli.data.indexed import IndexedDataset
from mlm_cli.data.packed import GPTSamples, Samples, SampleSource
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.data.span_corruption import lengths_for, with_targets
from mlm_cli.data.special_tokens import bert_tokens, t5_tokens
from mlm_cli.data.split import SPLITS, split_documents
from mlm_cli.data.t5_samples import T5Samples
from mlm_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from mlm_cli.config.schema import DataSection, ModelSection, WeightedPrefix
    from mlm_cli.data.tokenizer import Tokenizer

__all__ = ["GPTSamples", "SampleSource", "open_training_data", "with_sizes"]

_CHECKED_TOKENS = 1 << 25  # read at most this many ids (64-128 MB) when looking for ids outside the vocabulary


def open_training_data(
    data: DataSection,
    model: ModelSection,
    tokenizer: Tokenizer | None = None,
    *,
    seed: int,
) -> dict[str, SampleSource | None]:
    """Open what the recipe names; ``{"train": SampleSource, "valid": SampleSource | None, "test": ...}``.

    ``valid`` and ``test`` are None where the recipe gives them no share, or a share of ``data.split`` too small for
    one sample (said as a warning for valid). Their samples keep one order, so every validation sees the same ones.

    Args:
        model: its family says what a sample is, its ``seq_length`` how long. Ids from its ``vocab_size`` on are an
            error (a bounded part of each data set is searched now, the rest when read).
        tokenizer: data made with another one is an error. None: not checked (gpt only).

    Raises:
        UsageError: the section names no training data, or both ``path`` and ``train``; what the family cannot do.
        DataError: files that do not open, another tokenizer, one without the special tokens of the family, ids outside
            the vocabulary, too few tokens.
    """
    _check_section(data, model)
    build = _builder(data, model, tokenizer, seed)
    opened: dict[str, IndexedDataset] = {}

    def parts_of(entry: str | Sequence[WeightedPrefix]) -> list[tuple[IndexedDataset, float]]:
        named = [(entry, 1.0)] if isinstance(entry, str) else [(part.prefix, part.weight) for part in entry]
        for path, _ in named:
            if path not in opened:
                opened[path] = _open_checked(path, model.vocab_size, tokenizer)
        return [(opened[path], weight) for path, weight in named]

    sources: dict[str, SampleSource | None] = {}
    for number, split in enumerate(SPLITS):
        own = getattr(data, split)
        entry = own if own is not None else data.path if data.train is None else None
        if entry is None:
            sources[split] = None
            continue
        found: list[tuple[Samples, float]] = []
        for stream, (dataset, weight) in enumerate(parts_of(entry)):
            documents = None if own is not None else split_documents(data.split, dataset.num_documents)[split]
            name = str(dataset.prefix) if own is not None else f"the {split} split of {dataset.prefix}"
            if documents is not None and len(documents) == 0 and split != "train":
                _say_left_out(split, f"{name} holds no documents (data.split {data.split})")
                continue
            try:
                samples = build(dataset, documents, stream=stream * len(SPLITS) + number, name=name)
            except DataError as error:
                if own is not None or split == "train" or not dataset.one_stream:
                    raise
                _say_left_out(split, error.message)
                continue
            found.append((samples, weight))
        sources[split] = SampleSource([part for part, _ in found], [weight for _, weight in found]) if found else None
    _say_rounding(sources["train"])
    return sources


def with_sizes(model: ModelSection, data: DataSection, tokenizer: Tokenizer | None) -> ModelSection:
    """The model section with the sizes that data and tokenizer decide: ``vocab_size``, T5's ``decoder_seq_length``.

    Raises:
        UsageError: neither the section nor a tokenizer tells the size of the vocabulary.
    """
    vocab_size = model.vocab_size or (tokenizer.vocab_size if tokenizer is not None else None)
    if vocab_size is None:
        raise UsageError("the size of the vocabulary is unknown", hint="set `tokenizer`, or model.vocab_size")
    return with_targets(model, data.span_corruption).model_copy(update={"vocab_size": vocab_size})


def _builder(data: DataSection, model: ModelSection, tokenizer: Tokenizer | None, seed: int) -> Callable[..., Samples]:
    """What makes samples of the model's family: ``build(dataset, documents, stream=, name=)``."""
    length = model.seq_length
    if model.family == "gpt":
        masked = data.mask_documents
        return partial(GPTSamples, seq_length=length, seed=seed, mask_documents=masked, vocab_size=model.vocab_size)
    if tokenizer is None:
        raise UsageError(f"`model.family` {model.family} needs a tokenizer's special tokens", hint="set `tokenizer`")
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise UsageError(
            f"`model.vocab_size` {model.vocab_size:,} is less than the {tokenizer.vocab_size:,} tokens of `tokenizer`",
            hint="leave `model.vocab_size` out",
        )
    if model.family == "bert":
        head, tokens = model.binary_head, bert_tokens(tokenizer)
        return partial(BertSamples, seq_length=length, seed=seed, binary_head=head, masking=data.masking, tokens=tokens)
    section = data.span_corruption
    if length < 4:
        raise UsageError(f"`model.seq_length` {length} is too short to mask a span", hint="use 16 or more")
    lengths = lengths_for(length, section.probability, section.mean_length)
    return partial(
        T5Samples,
        lengths=lengths,
        decoder_seq_length=model.decoder_seq_length,
        seed=seed,
        section=section,
        tokens=t5_tokens(tokenizer, lengths.num_spans),
    )


def _check_section(data: DataSection, model: ModelSection) -> None:
    if data.mask_documents and model.family != "gpt":
        raise UsageError(
            f"`data.mask_documents` is for `model.family` gpt, not {model.family}",
            hint="leave `data.mask_documents` out",
        )
    if data.path is None and data.train is None:
        raise UsageError("the recipe names no training data", hint="set data.path, or data.train and data.valid")
    if data.path is not None and data.train is not None:
        raise UsageError("data.path and data.train are both set", hint="give one path with a split, or separate files")


def _say_left_out(split: str, why: str) -> None:
    """Validation that will not take place is worth a warning; the test split is not used in training."""
    (log.warn if split == "valid" else log.detail)(f"no {split} samples: {why}")


def _say_rounding(train: SampleSource | None) -> None:
    if train is not None and train.blend is not None and train.blend.rounded:
        shares = ", ".join(f"{float(share):.6f}" for share in train.blend.shares)
        log.warn(f"blend weights are kept in steps of 1/65,536; in use: {shares}")


def _open_checked(path: str, vocab_size: int | None, tokenizer: Tokenizer | None) -> IndexedDataset:
    dataset = IndexedDataset(path)
    sidecar = load_sidecar(dataset.prefix)
    if sidecar is None:
        log.detail(f"{dataset.prefix} has no sidecar: its tokenizer cannot be checked")
    elif tokenizer is not None and sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{dataset.prefix} was made with another tokenizer ({sidecar.tokenizer_spec}, "
            f"{sidecar.tokenizer_fingerprint[:12]}) than the recipe's ({tokenizer.fingerprint[:12]})",
            hint="set `tokenizer` to the one the data was made with, or run `mlm preprocess` again",
        )
    if vocab_size is not None:
        recorded = (sidecar.output(dataset.prefix) or {}).get("max_token_id") if sidecar is not None else None
        if recorded is not None and recorded >= vocab_size:
            raise _outside_vocabulary(dataset, f"token id {recorded}", vocab_size)
        _check_ids(dataset, vocab_size)
    return dataset


def _outside_vocabulary(dataset: IndexedDataset, what: str, vocab_size: int) -> DataError:
    return DataError(
        f"{what} in {dataset.prefix}.bin is not in the vocabulary of {vocab_size:,}",
        hint="the data was made with another tokenizer: run `mlm preprocess` with the recipe's",
    )


def _check_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """Search evenly spread blocks of a data set (all of a small one) for ids outside the vocabulary."""
    total = dataset.num_tokens
    num_blocks = 64
    block = min(-(-total // num_blocks), _CHECKED_TOKENS // num_blocks)
    for start in np.linspace(0, max(0, total - block), num_blocks).astype(np.int64) if total else ():
        tokens = dataset.tokens(int(start), min(int(start) + block, total))
        if (largest := int(tokens.max())) >= vocab_size:
            place = int(start) + int(tokens.argmax())
            raise _outside_vocabulary(dataset, f"token id {largest} (token {place:,})", vocab_size)
