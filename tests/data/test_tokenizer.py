"""Tokenizers of every kind: ids by outside references, one fingerprint whatever the file, one error for bad files."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.data.tokenizer_backends import (
    CHECK_SAMPLE,
    BytesEncoder,
    choose_encoder,
    disagreement,
    is_bytes,
)
from mlm_cli.errors import DataError

ALL = ("gpt2", "bert-base-cased", "bert-base-uncased", "sentencepiece/test_model.model")


def test_gpt2_reference_encoding(test_data: Path) -> None:
    reference = json.loads((test_data / "reference/gpt2_bpe/encoded_tokens.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(str(test_data / "tokenizers/gpt2"))
    assert tokenizer.encode(reference["text"]) == reference["token_ids"]
    assert tokenizer.decode(reference["token_ids"]) == reference["text"]
    assert tokenizer.decode_bytes(reference["token_ids"]) == reference["text"].encode("utf-8")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.kind) == (50257, 50256, "byte-level BPE")


def test_wordpiece_reference_encodings(test_data: Path) -> None:
    def read(name: str) -> list:
        with gzip.open(test_data / "reference/bert_wordpiece" / name, "rt", encoding="utf-8") as stream:
            return json.load(stream)

    questions, ids = read("question_tokens.json.gz"), read("tokenized_questions.json.gz")
    tokenizer = load_tokenizer(str(test_data / "tokenizers/bert-base-uncased"))
    assert tokenizer.encode_batch([question["original"] for question in questions]) == ids
    pieces = {number: token for token, number in tokenizer.token_ids.items()}
    assert [pieces[number] for number in ids[7]] == questions[7]["wordpiece"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eod_id) == (0, 100, 102)


def test_case_of_bert_vocabularies(test_data: Path) -> None:
    cased = load_tokenizer(str(test_data / "tokenizers/bert-base-cased"))
    uncased = load_tokenizer(str(test_data / "tokenizers/bert-base-uncased"))
    assert cased.decode(cased.encode("Paris in May")) == "Paris in May"
    assert uncased.decode(uncased.encode("Paris in May")) == "paris in may"


@pytest.mark.parametrize("name", ["test_model", "t5_style_sentencepiece"])
def test_sentencepiece_ids_are_those_of_its_own_library(test_data: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = test_data / f"tokenizers/sentencepiece/{name}.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["", " ", "  a  b ", "▁a", "a▁▁b", "\u3000x\t\ny", "İ ǅ ﬁ", "😀😀 zz", "\x00a", "\t tab", "x" * 400]
    for file in sorted((test_data / "corpora/multilingual/udhr2").glob("*.txt")):
        texts += file.read_text(encoding="utf-8-sig").split("\n")[:60]
    texts += (test_data / "tokenizers/sentencepiece/botchan.txt").read_text(encoding="utf-8").split("\n")[:1500]
    ours = load_tokenizer(str(path))
    assert ours.encode_batch(texts) == theirs.encode(texts)
    assert ours.vocab_size == theirs.vocab_size()
    known = [ids for ids in theirs.encode(texts[-1500:]) if theirs.unk_id() not in ids]
    assert name != "test_model" or len(known) > 1000
    assert [ours.decode(ids) for ids in known] == [theirs.decode(ids) for ids in known]


def test_sentencepiece_bpe_ids_are_those_of_its_own_library(test_data: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    book = test_data / "tokenizers/sentencepiece/botchan.txt"
    sentencepiece.SentencePieceTrainer.train(
        input=str(book), model_prefix=str(tmp_path / "bpe"), vocab_size=800, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    texts = [*book.read_text(encoding="utf-8").split("\n")[:800], "日本語 naïve 😀", "", "  two  spaces "]
    ours = load_tokenizer(str(tmp_path / "bpe.model"))
    assert ours.encode_batch(texts) == theirs.encode(texts)


@pytest.mark.parametrize("name", [*ALL, "bytes"])
def test_saved_folder_is_the_same_tokenizer_here_and_for_transformers(
    test_data: Path, tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(name if name == "bytes" else str(test_data / "tokenizers" / name))
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.vocab_size, again.eod_id, again.pad_id) == (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.pad_id)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    for text in CHECK_SAMPLE:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text) == again.encode(text)
    if name in ("gpt2", "bytes"):
        assert theirs.eos_token_id == tokenizer.eod_id
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert load_tokenizer(str(tmp_path / "theirs")).fingerprint == tokenizer.fingerprint


def test_fingerprint_is_of_the_tokenizer_not_of_its_files(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "tokenizers/gpt2"
    shutil.copy(source / "encoder.json", tmp_path / "gpt2-vocab.json")
    shutil.copy(source / "vocab.bpe", tmp_path / "gpt2-merges.txt")
    prints = {
        load_tokenizer(str(path)).fingerprint
        for path in (source, source / "encoder.json", source / "vocab.bpe", tmp_path, tmp_path / "gpt2-merges.txt")
    }
    assert len(prints) == 1
    changed = json.loads(load_tokenizer(str(source)).definition_json)
    changed["model"]["merges"][100], changed["model"]["merges"][101] = changed["model"]["merges"][101:99:-1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(changed))
    assert load_tokenizer(str(tmp_path / "other")).fingerprint not in prints


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    text = "naïve\n\x00 😀 <|endoftext|> end"
    head, tail = text.split("<|endoftext|>")
    expected = [*head.encode(), 256, *tail.encode()]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.encode(text) == expected
    assert BytesEncoder().encode([text], "uint16")[0].tolist() == expected
    assert tokenizer.decode_bytes(expected) == text.encode()
    assert tokenizer.token_bytes(0xFF) == b"\xff"
    assert is_bytes(tokenizer) and choose_encoder(tokenizer).encoder.name == "bytes"


@pytest.mark.parametrize("name", [*ALL, "bytes"])
def test_chosen_encoder_gives_the_reference_ids(test_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(name if name == "bytes" else str(test_data / "tokenizers" / name))
    encoder = choose_encoder(tokenizer).encoder
    texts = [
        path.read_text(encoding="utf-8-sig")
        for path in sorted((test_data / "corpora/multilingual/udhr2").glob("*.txt"))
    ]
    assert disagreement(encoder, tokenizer, texts) is None
    wanted = tokenizer.encode_batch(texts[:5])
    flat, ends = encoder.encode_flat([*texts[:5], ""], "uint16", 9)
    assert flat.tolist() == [number for ids in wanted for number in [*ids, 9]]
    assert ends.tolist() == [sum(len(ids) + 1 for ids in wanted[: i + 1]) for i in range(5)] + [len(flat)]


def test_encoder_that_differs_is_found(test_data: Path) -> None:
    gpt2 = load_tokenizer(str(test_data / "tokenizers/gpt2"))
    assert disagreement(BytesEncoder(), gpt2) is not None


def test_backend_asked_for_but_not_fit(test_data: Path) -> None:
    with pytest.raises(DataError, match="gigatoken does BPE only"):
        choose_encoder(load_tokenizer(str(test_data / "tokenizers/bert-base-cased")), "gigatoken")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "does not load"),
        ({"tokenizer.json": "[1, 2]"}, "no vocabulary"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}}}'}, "no vocabulary"),
        ({"tokenizer.json": b"\xff\xfe{}"}, "does not load"),
        ({"vocab.json": '{"a": 0}'}, "no tokenizer in folder"),
        (
            {"vocab.json": '{"a": 0, "b": 1}', "merges.txt": "#version: 0.2\na b\n"},
            "merges.txt:2: `a b` is not a merge",
        ),
        ({"vocab.txt": "just\nwords\n"}, r"it has no `\[UNK\]`"),
        ({"x.model": b"not protobuf at all"}, "not a SentencePiece model"),
        ({"x.model": b""}, "not a SentencePiece model"),
        ({"readme.md": "hello"}, "no tokenizer in folder"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path))


def test_definition_that_the_library_refuses(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}')
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match="does not load"):
        tokenizer.encode("a")


@pytest.mark.parametrize("spec", ["no/such/folder/x", "missing.json", "./x", "/x"])
def test_missing_tokenizer(spec: str) -> None:
    with pytest.raises(DataError):
        load_tokenizer(spec)


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be fetched from the Hub"):
        load_tokenizer("nobody-here/no-such-tokenizer")


def test_import_is_light() -> None:
    code = (
        "import sys; import mlm_cli.jobs.preprocess, mlm_cli.data.tokenizer, mlm_cli.data.indexed; "
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'tokenizers', 'rich'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
