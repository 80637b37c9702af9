"""Tasks of lm-evaluation-harness (Gao et al. 2024, ``pip install lm-eval``), answered by our models at any layout.

Rank 0 runs the harness; the other ranks do what it asks of the model, and need no task's files.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.data.special_tokens import Frame
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import DataError, MlmError, UsageError
from mlm_cli.evaluation.likelihood import Row, encode_rows, score_rows
from mlm_cli.evaluation.results import TaskResult
from mlm_cli.evaluation.written_texts import answer_prompts
from mlm_cli.generation.answer import EncodedPrompt, Settings
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.models.gpt import GPT

_SAMPLING = {"temperature", "top_k", "top_p", "do_sample"}
_PATIENCE = timedelta(days=7)
_END = None  # what the other ranks are told when nothing more will be asked


class Served:
    """A model of all ranks, asked by rank 0.

    Args:
        length: tokens of context.
        end_ids: ids that end a text.
        on_done: told (rows or texts done, in all) of this rank.

    Attributes:
        failed: what was asked of the model ended in an error.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        length: int,
        batch_size: int,
        end_ids: frozenset[int],
        on_done: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self.tokenizer, self.length, self.failed = tokenizer, length, False
        self._model, self._batch_size, self._end_ids, self._on_done = model, batch_size, end_ids, on_done
        # Rank 0 may download and prepare for hours before it asks for anything.
        many = agree.world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if many else None

    def score(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """Called by rank 0: log-likelihood of each row, and whether it is what greedy decoding writes."""
        return self._all(("score", rows))

    def write(self, prompts: list[EncodedPrompt]) -> list[str]:
        """Called by rank 0: what the model writes behind each prompt, which brings its settings."""
        return self._all(("write", prompts))

    def close(self) -> None:
        """Called by rank 0: let the others go."""
        self._announce(_END)

    def follow(self) -> None:
        """What any other rank does until rank 0 closes. An error of a call is rank 0's to tell: all ranks have it."""
        while (asked := self._announce(_END)) is not _END:
            with suppress(MlmError):
                self._do(asked)

    def _all(self, asked: Any) -> Any:
        return self._do(self._announce(asked)) if asked[1] else []

    def _announce(self, asked: Any) -> Any:
        if self._group is None:
            return asked
        message = [asked]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def _do(self, asked: tuple[str, Any]) -> Any:
        try:
            return self._answer(*asked)
        except Exception:
            self.failed = True
            raise

    def _answer(self, kind: str, given: Any) -> Any:
        if kind == "score":
            found = score_rows(
                self._model,
                given,
                length=self.length,
                batch_size=self._batch_size,
                on_row=self._on_done,
            )
            return [(one.total, one.greedy) for one in found]
        end = self._end_ids
        prompts = [replace(prompt, settings=replace(prompt.settings, end_ids=end)) for prompt in given]
        answers = answer_prompts(
            self._model,
            self.tokenizer,
            prompts,
            Settings(Sampling(temperature=0.0)),
            batch_size=self._batch_size,
            max_length=self.length,
            on_text=self._on_done,
        )
        return [answers[number] for number in range(len(prompts))]


class HarnessModel(TemplateLM):
    """The harness's view of a model."""

    def __init__(self, served: Served, seed: int) -> None:
        super().__init__()
        self._served, self._seed, self._frame = served, seed, Frame(served.tokenizer)
        self._asked = 0  # texts written so far: each has a number of its own, and so its own random numbers

    @property
    def eot_token_id(self) -> int:
        beginning = self._frame.around([])
        if not beginning:
            raise DataError(f"tokenizer `{self._served.tokenizer.spec}` has no token to begin a text with")
        return beginning[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self._served.tokenizer.spec)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self._served.tokenizer.encode(string)
        return ids if add_special_tokens is False else [*self._frame.begin, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [tuple(request.args) for request in requests]
        rows = encode_rows(self._served.tokenizer, pairs, [f"continuation {pair[1][:40]!r}" for pair in pairs])
        return self._kept("loglikelihood", requests, self._served.score(rows))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._served.score([Row((*context, *rest), len(context)) for _, context, rest in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        rows, owners = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, self._served.length, 1
            )
            for context, rest in map(make_disjoint_window, windows):
                rows.append(Row((*context, *rest), len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._served.score(rows), strict=True):
            totals[owner] += score
        return self._kept("loglikelihood_rolling", requests, totals)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self._prompt(*request.args) for request in requests]
        return self._kept("generate_until", requests, self._served.write(prompts))

    def _prompt(self, context: str, given: Mapping[str, Any]) -> EncodedPrompt:
        kwargs = normalize_gen_kwargs(dict(given))
        stops, most = kwargs.pop("until", []), kwargs.pop("max_gen_toks")
        unknown = kwargs.keys() - _SAMPLING
        if unknown:
            raise UsageError(
                f"the task asks for generation with {', '.join(sorted(unknown))}, which is not known here",
                hint=f"known are until, max_gen_toks, {', '.join(sorted(_SAMPLING))}",
            )
        sampling = Sampling(
            kwargs["temperature"] if kwargs.get("do_sample") else 0.0,
            kwargs.get("top_k", 0),
            kwargs.get("top_p", 1.0),
            seed=self._seed,
        )
        room = self._served.length - most
        if room < 1:
            raise UsageError(f"the task's answers of {most} tokens leave no room in a context of {self._served.length}")
        tokens = self._frame.around(self._served.tokenizer.encode(context))[-room:]
        number, self._asked = self._asked, self._asked + 1
        settings = Settings(sampling, most, tuple(stop for stop in stops if stop))
        return EncodedPrompt(Prompt(number, context, number, f"request {number}"), tokens, settings)

    def _kept(self, name: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(name, request.args, answer)
        return answers


def run_harness(
    served: Served,
    names: Sequence[str],
    *,
    folders: Sequence[str],
    num_fewshot: int | None,
    limit: int | None,
    seed: int,
) -> tuple[list[TaskResult], dict[str, str]]:
    """The harness's results of tasks and groups, and by file name every sample as JSON lines. All ranks call.

    Args:
        folders: further tasks (YAML), which win over the harness's own of the same name.
        num_fewshot: examples before each question; None: as the task has it.
        limit: only so many documents a task.
        seed: of the examples that are drawn, and of sampled answers.

    Raises:
        UsageError: an unknown task, or one that asks for what we have not.
        DataError: a task whose data cannot be had.
    """

    def lead() -> tuple[list[TaskResult], dict[str, str]]:
        try:
            # What the harness prints is talk.
            with _harness_errors(served, names), _talk():
                manager = find_tasks(tuple(names), tuple(folders))
                found = simple_evaluate(
                    model=HarnessModel(served, seed),
                    tasks=list(names),
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=manager,
                    fewshot_random_seed=seed,
                    random_seed=seed,
                    numpy_random_seed=seed % 2**32,
                    torch_random_seed=seed,
                    bootstrap_iters=1000,
                )
            assert found is not None
            return list(_results(found)), dict(_samples(found))
        finally:
            served.close()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if agree.rank() != 0:
        served.follow()
    return agree.on_rank_zero(lead)


@contextmanager
def _talk() -> Iterator[None]:
    """What the harness prints is talk: on stderr, or nowhere with ``--quiet``."""
    evaluator.get_git_commit_hash = lambda: None  # it asks git in whatever folder this is, and git complains
    with ExitStack() as stack:
        if log.is_quiet():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


@lru_cache(1)
def find_tasks(names: tuple[str, ...], folders: tuple[str, ...]) -> TaskManager:
    """What knows the tasks; the harness's own, thousands of files, are looked at only where they are asked for.

    Raises:
        UsageError: no such task, no such folder.
    """
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise UsageError(f"{missing[0]} is no folder", hint="--data is for folders of further tasks (YAML)")
    if folders:
        manager = TaskManager(include_path=list(folders), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=list(folders) or None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UsageError(
                f"lm-evaluation-harness has no task `{name}`",
                hint=f"did you mean `{near[0]}`?" if near else "`lm_eval ls tasks` lists them",
            )
    return manager


@contextmanager
def _harness_errors(served: Served, names: Sequence[str]) -> Iterator[None]:
    """What goes wrong in a task (its data, its templates, its own code) is an error of data; in the model, as it is."""
    try:
        yield
    except MlmError:
        raise
    except Exception as error:
        if served.failed:
            raise
        asked, few = ", ".join(names), "Sample larger than population" in str(error)
        raise DataError(
            f"lm-evaluation-harness cannot run {asked}: {type(error).__name__}: {error}",
            hint="evaluate.num_fewshot asks for more examples than there are" if few else None,
        ) from error


def _results(found: Mapping[str, Any]) -> Iterator[TaskResult]:
    for name, entry in found["results"].items():
        values = {key: value for key, value in entry.items() if "," in key and isinstance(value, float | int)}
        metrics = {key: float(value) for key, value in values.items() if "_stderr," not in key}
        counts, members = found.get("n-samples", {}), found.get("group_subtasks", {}).get(name, [])
        counted = [counts[one] for one in _leaves(found, name) if one in counts]
        yield TaskResult(
            name=name,
            metrics={key.removesuffix(",none"): value for key, value in metrics.items()},
            stderr={
                key.removesuffix(",none"): values.get(key.replace(",", "_stderr,"))
                for key in metrics
            },
            higher_is_better=_better(found, name, metrics),
            config={"harness": "lm-eval", **_plain(found.get("configs", {}).get(name, {}))},
            version=found.get("versions", {}).get(name, 0),
            num_samples=sum(count["effective"] for count in counted),
            num_original=sum(count["original"] for count in counted),
            members=tuple(members),
            num_fewshot=found.get("n-shot", {}).get(name, 0),
        )  # fmt: skip


def _leaves(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group, of its groups, and so on; of a task, itself."""
    members = found.get("group_subtasks", {}).get(name, [])
    return [leaf for member in members for leaf in _leaves(found, member)] or [name]


def _better(found: Mapping[str, Any], name: str, metrics: Mapping[str, float]) -> dict[str, bool]:
    known = found.get("higher_is_better", {}).get(name) or {}
    return {key.removesuffix(",none"): bool(known.get(key.partition(",")[0], True)) for key in metrics}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's settings JSON can say; functions by their name."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=lambda value: getattr(value, "__name__", str(value))))
    return plain


def _samples(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, samples in found.get("samples", {}).items():
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        yield f"samples_{name.replace('/', '__')}.jsonl", "".join(lines)
