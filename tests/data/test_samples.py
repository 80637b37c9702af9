"""Packed samples against a plain rebuild of the stream; what open_training_data accepts and refuses."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import MemoryTokens

from mlm_cli.config.schema import DataSection, ModelSection, WeightedPrefix
from mlm_cli.data.indexed import IndexedDataset, IndexedWriter
from mlm_cli.data.order import epoch_shift
from mlm_cli.data.samples import GPTSamples, SampleSource, open_training_data
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError


def make_documents(num: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Documents of 0 to ``longest`` tokens; the token at stream place p is p, so that places can be read off."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, num)
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist())]


def write(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16, sequences: int = 1) -> str:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        for part in np.array_split(np.array(document, dtype=dtype), sequences):
            if sequences == 1 or len(part):
                writer.add_sequence(part)
        writer.end_document()
    writer.finish()
    return str(prefix)


def test_each_sample_of_an_epoch_exactly_once() -> None:
    tokens = MemoryTokens(make_documents(200))
    samples = GPTSamples(tokens, seq_length=16, seed=7)
    num = samples.samples_per_epoch
    assert num == (tokens.num_tokens - 1) // 16
    for epoch in range(4):
        shift = epoch_shift(16, 7, epoch)
        firsts = []
        for number in range(epoch * num, (epoch + 1) * num):
            sample = samples.get(number)["tokens"]
            assert sample.dtype == np.int64 and sample.shape == (17,)
            # ids count stream places, so a sample is a run of them, around the end of the stream if need be
            assert np.array_equal(sample, (int(sample[0]) + np.arange(17)) % tokens.num_tokens)
            firsts.append(int(sample[0]))
        assert sorted(firsts) == sorted((shift + 16 * i) % tokens.num_tokens for i in range(num))
        assert firsts != sorted(firsts)


def test_cuts_move_between_epochs_but_first_epoch_never_wraps() -> None:
    samples = GPTSamples(MemoryTokens(make_documents(100)), seq_length=16, seed=3)
    num = samples.samples_per_epoch
    residues = [{int(samples.get(epoch * num + i)["tokens"][0]) % 16 for i in range(num)} for epoch in range(6)]
    assert residues[0] == {0}
    assert len({min(residue) for residue in residues}) > 2


@pytest.mark.parametrize("sequences", [1, 3])
def test_segments_are_the_documents_of_the_index(tmp_path: Path, sequences: int) -> None:
    documents = make_documents(120, seed=1)
    dataset = IndexedDataset(write(tmp_path / "d", documents, sequences=sequences))
    owner = np.array([number for number, document in enumerate(documents) for _ in document])
    samples = GPTSamples(dataset, seq_length=24, seed=5, mask_documents=True)
    for number in range(3 * samples.samples_per_epoch):
        sample = samples.get(number)
        owners = owner[np.asarray(sample["tokens"])[:-1]]
        _, expected = np.unique(np.cumsum(np.r_[0, owners[1:] != owners[:-1]]), return_inverse=True)
        assert np.array_equal(sample["segments"], expected), number


def test_a_range_of_documents_stays_in_it() -> None:
    documents = make_documents(100)
    samples = GPTSamples(MemoryTokens(documents), range(30, 60), seq_length=8, seed=0)
    allowed = {token for document in documents[30:60] for token in document}
    assert samples.num_tokens == len(allowed)
    seen = {int(t) for i in range(3 * samples.samples_per_epoch) for t in np.asarray(samples.get(i)["tokens"])}
    assert seen <= allowed


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(DataError, match=r"holds 8 tokens in 2 documents; one sample of seq_length 8 needs 9"):
        GPTSamples(MemoryTokens([[1] * 4, [2] * 4]), seq_length=8, seed=0)
    assert GPTSamples(MemoryTokens([[1] * 4, [2] * 5]), seq_length=8, seed=0).samples_per_epoch == 1


def test_ids_outside_the_vocabulary() -> None:
    samples = GPTSamples(MemoryTokens([[1, 2, 3, 500, 4, 5, 6, 7, 8]]), seq_length=4, seed=0, vocab_size=256)
    with pytest.raises(DataError, match=r"token id 500 .* not in the vocabulary of 256"):
        for number in range(samples.samples_per_epoch):
            samples.get(number)


def pages_touched() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_opening_reads_next_to_nothing(tmp_path: Path) -> None:
    """A sparse file of 200 GB opens, and gives its last samples, with as few pages read as a small one."""
    num_tokens = 100_000_000_000
    prefix = tmp_path / "large"
    with open(f"{prefix}.bin", "wb") as out:
        out.truncate(2 * num_tokens)

    class Large(MemoryTokens):
        def __init__(self) -> None:
            super().__init__([[0]])
            self.prefix, self.num_tokens = str(prefix), num_tokens
            self.data = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
            self.num_documents = 1

    before = pages_touched()
    samples = GPTSamples(Large(), seq_length=2048, seed=1, mask_documents=True)
    for number in (0, samples.samples_per_epoch - 1, 10**14):
        samples.get(number)
    assert samples.fingerprint and pages_touched() - before < 2000


def test_opening_a_real_index_reads_as_much_at_any_size(tmp_path: Path) -> None:
    """An index of 50 million documents (1 GB, sparse but for its ends) opens without being walked."""
    from mlm_cli.data.indexed import index_header

    num = 50_000_000
    prefix = tmp_path / "many"
    with open(f"{prefix}.idx", "wb") as out:
        out.write(index_header(np.uint16, num, num))
        out.truncate(34 + 12 * num + 8 * (num + 1))
        out.seek(34 + 12 * num + 8 * num)
        out.write(num.to_bytes(8, "little"))
    open(f"{prefix}.bin", "wb").close()
    before = pages_touched()
    dataset = IndexedDataset(prefix)
    assert dataset.one_stream  # all lengths and offsets are 0
    with pytest.raises(DataError, match="0 tokens in 50,000,000 documents"):
        GPTSamples(dataset, seq_length=8, seed=0)
    assert pages_touched() - before < 2000  # a walk would touch 240,000, or 15,000 mapped 16 at a time


def test_sequences_out_of_order_are_refused(tmp_path: Path) -> None:
    """In a small set anywhere; in a large one wherever the spread look meets it."""
    prefix = write(tmp_path / "d", [[i % 1000] for i in range(70_000)])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    first = 34 + 4 * 70_000
    index[first : first + 8], index[first + 8 : first + 16] = index[first + 8 : first + 16], index[first : first + 8]
    Path(f"{prefix}.idx").write_bytes(bytes(index))
    with pytest.raises(DataError, match="do not lie back to back"):
        GPTSamples(IndexedDataset(prefix), seq_length=8, seed=0)


def test_samples_travel_to_another_process(tmp_path: Path) -> None:
    source = SampleSource([GPTSamples(IndexedDataset(write(tmp_path / "d", make_documents(50))), seq_length=8, seed=2)])
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.get(77)["tokens"], source.get(77)["tokens"])
    assert len(pickle.dumps(source)) < 5000


def test_blended_source_reads_each_part_in_its_own_order() -> None:
    parts = [GPTSamples(MemoryTokens(make_documents(60)), seq_length=8, seed=1, stream=i) for i in range(3)]
    source = SampleSource(parts, [0.2, 0.3, 0.5])
    counts = [0, 0, 0]
    for number in range(500):
        part, occurrence = source.blend.locate(number)  # type: ignore[union-attr]
        assert occurrence == counts[part]
        counts[part] += 1
        assert np.array_equal(source.get(number)["tokens"], parts[part].get(occurrence)["tokens"])
    assert counts == [100, 150, 250]


def test_open_with_a_split(tmp_path: Path) -> None:
    documents = make_documents(1000)
    prefix = write(tmp_path / "corpus_text_document", documents)
    sources = open_training_data(
        DataSection(path=str(tmp_path / "corpus"), split="80,15,5"), ModelSection(seq_length=16), seed=1
    )
    cut = [len([t for d in documents[a:b] for t in d]) for a, b in ((0, 800), (800, 950), (950, 1000))]
    assert [source.num_tokens for source in sources.values() if source] == cut
    again = open_training_data(DataSection(path=prefix, split="80,15,5"), ModelSection(seq_length=16), seed=1)
    assert [s.fingerprint for s in sources.values() if s] == [s.fingerprint for s in again.values() if s]
    other = open_training_data(DataSection(path=prefix, split="80,15,5"), ModelSection(seq_length=16), seed=2)
    assert other["train"].fingerprint != again["train"].fingerprint  # type: ignore[union-attr]


def test_open_with_separate_files_and_blends(tmp_path: Path) -> None:
    names = [write(tmp_path / name, make_documents(100, seed)) for seed, name in enumerate("abc")]
    data = DataSection(
        train=(WeightedPrefix(prefix=names[0], weight=3), WeightedPrefix(prefix=names[1], weight=1)), valid=names[2]
    )
    sources = open_training_data(data, ModelSection(seq_length=16), seed=1)
    assert sources["train"].blend.shares[0] * 4 == 3 and sources["test"] is None  # type: ignore[union-attr]
    assert sources["valid"].num_tokens == IndexedDataset(names[2]).num_tokens  # type: ignore[union-attr]


def test_a_share_too_small_for_a_sample_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "d", make_documents(60))
    sources = open_training_data(DataSection(path=prefix), ModelSection(seq_length=64), seed=1)
    assert sources["train"] is not None and sources["valid"] is None
    assert "no valid samples" in capsys.readouterr().err


def test_refusals(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", make_documents(60))
    with pytest.raises(UsageError, match="no training data"):
        open_training_data(DataSection(), ModelSection(seq_length=8), seed=1)
    with pytest.raises(UsageError, match="both set"):
        open_training_data(DataSection(path=prefix, train=prefix), ModelSection(seq_length=8), seed=1)
    with pytest.raises(DataError, match="no indexed data set"):
        open_training_data(DataSection(path=str(tmp_path / "absent")), ModelSection(seq_length=8), seed=1)
    with pytest.raises(DataError, match="one sample of seq_length 4,096 needs 4,097"):
        open_training_data(DataSection(path=prefix), ModelSection(seq_length=4096), seed=1)
    with pytest.raises(DataError, match="is not in the vocabulary of 100"):
        open_training_data(DataSection(path=prefix), ModelSection(seq_length=8, vocab_size=100), seed=1)


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from mlm_cli.data.sidecar import Sidecar

    bytes_ = load_tokenizer("bytes")
    prefix = write(tmp_path / "d_text_document", make_documents(60))
    output = {"prefix": "d_text_document", "max_token_id": 70_000}
    data = DataSection(path=prefix)

    def recorded(fingerprint: str) -> None:
        sidecar = Sidecar(fingerprint, "gpt2", 70_001, None, True, 60, [output])
        (tmp_path / "d.json").write_text(sidecar.text())

    recorded("ab" * 32)
    with pytest.raises(DataError, match=r"another tokenizer \(gpt2, abababababab\)"):
        open_training_data(data, ModelSection(seq_length=8), bytes_, seed=1)
    recorded(bytes_.fingerprint)
    with pytest.raises(DataError, match="token id 70000 in"):
        open_training_data(data, ModelSection(seq_length=8, vocab_size=60_000), bytes_, seed=1)
    assert open_training_data(data, ModelSection(seq_length=8), bytes_, seed=1)["train"] is not None
