"""A run from its folder's point of view: lock, same recipe or refusal, where to resume, and how it ended.

Used by every job that trains. All ranks go through it together; rank 0 alone touches files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mlm_cli import log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.load import Found, find_newest, open_checkpoint
from mlm_cli.config.resolve import resolve_recipe, write_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import CheckpointError, MlmError, ResourceError, UsageError
from mlm_cli.training.identity import check_same_run, recipe_hash
from mlm_cli.training.status import Status
from mlm_cli.training.stop import StopFlag

BUG_EXIT_CODE = 1


@dataclass
class Session:
    """An open run.

    Attributes:
        found: the checkpoint to resume from; None: start anew.
        recipe_hash: for the manifests.
    """

    run: RunFolder
    recipe: Recipe
    status: Status
    stop: StopFlag
    found: Found | None
    recipe_hash: str

    @property
    def complete(self) -> bool:
        """The run has already taken all of its steps."""
        return self.found is not None and self.found.manifest.step >= self.recipe.train.steps

    def check_data(self, fingerprint: str) -> None:
        """Refuse to go on with other data than the checkpoint has seen.

        Raises:
            UsageError: another data set, split, blend or tokenizer.
        """
        seen = self.found.manifest.data_fingerprint if self.found is not None else None
        if seen is not None and seen != fingerprint:
            raise UsageError(
                f"{self.run} was trained on other data (fingerprint {seen[:12]}, now {fingerprint[:12]})",
                hint="give the same data and tokenizer to continue, or choose another folder with --output",
            )


@contextmanager
def open_session(recipe: Recipe, stop: StopFlag | None = None) -> Iterator[Session]:
    """Take hold of ``recipe.output`` and find out where to go on.

    ``recipe`` must have ``train.global_batch_size`` and ``model.vocab_size`` filled in: its copy in the run folder
    resumes on any number of ranks. Errors that leave the block are noted in ``status.json``.

    Args:
        stop: listening already; None: one of its own listens while the block runs.

    Raises:
        UsageError: no output folder, in use, or holding another run.
        CheckpointError: there are checkpoints, but none is sound.
    """
    if recipe.output is None:
        raise UsageError("no output folder", hint="set `output` in the recipe or give --output")
    run = RunFolder(recipe.output)
    writes = agree.rank() == 0
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopFlag().listening())
        agree.on_rank_zero(lambda: stack.enter_context(run.lock()))
        same, changes = agree.on_rank_zero(lambda: _prepare(run, recipe))
        found = _find(run, recipe, again=same)
        if found is not None:
            for change in changes:
                log.info(f"continuing with a changed recipe: {change}")
        status = Status(run, steps=recipe.train.steps, active=writes)
        try:
            agree.on_rank_zero(lambda: write_recipe(recipe, run.recipe))
            if found is not None:
                status.values.update(step=found.manifest.step, checkpoint=found.folder.name)
            status.update("starting")
            yield Session(run, recipe, status, stop, found, recipe_hash(recipe))
        except MlmError as error:
            status.update("failed", exit_code=error.exit_code, message=error.message)
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            status.update("failed", exit_code=ResourceError.exit_code, message="out of memory")
            raise ResourceError(f"out of memory: {error}", hint=_MEMORY_HINT) from error
        except BaseException as error:
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
                status.update("failed", exit_code=ResourceError.exit_code, message="out of memory")
                raise ResourceError(f"out of memory: {error}", hint=_MEMORY_HINT) from error
            status.update("failed", exit_code=BUG_EXIT_CODE, message=f"{type(error).__name__}: {error}")
            raise


_MEMORY_HINT = "lower train.micro_batch_size, set train.recompute=full, or slice the model with parallel.tensor"


def _prepare(run: RunFolder, recipe: Recipe) -> tuple[bool, list[str]]:
    """Rank 0, under the lock: tidy up, and compare with the recipe of the checkpoints here.

    Returns:
        Whether it is the very same; the changes worth saying.
    """
    run.remove_leftovers()
    steps = run.steps()
    if not steps:
        return False, []
    if recipe.checkpoint.resume == "never":
        raise UsageError(
            f"{run} holds checkpoints up to step {steps[-1]} and checkpoint.resume is `never`",
            hint="choose another folder with --output, or set checkpoint.resume=auto",
        )
    if not run.recipe.exists():
        raise UsageError(
            f"{run} holds checkpoints but no recipe.yaml", hint="choose another folder with --output, or restore it"
        )
    before = resolve_recipe(str(run.recipe))
    return before == recipe, check_same_run(before, recipe, str(run))


def _find(run: RunFolder, recipe: Recipe, *, again: bool) -> Found | None:
    """``again``: nothing of the recipe has changed since the last start."""
    wanted = recipe.checkpoint.resume
    if wanted in ("auto", "never"):
        return find_newest(run)
    folder = Path(wanted).expanduser().absolute()
    if folder.parent == run.path and again:  # a requeued job goes back once
        log.info(f"{run} went back to {folder.name} already and goes on; only a changed recipe goes back once more")
        return find_newest(run)
    if folder.parent == run.path:
        found = open_checkpoint(folder)
        agree.on_rank_zero(lambda: _set_aside(run, found.manifest.step))
        return found
    own = find_newest(run)
    if own is not None:  # a requeued job goes on where it was, not where it once began
        log.info(f"{run} already went on from {folder}: resuming its own {own.folder.name}")
        return own
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist", hint="checkpoint.resume: auto, never, or a checkpoint folder")
    newest = find_newest(RunFolder(folder)) if RunFolder(folder).steps() else None
    found = newest or open_checkpoint(folder)
    if found.manifest.recipe_hash != recipe_hash(recipe):
        raise UsageError(
            f"{found.folder} was made by another recipe (model, seed or global batch size)",
            hint="to start from its weights alone, set init_from instead of checkpoint.resume",
        )
    return found


def _set_aside(run: RunFolder, step: int) -> None:
    """Going back on purpose: later checkpoints stay on disk, but are no longer this run's."""
    for later in run.steps():
        if later > step:
            aside = run.path / f"replaced-{run.checkpoint(later).name}"
            run.discard(aside)
            run.checkpoint(later).rename(aside)
            log.info(f"going back to step {step}: {run.checkpoint(later).name} is now {aside.name}")
    run.set_latest(step)
