"""The body of ``mlm pretrain RUN --verify`` and ``--replay STEP``: nothing in the run folder is changed."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.load import Found, load_state
from mlm_cli.checkpoint.state import Position, describe_layout, is_layout
from mlm_cli.config.derived import Batch, batch_arithmetic
from mlm_cli.config.requests import ReplayRequest
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.data.tokenizer import Tokenizer, load_tokenizer
from mlm_cli.errors import CheckpointError, UsageError
from mlm_cli.jobs import pretrain
from mlm_cli.jobs.training_parts import build_schedule, joined, policy_of, watch_ranks
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.identity import check_same_run
from mlm_cli.training.loop import train
from mlm_cli.training.numerics import Numerics
from mlm_cli.training.precision import choose_dtype
from mlm_cli.training.replay import (
    Listed,
    Nowhere,
    Recorder,
    Report,
    differing_state,
    find_start,
    find_verified,
    first_difference,
    read_records,
    where_it_went_on,
)
from mlm_cli.training.stop import StopFlag


def run(recipe: Recipe, request: ReplayRequest) -> tuple[Report, bool]:
    """Take a step again on every rank of the job; returns what was found, and whether this rank tells it.

    Raises:
        UsageError: no such step, other data, or not the ranks that wrote the checkpoint (``--verify``).
        CheckpointError: the checkpoint to verify is damaged. One that cannot be reproduced is a report.
        NumericsError: the step is bad and the run's policy is to stop; layer, rank and samples are named.
    """
    with joined(recipe) as parallel, watch_ranks(recipe, parallel):
        return _replay(recipe, request, parallel), parallel.world.rank == 0


def check(report: Report) -> None:
    """Raise unless the replay gave what was recorded.

    Raises:
        CheckpointError: it did not.
    """
    if report.same:
        return
    found = report.difference
    if found is not None:
        raise CheckpointError(
            f"step {found.step} does not come out as it was recorded: {found.what} {found.replayed!r} now, "
            f"{found.recorded!r} then",
            hint="the learning rate's settings have changed since"
            if found.what == "lr"
            else _why(report, "the checkpoint before it, the data or the recipe have changed"),
        )
    names = report.state_differs or []
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    raise CheckpointError(
        f"the checkpoint of step {report.step} holds another state than step {report.step} gives: {shown}",
        hint=_why(report, "the file was changed after it was written"),
    )


def _why(report: Report, usual: str) -> str:
    if report.start_layout is None:
        return f"{usual}, or an operation here is not deterministic"
    return (
        f"other ranks wrote the checkpoint of step {report.from_step} ({report.start_layout}); steps that they took "
        "behind it differ in their last digits: raise checkpoint.keep_last, so that where others took over is kept"
    )


def _replay(recipe: Recipe, request: ReplayRequest, parallel: ParallelContext) -> Report:
    folder = RunFolder(request.run)
    tokenizer = agree.all_succeed(lambda: load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None)
    batch = batch_arithmetic(recipe, parallel.world.size)
    recipe = pretrain.fill_in(recipe, tokenizer, batch)
    ran = agree.all_succeed(lambda: resolve_recipe(str(folder.recipe)))
    check_same_run(ran, recipe, str(folder))
    verified = None
    if request.step is None:
        verified = find_verified(folder)
        _check_layout(verified, parallel, ran, recipe)
    target = verified.manifest.step if verified is not None else request.step
    assert target is not None
    _check_step(target, folder, recipe)
    start = find_start(folder, target, recipe.checkpoint.resume)
    report = Report(target, start.manifest.step if start is not None else 0)
    if start is not None and not is_layout(start.manifest.layout, parallel):
        report.start_layout = describe_layout(start.manifest.layout)
    recorded = agree.on_rank_zero(lambda: read_records(folder))
    if verified is not None:
        recorded[target] = {**recorded.get(target, {}), **verified.manifest.metrics}
    engine, recorder, report.samples = _take_steps(
        recipe, tokenizer, batch, parallel, start, verified, target, recorded
    )
    replayed = recorder.records[target]
    report.difference, report.steps_compared = first_difference(recorder.records, recorded)
    report.loss, report.grad_norm, report.lr = (replayed.get(name) for name in ("loss", "grad_norm", "lr"))
    report.recorded = {name: recorded.get(target, {}).get(name) for name in ("loss", "grad_norm", "lr")}
    report.bad = {key: value for key, value in replayed.items() if key.startswith("bad")} or None
    if verified is not None:
        report.state_differs = differing_state(verified, engine, parallel)
    return report


def _take_steps(
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    batch: Batch,
    parallel: ParallelContext,
    start: Found | None,
    verified: Found | None,
    target: int,
    recorded: dict[int, dict[str, Any]],
) -> tuple[Any, Recorder, list[int]]:
    """The engine after ``target``, the records on the way there, and the samples of the last step."""
    source = agree.all_succeed(lambda: pretrain.open_data(recipe, tokenizer))["train"]
    assert source is not None
    seen = (verified or start).manifest.data_fingerprint if (verified or start) else None  # type: ignore[union-attr]
    if seen is not None and seen != pretrain.data_fingerprint(source, tokenizer):
        raise UsageError("the data or the tokenizer are not those of this run", hint="name them with data.path=PREFIX")
    dtype = choose_dtype(recipe.train.precision, parallel.device)
    _, engine, streams = pretrain.build_training_engine(recipe, batch, parallel, dtype, fresh=start is None)
    beginning = Position(0, 0)
    if start is not None:
        beginning = where_it_went_on(load_state(start, engine, streams, parallel), target, recorded)
    log.info(f"taking {target - beginning.step} steps again, from step {beginning.step:,}")

    def rollback() -> Position:
        assert start is not None, "a run that rolls back has saved its first step"
        return load_state(start, engine, streams, parallel)

    shortened = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": target})})
    plan = pretrain.plan_of(shortened, batch)
    with closing(pretrain.supply_batches(recipe, source, beginning, batch, parallel)) as supply:  # type: ignore[type-var]
        listed = Listed(supply)
        recorder = Recorder(listed)
        train(
            plan,
            engine,
            listed,
            pretrain.objective,
            build_schedule(recipe),  # of the whole run: the learning rate does not know that it ends here
            start=beginning,
            parallel=parallel,
            evaluator=None,
            checkpointer=Nowhere(),
            monitor=recorder,
            stop=StopFlag(),
            numerics=Numerics(policy_of(recipe), rollback),
        )
    return engine, recorder, listed.everywhere(parallel)


def _check_layout(found: Found, parallel: ParallelContext, ran: Recipe, recipe: Recipe) -> None:
    """``ran``: the recipe that the run was last started with."""
    wrote = found.manifest.layout
    if not is_layout(wrote, parallel):
        here = wrote["world"] == parallel.world.size
        raise UsageError(
            f"{found.folder} was written by {wrote['world']} ranks ({describe_layout(wrote)}); "
            "only they give the same bits",
            hint="keep the parallel section" if here else f"add `--nproc {wrote['world']}`",
        )
    for section, name in (("parallel", "zero"), ("parallel", "sequence"), ("train", "engine")):
        then, now = (str(getattr(getattr(one, section), name)).lower() for one in (ran, recipe))
        if then != now:
            raise UsageError(
                f"{found.folder} was written with {section}.{name}={then}; only the same gives the same bits",
                hint=f"leave out `{section}.{name}={now}`",
            )


def _check_step(step: int, folder: RunFolder, recipe: Recipe) -> None:
    if not 1 <= step <= recipe.train.steps:
        raise UsageError(
            f"there is no step {step} in {folder}, which takes {recipe.train.steps} steps",
            hint="steps count from 1",
        )
