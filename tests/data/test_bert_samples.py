"""Samples of BERT: what they are made of can be read off, because every token of the corpus is another."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import MemoryTokens

from mlm_cli.config.schema import DataSection, MaskingSection, ModelSection
from mlm_cli.data.bert_samples import BertSamples, _trim_pair
from mlm_cli.data.indexed import IndexedDataset, IndexedWriter
from mlm_cli.data.loader import batches
from mlm_cli.data.packed import SampleSource
from mlm_cli.data.samples import open_training_data
from mlm_cli.data.special_tokens import BertTokens
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.data.words import single_tokens
from mlm_cli.errors import DataError, UsageError

PAD, CLS, SEP, MASK, FIRST = 0, 1, 2, 3, 10
HEADS = ("none", "sentence_order", "next_sentence")


def corpus(num: int, seed: int = 0) -> MemoryTokens:
    """Documents of 1 to 30 sentences; the token at place p is FIRST + p."""
    rng = np.random.default_rng(seed)
    place, documents = FIRST, []
    for _ in range(num):
        sentences = []
        for size in rng.integers(2, 20, rng.integers(1, 31)).tolist():
            sentences.append(list(range(place, place + size)))
            place += size
        documents.append(sentences)
    return MemoryTokens.of_sentences(documents)


def special(num_tokens: int) -> BertTokens:
    size = FIRST + num_tokens
    return BertTokens(CLS, SEP, MASK, PAD, None, size, np.arange(FIRST, size), single_tokens(size))


def samples_of(tokens: MemoryTokens, head: str, seq_length: int = 128, seed: int = 5, **masking: Any) -> BertSamples:
    return BertSamples(
        tokens,
        seq_length=seq_length,
        seed=seed,
        binary_head=head,
        masking=MaskingSection(**masking),
        tokens=special(tokens.num_tokens),
    )


def whole(sample: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens with those hidden put back."""
    tokens = sample["tokens"].copy()
    tokens[sample["positions"]] = sample["labels"]
    return tokens


def check_samples(tokens: MemoryTokens, head: str, num: int, seq_length: int = 128) -> dict[str, float]:
    """Every promise of a sample, on ``num`` of them; returns what was counted."""
    samples = samples_of(tokens, head, seq_length)
    starts = set((tokens.offsets // 4 + FIRST).tolist())
    ends = {start - 1 for start in starts} | {FIRST + tokens.num_tokens - 1}
    bounds = tokens.offsets[tokens.document_index[:-1]] // 4 + FIRST
    owner = lambda token: int(np.searchsorted(bounds, token, "right"))  # noqa: E731
    labels, short, full_sentences = 0, 0, 0
    for number in range(num):
        sample = samples.get(number)
        text, types = whole(sample), sample["token_types"]
        assert text[0] == CLS and text[-1] == SEP and len(text) <= seq_length
        pieces = np.split(text[1:-1], np.flatnonzero(text[1:-1] == SEP))
        pieces = [pieces[0], *(piece[1:] for piece in pieces[1:])]
        assert len(pieces) == (1 if head == "none" else 2)
        for piece in pieces:  # unbroken text of one document
            assert len(piece) and np.array_equal(piece, piece[0] + np.arange(len(piece)))
            assert owner(piece[0]) == owner(piece[-1])
            full_sentences += int(piece[0]) in starts or int(piece[-1]) in ends
        short += len(text) < seq_length // 2
        if head == "none":
            assert not types.any() and "binary_label" not in sample
            continue
        label = int(sample["binary_label"][0])
        assert types.tolist() == [0] * (len(pieces[0]) + 2) + [1] * (len(pieces[1]) + 1)
        one, other = pieces if not (head == "sentence_order" and label) else reversed(pieces)
        if head == "next_sentence" and label:
            assert owner(one[0]) != owner(other[0])
        else:  # in this order they follow each other, but for what was trimmed between them
            assert owner(one[0]) == owner(other[0]) and one[-1] < other[0]
        labels += label
    return {"labels": labels / num, "short": short / num, "edges": full_sentences / num}


@pytest.mark.parametrize("head", HEADS)
def test_samples_are_what_they_promise(head: str) -> None:
    num = 3000
    found = check_samples(corpus(400), head, num)
    if head != "none":
        assert abs(found["labels"] - 0.5) < 5 * 0.5 / np.sqrt(num)
    assert found["edges"] > (0.85 if head == "none" else 1.7)  # all but what was trimmed begin or end a sentence


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_100_000_samples(head: str) -> None:
    found = check_samples(corpus(2000), head, 100_000)
    if head != "none":
        assert abs(found["labels"] - 0.5) < 5 * 0.5 / np.sqrt(100_000)


def check_masks(num: int) -> None:
    """15 % of all tokens, 80/10/10 of these, over whole samples as training sees them."""
    samples = samples_of(corpus(800), "sentence_order", 128, short_sequences=0.1)
    counts, spent, total = np.zeros(2), 0, 0
    for number in range(num):
        sample = samples.get(number)
        now = sample["tokens"][sample["positions"]]
        counts += [(now == MASK).sum(), (now == sample["labels"]).sum()]
        spent, total = spent + len(now), total + len(sample["tokens"])
    assert spent / total == pytest.approx(0.15, abs=0.002)
    for count, share in zip(counts, (0.8, 0.1), strict=True):
        assert abs(count - share * spent) < 5 * np.sqrt(share * (1 - share) * spent) + 1e-4 * spent


def test_share_of_masked_tokens() -> None:
    check_masks(2000)


@pytest.mark.slow
def test_share_of_masked_tokens_on_100_000_samples() -> None:
    check_masks(100_000)


@pytest.mark.parametrize("head", HEADS)
def test_short_sequences(head: str) -> None:
    """A tenth is cut to lengths spread evenly between 2 and all there is room for; without the key, none is."""
    documents = [[[FIRST + 20 * (50 * d + s) + t for t in range(20)] for s in range(50)] for d in range(40)]
    tokens = MemoryTokens.of_sentences(documents)
    counts = {}
    for share in (0.0, 0.1, 1.0):
        samples = samples_of(tokens, head, 128, short_sequences=share)
        counts[share] = [len(samples.get(number)["tokens"]) for number in range(2000)]
    room = 128 - (2 if head == "none" else 3)
    assert np.mean(np.array(counts[0.0]) < 40) < 0.01
    for share in (0.1, 1.0):
        below = np.mean(np.array(counts[share]) - (128 - room) < 40)
        assert below == pytest.approx(share * 39 / (room - 1), abs=0.035), share
    assert min(counts[1.0]) <= 128 - room + 4


def test_longer_side_is_trimmed_at_random_ends() -> None:
    first, second = np.arange(100), np.arange(1000, 1040)
    fronts = []
    for key in range(400):
        one, other = _trim_pair(first, second, 60, key)
        assert (len(one), len(other)) == (30, 30) and np.array_equal(one, one[0] + np.arange(30))
        fronts.append(int(one[0]))
    assert np.mean(fronts) == pytest.approx(35, abs=1.1) and np.std(fronts) == pytest.approx(np.sqrt(70) / 2, rel=0.2)
    assert [len(side) for side in _trim_pair(first, second, 110, 0)] == [70, 40]
    assert [len(side) for side in _trim_pair(first, second, 200, 0)] == [100, 40]


@pytest.mark.parametrize("head", HEADS)
def test_pure_function_of_seed_and_number(head: str) -> None:
    tokens = corpus(60)
    one, again, other = (samples_of(tokens, head, seed=seed) for seed in (5, 5, 6))
    for number in (0, 13, 10**9):
        sample = one.get(number)
        assert all(np.array_equal(array, again.get(number)[name]) for name, array in sample.items())
        assert sample.keys() == other.get(number).keys()
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert any(not np.array_equal(one.get(n)["tokens"], other.get(n)["tokens"]) for n in range(3))


def test_each_epoch_hides_other_tokens() -> None:
    """A document that fits into a sample comes again in each epoch, and is masked anew."""
    samples = samples_of(corpus(1), "none", 1024, short_sequences=0)
    assert samples.samples_per_epoch == 2
    masks = {tuple(samples.get(number)["positions"].tolist()) for number in range(20)}
    texts = {tuple(whole(samples.get(number)).tolist()) for number in range(20)}
    assert len(texts) == 1 and len(masks) == 20


@pytest.mark.parametrize("head", HEADS)
def test_batch(head: str) -> None:
    samples = samples_of(corpus(80), head, 64)
    batch = next(batches(SampleSource([samples]), start_sample=8, micro_batch_size=8))
    width = 10  # 15 % of 64
    shapes = {"tokens": (8, 64), "token_types": (8, 64), "lengths": (8,), "sample_ids": (8,)}
    shapes |= {"masked_positions": (8, width), "labels": (8, width), "loss_mask": (8, width)}
    shapes |= {"binary_labels": (8,)} if head != "none" else {}
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == shapes
    assert batch["sample_ids"].tolist() == list(range(8, 16))
    for row, number in enumerate(range(8, 16)):
        sample = samples.get(number)
        length, masked = len(sample["tokens"]), len(sample["positions"])
        assert batch["lengths"][row] == length
        assert batch["tokens"][row].tolist() == sample["tokens"].tolist() + [PAD] * (64 - length)
        assert batch["token_types"][row].tolist() == sample["token_types"].tolist() + [0] * (64 - length)
        assert batch["loss_mask"][row].tolist() == [1.0] * masked + [0.0] * (width - masked)
        assert batch["masked_positions"][row, :masked].tolist() == sample["positions"].tolist()
        assert batch["labels"][row, :masked].tolist() == sample["labels"].tolist()
        if head != "none":
            assert batch["binary_labels"][row] == sample["binary_label"][0]


@pytest.mark.parametrize("num_workers", [2])
def test_samples_travel_to_workers(tmp_path: Path, num_workers: int) -> None:
    writer, tokens = IndexedWriter(tmp_path / "d", np.int32), corpus(30)
    for document in range(30):
        for sentence in range(int(tokens.document_index[document]), int(tokens.document_index[document + 1])):
            start = int(tokens.offsets[sentence]) // 4
            writer.add_sequence(tokens.data[start : start + int(tokens.lengths[sentence])])
        writer.end_document()
    writer.finish()
    dataset = IndexedDataset(tmp_path / "d")
    samples = samples_of(dataset, "next_sentence", 64)  # type: ignore[arg-type]
    in_memory = samples_of(tokens, "next_sentence", 64)
    assert np.array_equal(samples.get(99)["tokens"], in_memory.get(99)["tokens"])
    assert np.array_equal(pickle.loads(pickle.dumps(samples)).get(99)["tokens"], samples.get(99)["tokens"])
    source = SampleSource([samples])
    straight = list(batches(source, micro_batch_size=4, num_batches=6))
    ahead = list(batches(source, micro_batch_size=4, num_batches=6, num_workers=num_workers))
    for one, other in zip(straight, ahead, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_documents_without_sentences_serve_where_no_pairs_are_asked() -> None:
    """One sequence a document: windows of it. Pairs are refused."""
    tokens = MemoryTokens([list(range(FIRST + 500 * d, FIRST + 500 * (d + 1))) for d in range(8)], np.int32)
    samples = samples_of(tokens, "none", 102, short_sequences=0)
    seen: list[int] = []
    for number in range(samples.samples_per_epoch):
        text = whole(samples.get(number))[1:-1]
        assert np.array_equal(text, text[0] + np.arange(len(text)))
        seen += text.tolist()
    assert set(seen) == set(range(FIRST, FIRST + 4000))
    with pytest.raises(DataError, match=r"not split into sentences \(8 in 8 documents\)") as caught:
        samples_of(tokens, "sentence_order", 102)
    assert "--split-sentences" in str(caught.value.hint)


def test_refusals(tmp_path: Path, test_data: Path) -> None:
    one = MemoryTokens.of_sentences([[[10, 11, 12], [13, 14, 15, 16], [17] * 9]])
    with pytest.raises(DataError, match="is one document"):
        samples_of(one, "next_sentence", 8)
    with pytest.raises(DataError, match="holds 1 tokens in 1 documents; one sample needs 2"):
        samples_of(MemoryTokens([[10]]), "sentence_order", 128)
    with pytest.raises(UsageError, match="leaves BERT no text"):
        samples_of(one, "sentence_order", 6)
    writer = IndexedWriter(tmp_path / "d", np.uint16)
    for _ in range(30):
        for _ in range(4):
            writer.add_sequence([100, 101, 102, 103, 104])
        writer.end_document()
    writer.finish()
    data, model = DataSection(path=str(tmp_path / "d")), ModelSection(family="bert", seq_length=16)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        open_training_data(data, model, seed=1)
    with pytest.raises(DataError, match=r"has no \[CLS\], \[SEP\], \[MASK\], \[PAD\] token") as caught:
        open_training_data(data, model, load_tokenizer("bytes"), seed=1)
    assert "mlm tokenizer train --special-tokens bert" in str(caught.value.hint)
    tokenizer = load_tokenizer(str(test_data / "tokenizers/bert-base-uncased"))
    masked = data.model_copy(update={"mask_documents": True})
    with pytest.raises(UsageError, match=r"mask_documents` is for `model.family` gpt"):
        open_training_data(masked, model, tokenizer, seed=1)
    with pytest.raises(UsageError, match=r"`model.vocab_size` 300 is less than"):
        open_training_data(data, model.model_copy(update={"vocab_size": 300}), tokenizer, seed=1)
    source = open_training_data(data, model, tokenizer, seed=1)["train"]
    assert source is not None
    special_tokens = source.parts[0].special  # type: ignore[attr-defined]
    assert (special_tokens.cls, special_tokens.sep, special_tokens.mask, special_tokens.pad) == (101, 102, 103, 0)
    assert not set(range(1, 100)) & set(special_tokens.replacements.tolist())  # [unused0] ... and special ones
