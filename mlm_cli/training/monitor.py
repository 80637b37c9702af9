"""Where the numbers of training go: ``metrics.jsonl``, TensorBoard, and one line on the terminal."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlm_cli import log
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.save import Saved
from mlm_cli.training.metrics import Speed, peak_memory
from mlm_cli.training.status import Status

KEYS = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "tflops", "mfu", "mem", "data_time", "step_time")


class MetricsFile:
    """``metrics.jsonl``: one object a logged step; a resumed run first cuts what lies beyond its checkpoint."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        if path.exists():
            _cut_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def cut_after(self, step: int) -> None:
        self._file.close()
        _cut_after(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut_after(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """JSON has no NaN: unknown and not-a-number are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine:
    """One line rewritten in place on a terminal; elsewhere a plain line per record."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.live = sys.stderr.isatty() and not log.is_quiet() and log.is_talker()
        self._shown = 0.0

    def show(self, record: Mapping[str, Any], left: float | None, *, logged: bool) -> None:
        """``left``: seconds to the end. On a terminal at most ten times a second, elsewhere only logged steps."""
        if self.live:
            now = time.monotonic()
            if logged or now - self._shown > 0.1:
                self._shown = now
                sys.stderr.write("\r\x1b[K" + self.text(record, left)[: _columns() - 1])
                sys.stderr.flush()
        elif logged:
            log.info(self.text(record, left))

    def clear(self) -> None:
        """Before anything else is said, or at the end."""
        if self.live and self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def text(self, record: Mapping[str, Any], left: float | None) -> str:
        loss = "skipped" if record.get("loss") is None else f"loss {record['loss']:.4f}"
        parts = [f"step {record['step']:,}/{self.steps:,}", loss]
        if record.get("valid_loss") is not None:
            parts.append(f"valid {record['valid_loss']:.4f}")
        parts += [f"{key} {value:.4f}" for key, value in record.items() if key.startswith("dev_")]
        parts.append(f"lr {record['lr']:.2e}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {record['mfu']:.0%}")
        parts.append(f"{record['mem'] / 1e9:.2f} GB")
        if left is not None:
            parts.append(f"{_duration(left)} left")
        return " · ".join(parts)


class Monitor:
    """Times steps and writes records. Only rank 0 writes; the others time for nobody.

    Args:
        steps: of the whole run.
        every: steps between records; steps with an evaluation, and the last, are always recorded.
        flops_per_token: of the model; None when unknown.
        peak_flops: matrix rate of all ranks together.
        resumed_step: records beyond it are cut.
    """

    def __init__(
        self,
        run: RunFolder,
        status: Status,
        *,
        steps: int,
        every: int = 10,
        device: torch.device | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        tensorboard: bool = False,
        resumed_step: int = 0,
        writes: bool = True,
    ) -> None:
        self.status, self.steps, self.every = status, steps, every
        self.device = device or torch.device("cpu")
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.writes = writes
        self.line = ProgressLine(steps)
        self._file = MetricsFile(run.metrics, resumed_step) if writes else None
        self._board = _open_tensorboard(run.path / "tensorboard", resumed_step) if writes and tensorboard else None
        self._speed, self._warm = Speed(), False
        self._pace: float | None = None  # smoothed seconds per step
        self._notes: dict[str, float] = {}  # for the next record
        self._step_began = self._data_seconds = 0.0

    def begin_step(self) -> None:
        self._step_began = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._data_seconds = time.perf_counter() - begin

    def end_step(self, tokens: int) -> None:
        """The update is done; ``tokens``: of this step, all ranks together."""
        seconds = time.perf_counter() - self._step_began
        if self._warm:  # the first step pays for memory and threads
            self._speed.add(seconds, self._data_seconds, tokens)
            self._pace = seconds if self._pace is None else 0.9 * self._pace + 0.1 * seconds
        self._warm = True

    def due(self, step: int) -> bool:
        """True where a step is written down whatever it brought; equal on all ranks."""
        return step % self.every == 0 or step == self.steps

    def record(self, step: int, values: Mapping[str, Any], *, force: bool = False) -> None:
        """Show the step, and write it down if it is due.

        Args:
            values: ``loss grad_norm lr tokens`` (all tokens so far) and whatever evaluation gave.
            force: write it whatever ``every`` says.
        """
        if not self.writes:
            return
        logged = force or self.due(step)
        mem = peak_memory(self.device) if logged or self.line.live else 0
        known = {
            "step": step,
            "mem": mem,
            **values,
            **(self._notes if logged else {}),
            **self._speed.values(self.flops_per_token, self.peak_flops),
        }
        record = {key: known.get(key) for key in KEYS} | known
        left = None if self._pace is None else self._pace * (self.steps - step)
        self.line.show(record, left, logged=logged)
        if not logged:
            return
        assert self._file is not None
        self._file.write(record)
        self._notes = {}
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, step)
        self.status.update("running", step=step, loss=_plain(record.get("loss")))
        self._speed = Speed()

    def went_back(self, step: int) -> None:
        """Training goes on from an earlier step: later records are no longer the run's."""
        if self._file is not None:
            self.line.clear()
            self._file.cut_after(step)
        self._speed, self._warm = Speed(), False

    def saved(self, saved: Saved | None) -> None:
        """A checkpoint is complete; the next record tells how long training waited for it, and how long it took."""
        if self.writes and saved is not None:
            self.line.clear()
            log.detail(f"{saved.folder.name} saved in {saved.seconds:.2f} s, {saved.blocked:.2f} s of them waited for")
            self._notes = {"checkpoint_blocked": saved.blocked, "checkpoint_seconds": saved.seconds}
            self.status.update("running", checkpoint=saved.folder.name)

    def close(self) -> None:
        self.line.clear()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _open_tensorboard(folder: Path, resumed_step: int) -> Any:
    """A writer, or None where the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 120


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
