"""`mlm preprocess --inspect` and `--merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlm_cli.data.sentences import split_sentences
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.data.tokenizer import load_tokenizer
from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs.indexed_tools import inspect, merge
from tests.jobs.preprocess_runs import command, jsonl, preprocess, texts


def test_merge_is_as_if_written_together(tmp_path: Path) -> None:
    parts = [["a", "", "b c"], ["d"], ["", "é" * 900, ["two", "parts"]]]
    for number, documents in enumerate(parts):
        preprocess(jsonl(tmp_path / f"{number}.jsonl", documents), output=tmp_path / f"p{number}")
    preprocess(*(tmp_path / f"{number}.jsonl" for number in range(3)), output=tmp_path / "whole")
    summary = merge([str(tmp_path / f"p{number}") for number in range(3)], str(tmp_path / "all"))
    for suffix in ("bin", "idx"):
        together = (tmp_path / f"whole_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"all_text_document.{suffix}").read_bytes() == together
    assert summary["documents"] == 7
    sidecar, whole = load_sidecar(tmp_path / "all"), load_sidecar(tmp_path / "whole")
    assert sidecar.sources == whole.sources and sidecar.tokenizer_fingerprint == whole.tokenizer_fingerprint
    assert sidecar.outputs[0]["max_token_id"] == 256
    assert not (tmp_path / "all.merging").exists()
    with pytest.raises(UsageError, match="exists already"):
        merge([str(tmp_path / "p0"), str(tmp_path / "p1")], str(tmp_path / "all"))


def test_merge_of_megatrons_pairs(test_data: Path, tmp_path: Path) -> None:
    """Sets of other tools have no sidecar; the result then has none."""
    source = test_data / "reference/megatron_indexed"
    names = [str(source / f"ag_news_prompt_{name}_document") for name in ("inputs", "targets")]
    summary = merge([names[0], names[0]], str(tmp_path / "x"))
    (output,) = summary["outputs"]
    assert (output["documents"], output["tokens"]) == (200, 2 * 5945)
    twice = (tmp_path / (output["prefix"] + ".bin")).read_bytes()
    assert twice == Path(names[0] + ".bin").read_bytes() * 2
    assert load_sidecar(tmp_path / output["prefix"]) is None


def test_merge_refuses_what_does_not_fit(test_data: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a"])
    preprocess(source, output=tmp_path / "bytes")
    preprocess(source, output=tmp_path / "gpt2", tokenizer=str(test_data / "tokenizers/gpt2"))
    with pytest.raises(DataError, match="made with another tokenizer"):
        merge([str(tmp_path / "bytes"), str(tmp_path / "gpt2")], str(tmp_path / "x"))
    with pytest.raises(UsageError, match="two sets or more"):
        merge([str(tmp_path / "bytes")], str(tmp_path / "x"))
    with pytest.raises(UsageError, match="one of the inputs"):
        merge([str(tmp_path / "bytes"), str(tmp_path / "bytes")], str(tmp_path / "bytes"), overwrite=True)
    (tmp_path / "gpt2.json").unlink()
    theirs = str(test_data / "reference/megatron_indexed/ag_news_prompt_inputs_document")
    with pytest.raises(DataError):
        merge([theirs, str(tmp_path / "gpt2")], str(tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def test_inspect(tmp_path: Path) -> None:
    preprocess(jsonl(tmp_path / "a.jsonl", ["hello", "", "wörld" * 50]), output=tmp_path / "x")
    report = inspect(str(tmp_path / "x"))
    assert (report["documents"], report["sequences"], report["tokens"]) == (3, 2, 6 + 301)
    assert report["sequence_lengths"]["max"] == 301 and report["max_token_id"] == 256
    assert [document["tokens"] for document in report["first_documents"]] == [6, 0, 301]
    assert report["first_documents"][0]["text"] == "hello<|endoftext|>"
    shown = command("preprocess", "--inspect", "x", "--documents", "1", cwd=tmp_path)
    assert shown.returncode == 0 and "3 documents, 2 sequences, 307 tokens" in shown.stdout
    assert "'hello<|endoftext|>'" in shown.stdout
    as_json = command("preprocess", "--inspect", "x_text_document", "--format", "json", cwd=tmp_path)
    assert json.loads(as_json.stdout)["tokens"] == 307


def test_inspect_does_not_decode_with_another_tokenizer(
    tmp_path: Path, test_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = test_data / "reference/megatron_indexed/ag_news_prompt_inputs_document"
    report = inspect(str(theirs), documents=1)
    assert report["first_documents"][0]["text"] is None
    assert "no sidecar" in capsys.readouterr().err
    preprocess(jsonl(tmp_path / "a.jsonl", ["hello"]), output=tmp_path / "x")
    sidecar = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(sidecar | {"tokenizer_fingerprint": "0" * 64}))
    assert inspect(str(tmp_path / "x"))["first_documents"][0]["text"] is None
    assert "has changed" in capsys.readouterr().err


def test_inspect_of_damage(tmp_path: Path) -> None:
    preprocess(jsonl(tmp_path / "a.jsonl", ["hello"]), output=tmp_path / "x")
    with (tmp_path / "x_text_document.bin").open("r+b") as stream:
        stream.truncate(4)
    done = command("preprocess", "--inspect", "x", cwd=tmp_path)
    assert done.returncode == 3 and "should be 12 bytes by its index, but is 4" in done.stderr


def test_merging_leaves_no_pair_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "title": "t"}\n')
    preprocess(tmp_path / "a.jsonl", output=tmp_path / "both", json_key=("text", "title"))
    preprocess(tmp_path / "a.jsonl", output=tmp_path / "one")
    with pytest.raises(DataError, match=r"`title_document`.*a part would be left out"):
        merge([str(tmp_path / "both"), str(tmp_path / "one")], str(tmp_path / "m"))
    merge([str(tmp_path / "both_text_document"), str(tmp_path / "one")], str(tmp_path / "m"))
    assert texts(tmp_path / "m") == ["a|", "a|"]


def test_merging_over_a_set_leaves_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "old"}\n{\n')
    preprocess(tmp_path / "bad.jsonl", output=tmp_path / "m", on_bad_line="skip")
    preprocess(jsonl(tmp_path / "a.jsonl", ["a"]), output=tmp_path / "a")
    (tmp_path / "a.json").unlink()
    dry = merge([str(tmp_path / "a")] * 2, str(tmp_path / "m"), overwrite=True, dry_run=True)
    assert dry["outputs"] == [f"{tmp_path / 'm'}_text_document"] and texts(tmp_path / "m") == ["old|"]
    merge([str(tmp_path / "a")] * 2, str(tmp_path / "m"), overwrite=True)
    assert texts(tmp_path / "m") == ["a|", "a|"]
    assert sorted(path.name for path in tmp_path.glob("m*")) == ["m_text_document.bin", "m_text_document.idx"]


def test_preprocessing_again_leaves_no_old_list_of_bad_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n')
    preprocess(tmp_path / "a.jsonl", output=tmp_path / "x", on_bad_line="skip")
    assert (tmp_path / "x.bad.jsonl").exists()
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    preprocess(tmp_path / "a.jsonl", output=tmp_path / "x", overwrite=True)
    assert not (tmp_path / "x.bad.jsonl").exists()


def test_characters_per_token_by_input(test_data: Path, tmp_path: Path) -> None:
    """Counted when the text is read, without end-of-document ids; languages are told apart by their files."""
    folder, tokenizer = test_data / "corpora/multilingual/udhr2", str(test_data / "tokenizers/gpt2")
    inputs = [folder / f"{language}.txt" for language in ("eng", "deu", "tha")]
    known = load_tokenizer(tokenizer)
    for settings in ({}, {"split_sentences": True, "workers": 3}):
        preprocess(*inputs, output=tmp_path / "x", tokenizer=tokenizer, overwrite=True, **settings)
        found = inspect(str(tmp_path / "x"))["characters_per_token"]
        assert [Path(entry["source"]).stem for entry in found] == ["tha", "deu", "eng"]
        for entry in found:
            texts = [Path(entry["source"]).read_text(encoding="utf-8")]
            texts = split_sentences(texts[0]) if settings else texts
            tokens = sum(len(known.encode(text)) for text in texts)
            assert (entry["characters"], entry["tokens"]) == (sum(map(len, texts)), tokens)
            assert entry["characters_per_token"] == pytest.approx(entry["characters"] / tokens, abs=1e-3)
    shown = command("preprocess", "--inspect", "x", "--documents", "0", cwd=tmp_path)
    assert "characters per token: " in shown.stdout and shown.stdout.index("tha.txt") < shown.stdout.index("eng.txt")


def test_no_characters_per_token_without_counts(test_data: Path, tmp_path: Path) -> None:
    theirs = test_data / "reference/megatron_indexed/ag_news_prompt_inputs_document"
    assert "characters_per_token" not in inspect(str(theirs), documents=0)
    preprocess(jsonl(tmp_path / "a.jsonl", ["", " "]), output=tmp_path / "x")
    report = inspect(str(tmp_path / "x"))
    assert [entry["characters"] for entry in report["characters_per_token"]] == [1]
