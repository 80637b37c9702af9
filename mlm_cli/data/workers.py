"""Encoding in several processes, results in order.

The parent gives each worker small tasks (where to read, never text) and keeps two at each, so that no worker waits for
the parent. A worker that dies ends the run with one error; workers end by themselves when the parent is gone.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from mlm_cli import errors
from mlm_cli.data.encode import EncodeSettings, SegmentResult, encode_segment
from mlm_cli.data.segment import Segment
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.data.tokenizer_backends import BACKENDS, Choice, choose_encoder, disagreement
from mlm_cli.errors import MlmError, RankLostError, ResourceError

Task = list[Segment]
_AHEAD = 2  # tasks given to a worker before it has answered the first
_VERIFY = -1  # number of the task that proves the fast encoder


class BackendDisagreesError(Exception):
    """The fast encoder gives other ids than the reference: what it encoded must be thrown away."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    tasks: list[int]


class EncoderPool:
    """Runs tasks on ``workers`` processes (none of them for 1: the work is then done here).

    Use as a context manager: leaving it ends the workers, at once if an error is on its way.
    """

    def __init__(self, tokenizer: Tokenizer, choice: Choice, settings: EncodeSettings, workers: int) -> None:
        self.tokenizer, self.choice, self.settings, self.num_workers = tokenizer, choice, settings, workers
        self._workers: list[_Worker] = []
        self._results: dict[int, Any] = {}
        self._given: dict[int, Task] = {}
        self.proven = choice.proven

    def __enter__(self) -> EncoderPool:
        if self.num_workers > 1:
            gc.freeze()  # or each worker's collector would walk, and so copy, the whole vocabulary
            # fork shares the loaded tokenizer at once; elsewhere a worker loads its own
            context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            for _ in range(self.num_workers):
                ours, theirs = context.Pipe()
                others = [worker.pipe for worker in self._workers] + [ours]
                inherited = others if context.get_start_method() == "fork" else []
                choice = self.choice if context.get_start_method() == "fork" else self.choice.encoder.name
                process = context.Process(
                    target=_serve, args=(theirs, inherited, self.tokenizer, choice, self.settings), daemon=True
                )
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, []))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for worker in self._workers:
            if kind is not None:
                worker.process.terminate()
            worker.pipe.close()  # a worker without work ends when its pipe does
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def run(self, tasks: Iterator[Task], sample: Sequence[str] = ()) -> Iterator[tuple[Task, list[SegmentResult]]]:
        """Yield each task with its results, in the order of ``tasks``.

        Args:
            sample: texts of this input on which an unproven encoder is compared with the reference, beside the built-in
                sample; this happens in parallel with the first tasks.

        Raises:
            BackendDisagreesError: at any time before the last result is yielded.
            RankLostError: a worker died.
        """
        if not self._workers:
            yield from self._run_here(tasks, sample)
            return
        if not self.proven:
            self._give(self._workers[0], _VERIFY, list(sample))
        asked = answered = 0
        exhausted = False
        while True:
            while not exhausted and asked - answered < self.num_workers * (_AHEAD + 2):
                worker = min(self._workers, key=lambda worker: len(worker.tasks))
                if len(worker.tasks) >= _AHEAD:
                    break
                task = next(tasks, None)
                if task is None:
                    exhausted = True
                    break
                self._given[asked] = task
                self._give(worker, asked, task)
                asked += 1
            if answered in self._results:
                yield self._given.pop(answered), self._results.pop(answered)
                answered += 1
            elif exhausted and answered == asked and self.proven:
                return
            else:
                self._receive()

    def _run_here(self, tasks: Iterator[Task], sample: Sequence[str]) -> Iterator[tuple[Task, list[SegmentResult]]]:
        if not self.proven:
            self._judge(disagreement(self.choice.encoder, self.tokenizer, sample))
        for task in tasks:
            yield task, [encode_segment(segment, self.settings, self.choice.encoder) for segment in task]

    def _judge(self, difference: str | None) -> None:
        if difference is not None:
            raise BackendDisagreesError(difference)
        self.proven = True

    def _give(self, worker: _Worker, number: int, task: Any) -> None:
        worker.tasks.append(number)
        try:
            worker.pipe.send((number, task))
        except OSError:
            self._lost(worker)

    def _receive(self) -> None:
        busy = [worker for worker in self._workers if worker.tasks]
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe not in ready:
                continue
            try:
                number, problem, answer = worker.pipe.recv()
            except (EOFError, OSError):
                self._lost(worker)
            worker.tasks.remove(number)
            if problem is not None:
                _raise(problem)
            if number == _VERIFY:
                self._judge(answer)
            else:
                self._results[number] = answer

    def _lost(self, worker: _Worker) -> None:
        worker.process.join(timeout=5)
        code = worker.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        where = ""
        task = self._given.get(worker.tasks[0], []) if worker.tasks else []
        if task:
            where = f" while reading `{task[0].path}` from byte {task[0].start:,}"
        hint = "give the same command again: it goes on where it stopped"
        if code == -signal.SIGKILL:
            hint = f"out of memory? Try fewer --workers; {hint}"
        raise RankLostError(f"worker process {worker.process.pid} {how}{where}", hint=hint)


def _raise(problem: tuple[str, str, str | None]) -> None:
    kind, message, hint = problem
    error = getattr(errors, kind, None)
    if isinstance(error, type) and issubclass(error, MlmError):
        raise error(message, hint=hint)
    raise RuntimeError(f"a worker failed:\n{message}")


def _serve(
    pipe: Connection, inherited: list[Connection], tokenizer: Tokenizer, choice: Choice | str, settings: EncodeSettings
) -> None:
    """Body of a worker: tasks in, results out, until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()  # or our siblings would not notice the parent's end
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if isinstance(choice, str):
        choice = choose_encoder(tokenizer, choice if choice in BACKENDS else "auto")
    encoder = choice.encoder
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, task = pipe.recv()
            answer: Any = None
            problem = None
            try:
                if number == _VERIFY:
                    answer = disagreement(encoder, tokenizer, task)
                else:
                    answer = [encode_segment(segment, settings, encoder) for segment in task]
            except MlmError as error:
                problem = (type(error).__name__, error.message, error.hint)
            except MemoryError:
                problem = (ResourceError.__name__, "a worker ran out of memory", "try fewer --workers")
            except Exception:
                problem = ("", traceback.format_exc(), None)
            pipe.send((number, problem, answer))
