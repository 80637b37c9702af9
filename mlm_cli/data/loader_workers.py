"""Worker processes that compute numbered results ahead of time, in order, and never leave the reader waiting.

``torch.utils.data`` reports a killed worker from a signal handler, in the middle of whatever the main thread does, and
starts workers by forking a process with threads. Here workers are fresh interpreters without torch, each with its own
pipe: worker w computes results w, w + W, w + 2W ... and is held back by its pipe when a few micro-batches ahead.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from mlm_cli.errors import MlmError, RankLostError


def _serve(compute: Callable[[int], Any], first: int, step: int, pipe: Connection) -> None:
    """Body of a worker: send results until the reader closes its end."""
    # A job's signals reach every process of it; only the rank itself may decide to stop, after saving.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    number = first
    try:
        while True:
            try:
                answer = (True, compute(number))
            except Exception as error:
                pipe.send((False, _portable(error)))
                return
            pipe.send(answer)
            number += step
    except (BrokenPipeError, ConnectionResetError):
        return


def _portable(error: Exception) -> tuple[type[MlmError] | None, str, str | None]:
    """An exception as plain values: not every exception survives pickling."""
    if isinstance(error, MlmError):
        return type(error), error.message, error.hint
    return None, f"{type(error).__name__}: {error}", None


class WorkerPool:
    """``num_workers`` processes computing ``compute(0), compute(1), ...``; results are taken in that order.

    Args:
        compute: picklable function of the number of a result.
        num_workers: processes, at least 1.
    """

    def __init__(self, compute: Callable[[int], Any], num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers = []
        self._pipes = []
        # Daemonic processes are ended by a signal that ours ignore; this runs before that and kills them.
        atexit.register(self.close)
        try:
            for number in range(num_workers):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_serve, args=(compute, number, num_workers, writer), daemon=True, name=f"loader-{number}"
                )
                process.start()
                writer.close()  # so that the worker's death ends the pipe
                self._workers.append(process)
                self._pipes.append(reader)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int | None]:
        return [worker.pid for worker in self._workers]

    def result(self, number: int) -> Any:
        """Result ``number``; call with 0, 1, 2 ... in order.

        Raises:
            RankLostError: the worker that should send it is gone.
            MlmError: what ``compute`` raised.
        """
        place = number % len(self._workers)
        pipe, worker = self._pipes[place], self._workers[place]
        wait([pipe, worker.sentinel])
        try:
            good, answer = pipe.recv() if pipe.poll() else _gone(worker)
        except (EOFError, OSError):
            _gone(worker)
        if good:
            return answer
        kind, message, hint = answer
        if kind is None:
            raise RuntimeError(f"loader worker {place}: {message}")
        raise kind(message, hint=hint)

    def close(self) -> None:
        """End all workers. May be called again."""
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        self._workers, self._pipes = [], []


def _gone(worker: Any) -> Any:
    worker.join(timeout=5)
    code = worker.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    raise RankLostError(
        f"loader process {worker.name} (pid {worker.pid}) ended ({how})",
        hint="often the machine ran out of memory: lower data.num_workers; the run resumes from its last checkpoint",
    )
