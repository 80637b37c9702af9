"""`mlm tokenizer train|show`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.data.tokenizer_train import train_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs.tokenizer import TrainRequest, show, train
from tests.jobs.preprocess_runs import command, jsonl, preprocess, texts

SIZES = {"bpe": 700, "wordpiece": 400, "unigram": 300}


@pytest.fixture(scope="module")
def trained(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for kind, size in SIZES.items():
        train(TrainRequest((str(tiny_text),), str(folder / kind), kind, size, max_train_mb=0.1))
    return {kind: folder / kind for kind in SIZES}


@pytest.mark.parametrize("kind", SIZES)
def test_trained_tokenizer_opens_everywhere(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(trained[kind]))
    assert tokenizer.vocab_size == SIZES[kind]
    assert tokenizer.eod_token == {"bpe": "<|endoftext|>", "wordpiece": "[SEP]", "unigram": "</s>"}[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(str(trained[kind]))
    text = "def parse(self, message):\n    return email.message_from_string(message)  # as before"
    ids = tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert len(ids) < len(text) / 1.5  # it has learnt something
    if kind == "bpe":
        assert tokenizer.decode(ids) == text
        anything = "日本語 😀 \x00"
        assert tokenizer.decode_bytes(tokenizer.encode(anything)) == anything.encode()
        assert theirs.eos_token_id == tokenizer.eod_id == 0
    if kind == "wordpiece":
        framed = theirs("email")["input_ids"]
        assert [framed[0], framed[-1]] == [tokenizer.token_ids["[CLS]"], tokenizer.token_ids["[SEP]"]]

    if kind == "unigram":  # T5's places: <pad> </s> <unk> first, <extra_id_0> last
        assert [tokenizer.pad_id, tokenizer.eod_id, tokenizer.unk_id] == [0, 1, 2]
        assert tokenizer.sentinel_ids == tuple(range(SIZES[kind] - 1, SIZES[kind] - 101, -1))
        assert theirs(text)["input_ids"] == [*ids, 1]
        assert theirs.convert_ids_to_tokens(tokenizer.sentinel_ids[7]) == "<extra_id_7>"
        assert tokenizer.encode("a<extra_id_3>b").count(tokenizer.sentinel_ids[3]) == 1


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        pytest.param(kind, chosen, marks=pytest.mark.slow if kind == "unigram" and chosen != "t5" else ())
        for kind in SIZES
        for chosen in ("gpt", "bert", "t5")
    ],
)
def test_special_tokens_of_any_family_in_any_kind(tiny_text: Path, tmp_path: Path, kind: str, chosen: str) -> None:
    request = TrainRequest((str(tiny_text),), str(tmp_path / "t"), kind, 500, max_train_mb=0.02, special_tokens=chosen)
    report = train(request)
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    found = {token: number for token, number in tokenizer.token_ids.items() if number in tokenizer.special_ids}
    if chosen == "gpt":
        assert tokenizer.eod_token == "<|endoftext|>" and not tokenizer.sentinel_ids and tokenizer.mask_id is None
    if chosen == "bert":
        ids = [tokenizer.pad_id, tokenizer.token_ids["[UNK]"], tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
        assert ids == [0, 1, 2, 3, 4] and len(found) == 5
    if chosen == "t5":
        assert report["sentinels"] == 100 and [tokenizer.pad_id, tokenizer.eod_id] == [0, 1]
        assert tokenizer.sentinel_ids[0] == tokenizer.vocab_size - 1 and len(found) == 103
    text = "import email, and more"
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_byte_fallback_leaves_nothing_unknown(tiny_text: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    request = TrainRequest((str(tiny_text),), str(tmp_path / "t"), "unigram", 600, max_train_mb=0.02)
    train(replace(request, output=str(tmp_path / "plain")))
    train(replace(request, byte_fallback=True))
    plain, fallback = (load_tokenizer(str(tmp_path / name)) for name in ("plain", "t"))
    text = "naïve 日本語 สวัสดี 😀"
    assert plain.unk_id in plain.encode(text)
    ids = fallback.encode(text)
    assert fallback.unk_id not in ids and fallback.decode(ids) == text
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == text
    assert len(fallback.encode("<0x41>")) > 1  # written out, it is text
    with pytest.raises(UsageError, match="holds every byte already"):
        train(replace(request, kind="bpe", output=str(tmp_path / "x"), byte_fallback=True))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_more_characters_than_there_is_room_for(tmp_path: Path, kind: str) -> None:
    """The vocabulary is no larger than asked for: the rarest characters are left out, and bytes spell them."""
    han = [chr(0x4E00 + number) for number in range(900)]
    rows = ["".join(han[:60]) + " the same words again"] * 50
    rows += ["".join(han[at : at + 30]) for at in range(60, 900, 30)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    fallback = kind == "unigram"
    size = 400 + 356 * fallback  # sentinels and bytes beside
    report = train(TrainRequest((str(source),), str(tmp_path / "t"), kind, size, byte_fallback=fallback))
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    assert report["documents"] == len(rows) and tokenizer.vocab_size <= size
    common, rare = (tokenizer.encode(text) for text in (rows[0], rows[-1]))
    assert tokenizer.unk_id not in common
    assert tokenizer.decode(rare) == rows[-1] if fallback else tokenizer.unk_id in rare
    if fallback:
        command_line = ["tokenizer", "train", "-", "--kind", kind, "--vocab-size", str(size), "--output", "s"]
        done = command(*command_line, cwd=tmp_path, input=source.read_text(encoding="utf-8"))
        assert done.returncode == 3 and "cannot be read again" in done.stderr and not (tmp_path / "s").exists()


def test_training_is_repeatable_and_is_the_librarys(tiny_text: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    """The same ids as the library trained directly on the same texts."""
    train(TrainRequest((str(tiny_text),), str(tmp_path / "again"), "bpe", SIZES["bpe"], max_train_mb=0.1))
    assert load_tokenizer(str(tmp_path / "again")).fingerprint == load_tokenizer(str(trained["bpe"])).fingerprint
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    jsonl(tmp_path / "small.jsonl", ["a rose is a rose is a rose", "rosy roses rise"])
    train(TrainRequest((str(tmp_path / "small.jsonl"),), str(tmp_path / "ours"), "bpe", 270))
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(
        ["a rose is a rose is a rose", "rosy roses rise"],
        trainers.BpeTrainer(
            vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2, show_progress=False,
        ),
    )  # fmt: skip
    assert load_tokenizer(str(tmp_path / "ours")).token_ids == theirs.get_vocab()


def test_equal_texts_give_an_equal_wordpiece_vocabulary(tmp_path: Path) -> None:
    """The library alone gives five vocabularies in five runs; and what stands first to prevent it is not special."""
    starts, stems, ends = (
        ("un", "re", "de", "in"),
        ("clear", "grade", "struct", "form"),
        ("ing", "ed", "s", "ment", "er"),
    )
    words = [start + stem + end for start in starts for stem in stems for end in ends]
    found = [train_tokenizer(lambda: [" ".join(words)] * 3, kind="wordpiece", vocab_size=80) for _ in range(5)]
    assert len({tokenizer.fingerprint for tokenizer in found}) == 1
    assert found[0].vocab_size == 80
    found[0].save(tmp_path)
    added = [entry["content"] for entry in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]]
    assert added == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_trained_tokenizer_preprocesses(trained: dict[str, Path], tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["import email", "x = 1"])
    preprocess(source, output=tmp_path / "x", tokenizer=str(trained["bpe"]))
    assert texts(tmp_path / "x", str(trained["bpe"])) == ["import email|", "x = 1|"]


def test_lowercase(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["Hello HELLO hello world World"] * 4)
    for kind, size in {"bpe": 280, "wordpiece": 40, "unigram": 140}.items():
        request = TrainRequest((str(tmp_path / "a.jsonl"),), str(tmp_path / kind), kind, size, lowercase=True)
        train(request)
        tokenizer = load_tokenizer(str(tmp_path / kind))
        assert tokenizer.encode("HELLO World") == tokenizer.encode("hello world")


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (tmp_path / "blank.jsonl").write_text("\n\n")
    good = str(jsonl(tmp_path / "good.jsonl", ["a b c"]))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(DataError, match=r"bad.jsonl:2: malformed JSON"):
        train(TrainRequest((str(tmp_path / "bad.jsonl"),), str(tmp_path / "t"), "bpe", 300))
    with pytest.raises(DataError, match="no text"):
        train(TrainRequest((str(tmp_path / "blank.jsonl"),), str(tmp_path / "t"), "bpe", 300))
    with pytest.raises(UsageError, match="too small"):
        train(TrainRequest((good,), str(tmp_path / "t"), "bpe", 100))
    with pytest.raises(UsageError, match="exists already"):
        train(TrainRequest((good,), str(tmp_path / "taken"), "bpe", 300))
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob(".t*"))
    assert (tmp_path / "taken/file").read_text() == "mine"


def test_show(test_data: Path, tmp_path: Path) -> None:
    report = show(str(test_data / "tokenizers/gpt2"))
    assert (report["kind"], report["vocab_size"], report["eod"]["id"]) == ("byte-level BPE", 50257, 50256)
    assert report["sample"]["back"] == report["sample"]["text"]
    assert report["backend"] in ("gigatoken", "tokenizers") and report["backend_reason"]
    done = command("tokenizer", "show", "bytes", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["vocab_size"] == 257


def test_command(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["some words and some more words"] * 20)
    arguments = ["tokenizer", "train", "a.jsonl", "--kind", "bpe", "--vocab-size", "262", "--output", "tok"]
    done = command(*arguments, "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == 262
    assert {path.name for path in (tmp_path / "tok").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert command(*arguments, cwd=tmp_path).returncode == 2
    assert command("tokenizer", "show", "missing", cwd=tmp_path).returncode == 3


def test_overwrite_replaces_a_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words to learn from\n" * 20)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("kept")
    for name in ("work", "file"):
        arguments = ["a.txt", "--vocab-size", "300", "--overwrite", "-o", name]
        done = command("tokenizer", "train", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and "is more than a trained tokenizer" in done.stderr
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years" and (tmp_path / "file").read_text() == "kept"
    for size in ("300", "280"):
        done = command("tokenizer", "train", "a.txt", "--vocab-size", size, "--overwrite", "-o", "tok", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert load_tokenizer(str(tmp_path / "tok")).vocab_size <= 280
    done = command(
        "tokenizer", "train", "a.txt", "--vocab-size", "300", "--max-train-mb", "-1", "-o", "y", cwd=tmp_path
    )
    assert done.returncode == 2 and "`--max-train-mb` must be a number above 0" in done.stderr
