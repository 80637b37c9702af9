"""Text of many languages through the whole data path: tokenizers trained on it, sentences, samples of BERT and T5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlm_cli.config.schema import DataSection, ModelSection
from mlm_cli.data.indexed import IndexedDataset
from mlm_cli.data.loader import batches
from mlm_cli.data.samples import open_training_data
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.jobs.tokenizer import TrainRequest, train
from tests.jobs.preprocess_runs import preprocess

KINDS = {"bpe": ("bert", {}), "wordpiece": ("bert", {}), "unigram": ("t5", {"byte_fallback": True})}
FEW = ("amh", "arb", "cmn_hans", "deu", "ell_monotonic", "eng", "hin", "jpn", "kor", "rus", "tha")
LANGUAGES = [pytest.param("few", id="few"), pytest.param("all", id="all", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=LANGUAGES)
def files(request: pytest.FixtureRequest, test_data: Path) -> list[Path]:
    """The declaration of human rights, a file a language."""
    folder = test_data / "corpora/multilingual/udhr2"
    return [folder / f"{name}.txt" for name in FEW] if request.param == "few" else sorted(folder.glob("*.txt"))


@pytest.fixture(scope="module")
def trained(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("multilingual")
    size = 3000 if len(files) == len(FEW) else 6000
    for kind, (special, settings) in KINDS.items():
        sources, out = tuple(map(str, files)), str(folder / kind)
        train(TrainRequest(sources, out, kind, size, special_tokens=special, **settings))  # type: ignore[arg-type]
    return {kind: str(folder / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_trained_on_many_languages_it_reads_them_all(files: list[Path], trained: dict[str, str], kind: str) -> None:
    tokenizer = load_tokenizer(trained[kind])
    for file in files:
        text = file.read_text(encoding="utf-8-sig")[1000:3000]
        ids = tokenizer.encode(text)
        unknown = ids.count(tokenizer.unk_id) / len(ids) if tokenizer.unk_id is not None else 0.0
        assert unknown == 0 if kind != "wordpiece" else unknown < 0.06, (file.stem, unknown)
        assert len(text) / len(ids) > 0.9, file.stem  # about a character a token or more, in every script
        if kind == "bpe":
            assert tokenizer.decode_bytes(ids).decode() == text


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_many_languages(files: list[Path], trained: dict[str, str], tmp_path: Path, kind: str) -> None:
    """Sentences and tokens in one pass; the same files for any number of workers; then batches of the family."""
    family = "t5" if kind == "unigram" else "bert"
    made = []
    for workers in (1, 2, 3) if kind == "wordpiece" else (1,):
        settings = {"split_sentences": True, "workers": workers}
        preprocess(*files, output=tmp_path / f"w{workers}", tokenizer=trained[kind], **settings)
        made.append([(tmp_path / f"w{workers}_text_sentence.{suffix}").read_bytes() for suffix in ("bin", "idx")])
    assert all(pair == made[0] for pair in made) and len(made[0][0])
    dataset = IndexedDataset(tmp_path / "w1")
    assert dataset.num_documents == len(files) and dataset.num_sequences > len(files) * 60
    tokenizer = load_tokenizer(trained[kind])
    head = {"binary_head": "sentence_order"} if family == "bert" else {}
    model = ModelSection(family=family, seq_length=128, **head)  # type: ignore[arg-type]
    train_source = open_training_data(DataSection(path=str(tmp_path / "w1")), model, tokenizer, seed=1)["train"]
    assert train_source is not None
    for batch in batches(train_source, micro_batch_size=16, num_batches=12):
        tokens = batch["tokens"].numpy()
        assert tokens.shape == (16, 128) and tokens.max() < tokenizer.vocab_size
        if family == "bert":
            share = batch["loss_mask"].sum() / batch["lengths"].sum()
            assert 0.13 < share < 0.155  # words of more pieces than may be hidden at a time never are, as in BERT
            assert (tokens[:, 0] == tokenizer.cls_id).all() and np.isin(tokens, [tokenizer.mask_id]).any()
        else:
            assert (tokens[:, -1] == tokenizer.eod_id).all()
            assert (batch["labels"][:, 0] == tokenizer.sentinel_ids[0]).all()
