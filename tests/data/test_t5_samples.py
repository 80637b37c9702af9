"""Samples of T5: windows of the stream, each once an epoch, and batches as the model reads them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from stand_in import MemoryTokens

from mlm_cli.config.schema import DataSection, ModelSection, SpanCorruptionSection
from mlm_cli.data.indexed import IndexedWriter
from mlm_cli.data.loader import batches
from mlm_cli.data.packed import SampleSource
from mlm_cli.data.samples import open_training_data
from mlm_cli.data.span_corruption import lengths_for
from mlm_cli.data.special_tokens import T5Tokens
from mlm_cli.data.t5_samples import T5Samples
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError

PAD, EOS, FIRST = 0, 1, 2000
SENTINELS = np.arange(1999, 1899, -1)
SECTION = SpanCorruptionSection()
STREAM = MemoryTokens([list(range(FIRST + 100 * d, FIRST + 100 * (d + 1))) for d in range(60)], np.int32)


def samples_of(seq_length: int = 64, seed: int = 1, decoder_seq_length: int | None = None) -> T5Samples:
    lengths = lengths_for(seq_length, SECTION.probability, SECTION.mean_length)
    tokens = T5Tokens(PAD, EOS, SENTINELS, 10_000)
    return T5Samples(
        STREAM, lengths=lengths, decoder_seq_length=decoder_seq_length, seed=seed, section=SECTION, tokens=tokens
    )


def text_of(sample: dict[str, np.ndarray]) -> list[int]:
    """The window a sample was made from."""
    spans: dict[int, list[int]] = {}
    for token in sample["targets"][:-1].tolist():
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return [piece for token in sample["inputs"][:-1].tolist() for piece in spans.get(token, [token])]


def test_an_epoch_is_each_window_once_and_masks_differ() -> None:
    samples = samples_of()
    raw, num = samples.lengths.raw, samples.samples_per_epoch
    assert num == STREAM.num_tokens // raw and samples.lengths.inputs == 64
    for epoch in range(3):
        firsts = []
        for number in range(epoch * num, (epoch + 1) * num):
            text = np.array(text_of(samples.get(number)))
            assert np.array_equal(text, FIRST + (text[0] - FIRST + np.arange(raw)) % STREAM.num_tokens)
            firsts.append(int(text[0]))
        assert len(set(firsts)) == num and {first % raw for first in firsts} != set(range(raw))
    lengths = {(len(samples.get(n)["inputs"]), len(samples.get(n)["targets"])) for n in range(50)}
    assert lengths == {(64, samples.lengths.targets)}
    kept = {tuple(np.flatnonzero(samples.get(n)["inputs"] < FIRST).tolist()) for n in range(50)}
    assert len(kept) > 45


@pytest.mark.parametrize("decoder_seq_length", [None, 32])
def test_batch(decoder_seq_length: int | None) -> None:
    samples = samples_of(decoder_seq_length=decoder_seq_length)
    batch = next(batches(SampleSource([samples]), start_sample=4, micro_batch_size=4))
    size, width = samples.lengths.targets, decoder_seq_length or samples.lengths.targets
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "tokens": (4, 64), "decoder_tokens": (4, width), "labels": (4, width), "loss_mask": (4, width),
        "sample_ids": (4,),
    }  # fmt: skip
    for row, number in enumerate(range(4, 8)):
        sample = samples.get(number)
        assert batch["tokens"][row].tolist() == sample["inputs"].tolist()
        labels = sample["targets"].tolist() + [PAD] * (width - size)
        assert batch["labels"][row].tolist() == labels
        assert batch["decoder_tokens"][row].tolist() == [PAD, *labels[:-1]]
        assert batch["loss_mask"][row].tolist() == [1.0] * size + [0.0] * (width - size)


def test_pure_function_of_seed_and_number() -> None:
    one, again, other = samples_of(), samples_of(), samples_of(seed=2)
    copy = pickle.loads(pickle.dumps(one))
    for number in (0, 7, 10**9):
        for same in (again, copy):
            assert np.array_equal(one.get(number)["inputs"], same.get(number)["inputs"])
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert any(not np.array_equal(one.get(n)["inputs"], other.get(n)["inputs"]) for n in range(3))


def test_opening(tmp_path: Path, test_data: Path) -> None:
    """From a recipe's sections, with a tokenizer that has sentinels; what lacks them is refused."""
    writer = IndexedWriter(tmp_path / "d", np.uint16)
    for _ in range(40):
        writer.add_sequence([5, 6, 7, 8, 9, 10, 11, 12, 13, 1])
        writer.end_document()
    writer.finish()
    data, model = DataSection(path=str(tmp_path / "d"), split="1,0,0"), ModelSection(family="t5", seq_length=32)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        open_training_data(data, model, seed=1)
    with pytest.raises(DataError, match="has no padding token"):
        open_training_data(data, model, load_tokenizer("bytes"), seed=1)
    bare = load_tokenizer(str(test_data / "tokenizers/sentencepiece/t5_style_sentencepiece.model"))
    with pytest.raises(DataError, match=r"has 0 sentinels .*a sample masks 2 spans") as caught:
        open_training_data(data, model, bare, seed=1)
    assert "mlm tokenizer train --special-tokens t5" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"`model.decoder_seq_length` 4 is shorter than the 8 tokens"):
        samples_of(32, decoder_seq_length=4)
    with pytest.raises(DataError, match=r"one sample of 7,1.. tokens with masked spans needs"):
        samples_of(6420)
