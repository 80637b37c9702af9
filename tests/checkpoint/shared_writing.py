"""Models written by several ranks together; no `transformers` here, so that ranks start quickly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.checkpoint import weight_shares
from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.checkpoint.hub import load_model_folder, save_model_folder
from mlm_cli.checkpoint.save import Checkpointer, Identity
from mlm_cli.checkpoint.state import Position
from mlm_cli.parallel.context import ParallelContext
from mlm_cli.training.engine import OptimizerSettings
from mlm_cli.training.engine_choice import build_engine


def write_together(
    rank: int, world_size: int, source: str, folder: str, layout: dict[str, int], smallest: int, most: int
) -> list[str]:
    """The model in ``source`` written to ``folder``, and to ``folder.later`` afterwards; files of this rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_shares, "_SMALLEST_SHARE", smallest)
        model, _ = load_model_folder(source, ParallelContext.create(**layout))
        records = save_model_folder(model, folder, max_shard_bytes=most)
        for name, record in records.items():
            assert (Path(folder) / name).stat().st_size == record.size
        todo: list[Callable[[], None]] = []
        later = save_model_folder(model, f"{folder}.later", max_shard_bytes=most, later=todo)
        assert not later
        for param in model.parameters():
            param.data.zero_()  # training has gone on
        for action in todo:
            action()
        assert later == records
    return sorted(records)


def save_together(rank: int, world_size: int, source: str, folder: str, background: bool) -> list[str]:
    """A checkpoint of the model in ``source`` by tensor ranks; the files of weights that this one wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_shares, "_SMALLEST_SHARE", 8192)
        parallel = ParallelContext.create(tensor=world_size)
        model, _ = load_model_folder(source, parallel)
        engine = build_engine(
            "plain", model, parallel, OptimizerSettings(), dtype=model.dtype, accumulation=1, micro_batch_size=1, zero=0
        )
        written: list[dict[str, Any]] = []

        def write_model(folder: Path, position: Position, metrics: Any, later: Any = None) -> Any:
            written.append(save_model_folder(model, folder, later=later))
            return written[-1]

        Path(folder).mkdir(exist_ok=True)
        saver = Checkpointer(
            RunFolder(Path(folder)), engine, parallel, write_model=write_model, identity=Identity("x"),
            background=background,
        )  # fmt: skip
        saver.save(Position(3, 24), wait=not background)
        saver.finish()
        return sorted(written[0])
