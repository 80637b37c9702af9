"""Metrics: one line a step whatever happened, null for the unknown, rates that are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.training.metrics import Speed, measure_matrix_rate, peak_memory
from mlm_cli.training.monitor import KEYS, Monitor, ProgressLine
from mlm_cli.training.status import Status


def make_monitor(folder: Path, **options: Any) -> Monitor:
    run = RunFolder(folder)
    return Monitor(run, Status(run, steps=100), steps=100, **options)


def values(step: int) -> dict[str, float]:
    return {"loss": 1.0 / step, "grad_norm": 0.5, "lr": 1e-3, "tokens": 64 * step}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, every=1)
    for step in range(1, 8):
        monitor.record(step, values(step))
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # torn by a kill
    again = make_monitor(tmp_path, every=1, resumed_step=5)
    again.record(6, values(6))
    again.close()
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_records_what_is_due_and_what_is_forced(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, every=10)
    for step in range(1, 101):
        monitor.record(step, values(step), force=step == 15)
    monitor.close()
    assert [record["step"] for record in read(tmp_path)] == [10, 15, *range(20, 101, 10)]


def test_unknown_is_null_and_all_keys_are_there(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, every=1)
    monitor.record(1, {**values(1), "grad_norm": math.nan})
    monitor.close()
    (record,) = read(tmp_path)
    assert set(KEYS) <= record.keys()
    assert record["grad_norm"] is record["mfu"] is record["tokens_per_s"] is None
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path / "none", writes=False, every=1)
    monitor.begin_step()
    monitor.end_step(5)
    monitor.record(1, values(1))
    monitor.close()
    assert not (tmp_path / "none").exists()


def test_rates() -> None:
    speed = Speed()
    assert speed.values(1.0, 1.0)["tokens_per_s"] is None
    speed.add(2.0, 0.5, 1000)
    speed.add(2.0, 0.3, 1000)
    known = speed.values(flops_per_token=3e9, peak_flops=6e12)
    assert known["tokens_per_s"] == 500 and known["tflops"] == 1.5 and known["mfu"] == 0.25
    assert known["step_time"] == 2.0 and known["data_time"] == pytest.approx(0.4)
    assert speed.values(None, 1.0)["mfu"] is None


def test_the_progress_line_names_what_the_user_waits_for() -> None:
    record = {"step": 20, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 12345.6, "mfu": 0.456, "mem": 2.5e9}
    line = ProgressLine(1000).text({**record, "valid_loss": 3.0}, 3725)
    begin, rest = "step 20/1,000 · loss 2.5000 · valid 3.0000 · lr 1.00e-03", "MFU 46% · 2.50 GB · 1:02:05 left"
    assert line == f"{begin} · 12,346 tokens/s · {rest}"


def test_the_matrix_rate_is_measured_quickly_without_random_numbers() -> None:
    before = torch.get_rng_state()
    assert 1e9 < measure_matrix_rate(torch.float32, seconds=0.02, size=256) < 1e14
    assert torch.equal(before, torch.get_rng_state())
    assert 1e7 < peak_memory(torch.device("cpu")) < 1e12


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = make_monitor(tmp_path, every=1, tensorboard=True)
    for step in (1, 2):
        monitor.record(step, values(step))
    monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
