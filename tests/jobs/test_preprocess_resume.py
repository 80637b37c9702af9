"""Runs that end early: killed, interrupted, without disk or without a worker. The same command finishes them."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlm_cli.data import partial as partial_run
from mlm_cli.data.partial import PartialRun, finish_publishing
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.errors import DataError, RankLostError, ResourceError, UsageError
from mlm_cli.jobs import preprocess as job
from tests.jobs.preprocess_runs import ROOT, command, jsonl, preprocess, texts

CODE = """
import sys
from mlm_cli.cli.failures import exit_code_of
from tests.jobs.preprocess_runs import preprocess
try:
    preprocess(*sys.argv[4:], output=sys.argv[1], workers=int(sys.argv[2]), tokenizer=sys.argv[3], backend="tokenizers",
               journal_seconds=0.0)
except BaseException as error:
    sys.exit(exit_code_of(error, []))
"""
FILES = ("_text_document.bin", "_text_document.idx", ".origins.npy")


@pytest.fixture(scope="module")
def inputs(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Some 4 MB in three files, one of them packed: a few seconds for the slow backend."""
    folder = tmp_path_factory.mktemp("inputs")
    text = (test_data / "corpora/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    scenes = text.split("\n\n")
    packed = folder / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl(folder / "b.jsonl", scenes).read_bytes()))
    return [jsonl(folder / "a.jsonl", scenes), packed, jsonl(folder / "c.jsonl", reversed(scenes))]


@pytest.fixture(scope="module")
def tokenizer(test_data: Path) -> str:
    return str(test_data / "tokenizers/gpt2")


@pytest.fixture(scope="module")
def straight(inputs: list[Path], tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("straight") / "x"
    preprocess(*inputs, output=prefix, tokenizer=tokenizer, workers=2)
    return prefix


def begin(prefix: Path, tokenizer: str, inputs: list[Path], workers: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(prefix), str(workers), tokenizer, *map(str, inputs)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)


def journaled(prefix: Path) -> Callable[[], bool]:
    return lambda: Path(f"{prefix}.partial/journal.jsonl").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def assert_same(prefix: Path, straight: Path) -> None:
    for suffix in FILES:
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{straight}{suffix}").read_bytes(), suffix
    ours, theirs = load_sidecar(prefix), load_sidecar(straight)
    assert (ours.sources, ours.documents, ours.settings) == (theirs.sources, theirs.documents, theirs.settings)
    assert not Path(f"{prefix}.partial").exists()


def shown(prefix: Path) -> list[str]:
    return [path.name for path in prefix.parent.iterdir() if path.name.startswith(f"{prefix.name}_")]


@pytest.mark.parametrize(
    ("signal_number", "victim", "code"),
    [
        (signal.SIGKILL, "parent", -signal.SIGKILL),
        (signal.SIGTERM, "parent", -signal.SIGTERM),
        (signal.SIGINT, "parent", 130),
        (signal.SIGKILL, "worker", 6),
    ],
)
def test_killed_run_continues(
    tmp_path: Path, inputs: list[Path], tokenizer: str, straight: Path, signal_number: int, victim: str, code: int
) -> None:
    prefix = tmp_path / "x"
    run = begin(prefix, tokenizer, inputs)
    wait_for(journaled(prefix), run)
    workers = children(run.pid)
    assert len(workers) == 2
    os.kill(run.pid if victim == "parent" else workers[0], signal_number)
    _, talk = run.communicate(timeout=30)
    assert run.returncode == code, talk
    assert shown(prefix) == []
    deadline = time.monotonic() + 20
    while not all(map(gone, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(map(gone, workers))  # nobody goes on working for a run that is gone
    if victim == "worker":
        assert talk.count("error: ") == 1 and "was killed by signal 9" in talk and "Traceback" not in talk
    preprocess(*inputs, output=prefix, tokenizer=tokenizer, workers=2, backend="tokenizers")
    assert_same(prefix, straight)


def test_killed_again_and_again(tmp_path: Path, inputs: list[Path], tokenizer: str, straight: Path) -> None:
    prefix = tmp_path / "x"
    journal = Path(f"{prefix}.partial/journal.jsonl")
    for _ in range(3):
        run = begin(prefix, tokenizer, inputs, workers=1)
        before = journal.stat().st_size if journal.exists() else 0
        wait_for(lambda before=before: journal.exists() and journal.stat().st_size > before + 300, run)
        run.kill()
        run.communicate()
    preprocess(*inputs, output=prefix, tokenizer=tokenizer)
    assert_same(prefix, straight)


def test_output_in_use(tmp_path: Path, inputs: list[Path], tokenizer: str) -> None:
    prefix = tmp_path / "x"
    run = begin(prefix, tokenizer, inputs)
    wait_for(journaled(prefix), run)
    with pytest.raises(UsageError, match="in use by another run"):
        preprocess(*inputs, output=prefix, tokenizer=tokenizer)
    run.kill()
    run.communicate()


class Stop(Exception):
    pass


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, BaseException], None]]:
    """``stopped_after(n, error)``: the next run fails with ``error`` when it writes its n-th segment."""
    real = job.commit

    def arrange(count: int, error: BaseException) -> None:
        left = [count]

        def commit(*arguments: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error
            real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(job, "commit", commit)

    yield arrange


def many(path: Path, count: int = 4000) -> Path:
    return jsonl(path, (f"{i} " + "text " * (i % 60) for i in range(count)))


def test_other_settings_are_refused_and_other_input_starts_again(
    tmp_path: Path, stopped_after: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "a.jsonl")
    stopped_after(3, Stop())
    with pytest.raises(Stop):
        preprocess(source, output=tmp_path / "x", journal_seconds=0.0)
    assert Path(f"{tmp_path}/x.partial/journal.jsonl").exists()
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"other settings \(`append_eod`\)"):
        preprocess(source, output=tmp_path / "x", append_eod=False)
    jsonl(source, ["changed"])
    assert preprocess(source, output=tmp_path / "x")["continued"] is False
    assert texts(tmp_path / "x") == ["changed|"]


def test_what_was_done_before_a_bad_line_is_kept_for_skip(tmp_path: Path) -> None:
    source = many(tmp_path / "a.jsonl")
    with source.open("a") as out:
        out.write("{\n")
    with pytest.raises(DataError, match=r"a.jsonl:4001: malformed"):
        preprocess(source, output=tmp_path / "x", journal_seconds=0.0)
    summary = preprocess(source, output=tmp_path / "x", on_bad_line="skip")
    assert summary["continued"] and (summary["documents"], summary["skipped"]) == (4000, 1)
    preprocess(source, output=tmp_path / "y", on_bad_line="skip")
    for suffix in (*FILES, ".bad.jsonl"):
        assert Path(f"{tmp_path}/x{suffix}").read_bytes() == Path(f"{tmp_path}/y{suffix}").read_bytes()


def test_damaged_partial_folder_starts_again(
    tmp_path: Path, stopped_after: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "a.jsonl")
    stopped_after(3, Stop())
    with pytest.raises(Stop):
        preprocess(source, output=tmp_path / "x", journal_seconds=0.0)
    monkeypatch.undo()
    with (tmp_path / "x.partial/text_document.bin").open("r+b") as stream:
        stream.truncate(10)
    preprocess(source, output=tmp_path / "x")
    preprocess(source, output=tmp_path / "y")
    assert (tmp_path / "x_text_document.bin").read_bytes() == (tmp_path / "y_text_document.bin").read_bytes()


def test_disk_full(tmp_path: Path, tokenizer: str) -> None:
    """A real limit of the system on file sizes: writing the .bin fails half-way, as it does on a full disk."""
    source = many(tmp_path / "a.jsonl", 20000)
    preprocess(source, output=tmp_path / "y")
    limit = (tmp_path / "y_text_document.bin").stat().st_size // 2
    arguments = ["preprocess", "a.jsonl", "--tokenizer", "bytes", "-o", "x", "--workers", "2"]
    full = command(
        *arguments, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert full.returncode == 7 and "disk is full" in full.stderr and full.stderr.count("error: ") == 1
    assert shown(tmp_path / "x") == []
    assert command(*arguments, cwd=tmp_path).returncode == 0
    for suffix in FILES:
        assert Path(f"{tmp_path}/x{suffix}").read_bytes() == Path(f"{tmp_path}/y{suffix}").read_bytes()


def test_disk_full_keeps_what_was_done(
    tmp_path: Path, stopped_after: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = many(tmp_path / "a.jsonl")
    stopped_after(3, OSError(28, "No space left on device"))
    with pytest.raises(ResourceError, match="disk is full"):
        preprocess(source, output=tmp_path / "x", journal_seconds=0.0)
    monkeypatch.undo()
    assert preprocess(source, output=tmp_path / "x")["continued"] is True
    preprocess(source, output=tmp_path / "y")
    assert (tmp_path / "x_text_document.bin").read_bytes() == (tmp_path / "y_text_document.bin").read_bytes()


@pytest.mark.parametrize("moved", range(5))
def test_killed_while_putting_files_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    """Data first, index last; whatever was moved already, the next run completes it."""
    source = many(tmp_path / "a.jsonl", 50)
    preprocess(source, output=tmp_path / "y")
    real = partial_run._move

    def half(folder: Path, moves: list[tuple[str, str]]) -> None:
        real(folder, moves[:moved])
        os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(partial_run, "_move", half)
        preprocess(source, output=tmp_path / "x")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert moved == 4 or not (tmp_path / "x_text_document.idx").exists()
    preprocess(source, output=tmp_path / "x")
    for suffix in FILES:
        assert Path(f"{tmp_path}/x{suffix}").read_bytes() == Path(f"{tmp_path}/y{suffix}").read_bytes()
    assert not (tmp_path / "x.partial").exists()
    assert finish_publishing(str(tmp_path / "x")) is False


def test_lost_worker_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_cli.data import workers

    def dies(*_: object) -> None:
        os._exit(3)

    monkeypatch.setattr(workers, "encode_segment", dies)
    begun = time.monotonic()
    with pytest.raises(RankLostError, match=r"ended with code 3 while reading .*a\.jsonl"):
        preprocess(many(tmp_path / "a.jsonl"), output=tmp_path / "x", workers=2)
    assert time.monotonic() - begun < 10


def test_journal_cut_short_falls_back_to_its_last_whole_line(tmp_path: Path) -> None:
    settings = {"sources": []}
    run = PartialRun(str(tmp_path / "x"), {"text": "text_document"}, "uint16", settings)
    run.position.documents = 5
    run.mark()
    run.checkpoint()
    run.stop(keep=True)
    journal = tmp_path / "x.partial/journal.jsonl"
    journal.write_text(journal.read_text() + json.dumps({"source": 1})[:7])
    again = PartialRun(str(tmp_path / "x"), {"text": "text_document"}, "uint16", settings)
    assert again.continued and again.position.documents == 5
    again.remove()


def test_tables_and_hub_data_sets_continue(
    tmp_path: Path, stopped_after: Callable[[int, BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources whose position is a row, not a byte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mlm_cli.data import hub_text

    rows = [{"id": i, "text": f"row {i} " + "text " * (i % 300)} for i in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    monkeypatch.setattr(hub_text, "_rows", lambda path: iter(rows))
    wanted = [f"{row['text']}|" for row in rows]
    for number, source in enumerate((str(tmp_path / "a.parquet"), "hf://owner/name:train")):
        prefix = tmp_path / f"x{number}"
        stopped_after(1 if number else 4, Stop())
        with pytest.raises(Stop):
            preprocess(source, output=prefix, journal_seconds=0.0)
        stopped_after(10**9, Stop())
        summary = preprocess(source, output=prefix)
        assert summary["continued"] is True and summary["documents"] == 3000
        assert texts(prefix) == wanted
        straight = tmp_path / f"y{number}"
        preprocess(source, output=straight)
        for suffix in FILES:
            assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{straight}{suffix}").read_bytes()
        assert load_sidecar(prefix).sources == load_sidecar(straight).sources
