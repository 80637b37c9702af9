"""`mlm preprocess`: Megatron's bytes, every input format, the sidecar, memory."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlm_cli.data.indexed import IndexedDataset
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.data.tokenizer import load_tokenizer
from tests.data import megatron_oracle
from tests.jobs.preprocess_runs import ROOT, command, jsonl, origins, preprocess, texts

ODD = ["", "a", ["two sentences", "", "here"], [], "é😀\u2028x", " \n ", ["", ""], "<|endoftext|> inside", "x" * 5000]


@pytest.fixture(scope="module")
def corpus(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred real documents of several scripts among odd ones."""
    documents: list[object] = []
    for file in sorted((test_data / "corpora/multilingual/udhr2").glob("*.txt"))[::4]:
        documents += file.read_text(encoding="utf-8-sig").split("\n\n")[:12]
    for number, odd in enumerate(ODD):
        documents.insert(number * 7, odd)
    documents += (test_data / "corpora/wikitext-2/wiki.valid.raw").read_text(encoding="utf-8").split("\n = ")[:80]
    return jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "bert-base-cased", "sentencepiece/test_model.model"])
def test_bytes_are_megatrons(
    test_data: Path, tmp_path: Path, corpus: Path, name: str, append_eod: bool, workers: int
) -> None:
    tokenizer = load_tokenizer(str(test_data / "tokenizers" / name))
    tokenizer.save(tmp_path / "tok")
    eod = tokenizer.eod_id if append_eod else None
    data, index = megatron_oracle.preprocess(corpus, tmp_path / "tok/tokenizer.json", eod=eod)
    summary = preprocess(
        corpus, output=tmp_path / "x", tokenizer=str(tmp_path / "tok"), append_eod=append_eod, workers=workers
    )
    assert (tmp_path / "x_text_document.bin").read_bytes() == data
    assert (tmp_path / "x_text_document.idx").read_bytes() == index
    assert summary["documents"] == summary["read"] == corpus.read_bytes().count(b"\n")


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_bytes_are_those_of_megatrons_own_builder(test_data: Path, tmp_path: Path, corpus: Path) -> None:
    from megatron.core.datasets import indexed_dataset

    tokenizer = load_tokenizer(str(test_data / "tokenizers/gpt2"))
    dtype = indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=dtype)
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            parts = [ids for ids in tokenizer.encode_batch([text] if isinstance(text, str) else text) if ids]
            if parts:
                parts[-1].append(tokenizer.eod_id)
            builder.add_document([number for ids in parts for number in ids], [len(ids) for ids in parts])
    builder.finalize(str(tmp_path / "m.idx"))
    preprocess(corpus, output=tmp_path / "x", tokenizer=str(test_data / "tokenizers/gpt2"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x_text_document.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()


def test_workers_and_chunks_change_nothing(tmp_path: Path) -> None:
    """Several MB, so that every worker gets several tasks; short and long documents mixed."""
    source = jsonl(tmp_path / "x.jsonl", (f"document {i} " + "word " * (i % 977) for i in range(3000)))
    preprocess(source, output=tmp_path / "one", workers=1)
    for workers in (2, 3):
        preprocess(source, output=tmp_path / f"w{workers}", workers=workers)
        for suffix in ("_text_document.bin", "_text_document.idx", ".origins.npy"):
            assert Path(f"{tmp_path}/w{workers}{suffix}").read_bytes() == Path(f"{tmp_path}/one{suffix}").read_bytes()
    assert origins(tmp_path / "one") == [(0, i + 1) for i in range(3000)]


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    documents = ["first", "zweites äöü", "third\nwith lines", ""]
    plain = jsonl(tmp_path / "a.jsonl", documents).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain[:40]) + gzip.compress(plain[40:]))  # two members
    inputs = ["a.jsonl", "b.jsonl.gz"]
    if importlib.util.find_spec("zstandard"):
        import zstandard

        (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain[:40]) + zstandard.compress(plain[40:]))
        inputs.append("c.jsonl.zst")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"other": [1, 2, 3, 4], "text": documents})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    (tmp_path / "e.parquet.gz").write_bytes(gzip.compress((tmp_path / "d.parquet").read_bytes()))
    inputs += ["d.parquet", "e.parquet.gz"]
    for name in inputs:
        for workers in (1, 2):
            output = tmp_path / f"{name}-{workers}"
            preprocess(tmp_path / name, output=output, workers=workers)
            assert texts(output) == ["first|", "zweites äöü|", "third\nwith lines|", ""]
            assert origins(output) == [(0, 1), (0, 2), (0, 3), (0, 4)]
            (source,) = load_sidecar(output).sources
            stored = (tmp_path / name).read_bytes()
            assert (source["sha256"], source["bytes"]) == (hashlib.sha256(stored).hexdigest(), len(stored))


def test_plain_text_by_file_and_by_line(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n  \nthree")
    (folder / "deep/a.txt.gz").write_bytes(gzip.compress(b"packed\n"))
    (folder / "ignored.md").write_text("no")
    preprocess(folder, output=tmp_path / "file")
    assert texts(tmp_path / "file") == ["one\r\ntwo\n\n  \nthree|", "packed\n|"]
    assert origins(tmp_path / "file") == [(0, 1), (1, 1)]
    preprocess(folder, output=tmp_path / "line", txt_documents="line")
    assert texts(tmp_path / "line") == ["one|", "two|", "three|", "packed|"]
    assert origins(tmp_path / "line") == [(0, 1), (0, 2), (0, 5), (1, 1)]


def test_several_keys(tmp_path: Path) -> None:
    rows = [{"title": "A", "body": "alpha"}, {"title": "", "body": "beta"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = preprocess(tmp_path / "x.jsonl", output=tmp_path / "x", json_key=("title", "body"))
    assert texts(tmp_path / "x_title_document") == ["A|", ""]
    assert texts(tmp_path / "x_body_document") == ["alpha|", "beta|"]
    assert [output["key"] for output in summary["outputs"]] == ["title", "body"]
    assert load_sidecar(tmp_path / "x_body_document").documents == 2


def test_sentences(tmp_path: Path) -> None:
    jsonl(tmp_path / "x.jsonl", ["One here. Two there! 三つ。四つ。", "", ["given", "as list. Not split."]])
    preprocess(tmp_path / "x.jsonl", output=tmp_path / "x", split_sentences=True)
    dataset = IndexedDataset(tmp_path / "x_text_sentence")
    known = load_tokenizer("bytes")
    assert [known.decode(dataset.sequence(i)) for i in range(dataset.num_sequences)] == [
        "One here.", "Two there!", "三つ。", "四つ。<|endoftext|>", "given", "as list. Not split.<|endoftext|>",
    ]  # fmt: skip
    assert dataset.document_index.tolist() == [0, 4, 4, 6]


def test_standard_input(tmp_path: Path) -> None:
    done = command(
        "preprocess", "-", "--tokenizer", "bytes", "-o", "x", "--workers", "2", "--format", "json",
        cwd=tmp_path, input='{"text": "from a pipe"}\n{"text": "two"}\n',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 2
    assert texts(tmp_path / "x") == ["from a pipe|", "two|"]
    done = command(
        "preprocess", "-", "--tokenizer", "bytes", "-o", "y", "--input-format", "txt", "--txt-documents", "line",
        cwd=tmp_path, input="a\nb\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert texts(tmp_path / "y") == ["a|", "b|"]


def test_sidecar(test_data: Path, tmp_path: Path) -> None:
    first, second = jsonl(tmp_path / "1.jsonl", ["a", "b"]), jsonl(tmp_path / "2.jsonl", ["c", ""])
    tokenizer = str(test_data / "tokenizers/gpt2")
    preprocess(first, second, output=tmp_path / "x", tokenizer=tokenizer)
    sidecar = load_sidecar(tmp_path / "x_text_document")
    assert sidecar is not None
    assert sidecar.tokenizer_fingerprint == load_tokenizer(tokenizer).fingerprint
    assert (sidecar.vocab_size, sidecar.eod_id, sidecar.documents) == (50257, 50256, 4)
    assert [source["documents"] for source in sidecar.sources] == [2, 2]
    assert [source["empty_documents"] for source in sidecar.sources] == [0, 1]
    assert sidecar.output(tmp_path / "x_text_document")["max_token_id"] == 50256
    assert sidecar.filters == [] and sidecar.bad_lines["count"] == 0
    assert origins(tmp_path / "x") == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert not (tmp_path / "x.partial").exists()


def test_same_command_again_does_nothing_another_one_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a"])
    arguments = ["preprocess", "a.jsonl", "--tokenizer", "bytes", "-o", "x", "--workers", "1"]
    assert command(*arguments, cwd=tmp_path).returncode == 0
    before = (tmp_path / "x_text_document.idx").stat().st_mtime_ns
    again = command(*arguments, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr
    assert (tmp_path / "x_text_document.idx").stat().st_mtime_ns == before
    jsonl(source, ["b"])
    refused = command(*arguments, cwd=tmp_path)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    assert texts(tmp_path / "x") == ["a|"]
    assert command(*arguments, "--overwrite", cwd=tmp_path).returncode == 0
    assert texts(tmp_path / "x") == ["b|"]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ["a"])
    done = command("preprocess", "a.jsonl", "--tokenizer", "bytes", "-o", "x", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "x_text_document" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_backend_that_differs_is_replaced(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fast backend whose ids differ somewhere must not leave a trace in the output."""
    pytest.importorskip("gigatoken")
    from mlm_cli.data import tokenizer_backends

    class Wrong(tokenizer_backends.GigatokenEncoder):
        def __init__(self, definition_json: str) -> None:
            super().__init__(definition_json)
            right = self._encode
            self._encode = lambda text: right(text.replace("  ", " "))

    tokenizer = str(test_data / "tokenizers/gpt2")
    source = jsonl(tmp_path / "a.jsonl", ["two  spaces", "plain"] * 500)
    preprocess(source, output=tmp_path / "right", tokenizer=tokenizer, backend="tokenizers")
    monkeypatch.setattr(tokenizer_backends, "GigatokenEncoder", Wrong)
    for workers in (1, 2):
        summary = preprocess(source, output=tmp_path / f"w{workers}", tokenizer=tokenizer, workers=workers)
        assert summary["backend"] == "tokenizers" and "differs" in summary["backend_reason"]
        for suffix in ("bin", "idx"):
            ours = (tmp_path / f"w{workers}_text_document.{suffix}").read_bytes()
            assert ours == (tmp_path / f"right_text_document.{suffix}").read_bytes()
    assert "using tokenizers" in capsys.readouterr().err


def test_memory_is_flat(tmp_path: Path) -> None:
    """120 MB of input, its packed form too, under 300 MB in the largest process."""
    line = json.dumps({"text": "some words of a document that goes on and on " * 40}).encode() + b"\n"
    with (tmp_path / "x.jsonl").open("wb") as out:
        for _ in range(120_000_000 // len(line)):
            out.write(line)
    with gzip.open(tmp_path / "y.jsonl.gz", "wb", compresslevel=1) as packed:
        packed.write((tmp_path / "x.jsonl").read_bytes())
    code = (
        "import sys, resource\n"
        "from tests.jobs.preprocess_runs import preprocess\n"
        "preprocess(sys.argv[1], output=sys.argv[2], workers=2)\n"
        "own = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024)\n"
    )
    for name in ("x.jsonl", "y.jsonl.gz"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"{name}.out")],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        assert int(done.stdout) < 300, name
        (tmp_path / f"{name}.out_text_document.bin").unlink()


def test_origins_file_opens_without_loading(tmp_path: Path) -> None:
    preprocess(jsonl(tmp_path / "a.jsonl", map(str, range(300))), output=tmp_path / "x")
    records = np.load(tmp_path / "x.origins.npy", mmap_mode="r")
    assert records.shape == (300,) and records.dtype.names == ("source", "line")
    assert records[299]["line"] == 300


def test_hub_data_set_without_a_network(tmp_path: Path) -> None:
    done = command("preprocess", "hf://nobody-here/nothing", "--tokenizer", "bytes", "-o", "x", cwd=tmp_path)
    assert done.returncode == 3 and "Hub data set `nobody-here/nothing`" in done.stderr
    assert list(tmp_path.iterdir()) == []
