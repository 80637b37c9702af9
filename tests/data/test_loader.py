"""The loader: same samples for every number of data ranks and workers, quick resume, clean ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import MemoryTokens

from mlm_cli.data.indexed import IndexedDataset, IndexedWriter
from mlm_cli.data.loader import batches
from mlm_cli.data.loader_workers import WorkerPool
from mlm_cli.data.packed import GPTSamples, SampleSource, restarted_positions
from mlm_cli.errors import DataError, RankLostError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SampleSource:
    """Two blended sets; about 60 samples of 16 tokens an epoch."""
    parts = []
    for number in range(2):
        rng = np.random.default_rng(number)
        prefix = tmp_path_factory.mktemp("loader") / f"part{number}"
        writer = IndexedWriter(prefix, np.uint16)
        for length in rng.integers(1, 50, 20):
            writer.add_sequence(rng.integers(0, 1000, length))
            writer.end_document()
        writer.finish()
        parts.append(GPTSamples(IndexedDataset(prefix), seq_length=16, seed=9, stream=number, mask_documents=True))
    return SampleSource(parts, [1, 2])


def steps(source: SampleSource, *, data_size: int, num_workers: int, start_step: int = 0, num: int = 6) -> list[dict]:
    """Global batches of 8 samples, put together from the micro-batches of 2 of all data ranks."""
    per_step = 8 // (2 * data_size)
    streams = [
        list(
            batches(
                source,
                start_sample=8 * start_step,
                micro_batch_size=2,
                data_rank=rank,
                data_size=data_size,
                num_workers=num_workers,
                num_batches=num * per_step,
            )
        )
        for rank in range(data_size)
    ]
    found = []
    for step in range(num):
        micro = [streams[rank][step * per_step + m] for m in range(per_step) for rank in range(data_size)]
        found.append({name: torch.cat([batch[name] for batch in micro]) for name in micro[0]})
    return found


@pytest.mark.parametrize(("data_size", "num_workers"), [(1, 2), (1, 4), (2, 0), (2, 2), (4, 0), (4, 4)])
def test_same_batches_for_any_ranks_and_workers(source: SampleSource, data_size: int, num_workers: int) -> None:
    expected = steps(source, data_size=1, num_workers=0)
    found = steps(source, data_size=data_size, num_workers=num_workers)
    for step, (one, other) in enumerate(zip(expected, found)):
        assert one["sample_ids"].tolist() == list(range(8 * step, 8 * step + 8))
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), (step, name)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_at_any_step(source: SampleSource, num_workers: int) -> None:
    straight = steps(source, data_size=2, num_workers=0)
    resumed = steps(source, data_size=2, num_workers=num_workers, start_step=4, num=2)
    for one, other in zip(straight[4:], resumed):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batch_is_what_the_samples_say(source: SampleSource) -> None:
    batch = next(batches(source, start_sample=40, micro_batch_size=4, data_rank=1, data_size=2))
    assert batch["sample_ids"].tolist() == [44, 45, 46, 47]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64 and batch["segments"].dtype == torch.int32
    for row, number in enumerate(range(44, 48)):
        sample = source.get(number)
        assert np.array_equal(batch["tokens"][row], sample["tokens"][:-1])
        assert np.array_equal(batch["labels"][row], sample["tokens"][1:])
        assert np.array_equal(batch["segments"][row], sample["segments"])


def test_positions_restart_with_each_document() -> None:
    segments = np.array([[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]], dtype=np.int32)
    assert restarted_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


def test_no_segments_without_masking() -> None:
    samples = GPTSamples(MemoryTokens([list(range(100))]), seq_length=8, seed=0)
    batch = next(batches(SampleSource([samples]), micro_batch_size=2))
    assert set(batch) == {"tokens", "labels", "sample_ids"}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def number_of(number: int) -> int:
    return number


def fails_at_three(number: int) -> int:
    if number == 3:
        raise DataError("the third is bad", hint="mend it")
    return number


def test_results_come_in_order_and_ahead() -> None:
    pool = WorkerPool(number_of, 3)
    assert [pool.result(number) for number in range(50)] == list(range(50))
    pids = pool.pids
    pool.close()
    pool.close()
    assert not any(alive(pid) for pid in pids if pid)


def test_killed_worker_is_an_error_not_a_hang() -> None:
    pool = WorkerPool(number_of, 2)
    assert [pool.result(0), pool.result(1)] == [0, 1]
    os.kill(pool.pids[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RankLostError, match=r"loader-1 .*killed by SIGKILL"):
        for number in range(2, 10**6):
            pool.result(number)
    assert time.monotonic() - begin < 5
    pool.close()


def test_error_in_a_worker_arrives_with_its_kind_and_hint() -> None:
    pool = WorkerPool(fails_at_three, 2)
    assert [pool.result(number) for number in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="the third is bad") as caught:
        pool.result(3)
    assert caught.value.hint == "mend it"
    pool.close()


def test_signals_of_the_job_do_not_end_workers() -> None:
    pool = WorkerPool(number_of, 1)
    assert pool.result(0) == 0
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(pool.pids[0], name)
    assert [pool.result(number) for number in range(1, 2000)] == list(range(1, 2000))
    pool.close()


def test_dropping_the_iterator_ends_its_workers(source: SampleSource) -> None:
    stream = batches(source, micro_batch_size=2, num_workers=2)
    next(stream)
    pids = [worker.pid for worker in stream.gi_frame.f_locals["pool"]._workers]
    assert all(alive(pid) for pid in pids)
    del stream
    gc.collect()
    assert not any(alive(pid) for pid in pids)


SCRIPT = """
import os, signal, sys
from mlm_cli.data.loader_workers import WorkerPool
from operator import neg
if __name__ == "__main__":
    pool = WorkerPool(neg, 2)
    assert [pool.result(0), pool.result(1)] == [0, -1]
    print(*pool.pids, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_workers_end_with_the_process(tmp_path: Path, how: str) -> None:
    """Also when it forgets them at exit, and when it is killed and can clean up nothing."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script), how], capture_output=True, text=True, timeout=30, env=environment
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    assert done.returncode == (0 if how == "exit" else -signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_workers_do_not_import_torch() -> None:
    code = "import mlm_cli.data.loader, mlm_cli.data.packed, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}).returncode == 0
