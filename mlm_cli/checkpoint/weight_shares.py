"""Which rank writes which tensors of a model into which file.

A small model is one file, written by the first rank. Of a large one every rank of the tensor and pipeline groups writes
files of its own, so that a save takes as long as a rank's share of the model, and no rank holds more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mlm_cli.checkpoint.weight_files import SINGLE
from mlm_cli.parallel.context import Group

# A rank writes a file of its own where it is at least this large: few large files are easier to handle than many.
_SMALLEST_SHARE = 64 << 20


@dataclass(frozen=True)
class Job:
    """Some tensors that will be written: bytes of each, by name; themselves when asked.

    ``make`` may be a collective over the tensor group: its ranks call it together, in the order of the jobs.
    """

    sizes: Mapping[str, int]
    make: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class File:
    """A file of weights, and whether this rank writes it. ``jobs`` give its tensors."""

    name: str
    jobs: list[Job]
    mine: bool


@dataclass(frozen=True)
class Shares:
    """How a model is shared out.

    Attributes:
        files: those whose jobs this rank takes part in, in order.
        places: of every tensor of the model, the file that holds it.
        num_bytes: of all tensors.
    """

    files: list[File]
    places: dict[str, str]
    num_bytes: int


def share_out(jobs: list[Job], tensor: Group, pipeline: Group, most: int) -> Shares:
    """Share the tensors of a model out over its ranks. All ranks of both groups call.

    Args:
        jobs: of this stage.
        most: bytes that a file may have; a single larger tensor has one of its own.
    """
    stages: list[Any] = [[dict(job.sizes) for job in jobs]]
    if pipeline.size > 1:
        stages = [None] * pipeline.size
        dist.all_gather_object(stages, [dict(job.sizes) for job in jobs], group=pipeline.handle)
    num_bytes = sum(sum(sizes.values()) for stage in stages for sizes in stage)
    stage = pipeline.rank
    if pipeline.size > 1 and num_bytes < 2 * _SMALLEST_SHARE:
        jobs, stages, stage = _at_first_stage(jobs, stages, pipeline), [list(chain(*stages))], 0
    parts = [_split([sum(sizes.values()) for sizes in sizes_of], tensor.size, most) for sizes_of in stages]
    count, number = sum(map(len, parts)), 0
    files: list[File] = []
    places: dict[str, str] = {}
    for place, sizes_of in enumerate(stages):
        for turn, part in enumerate(parts[place]):
            number += 1
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            places |= {name_of: name for index in part for name_of in sizes_of[index]}
            if place == stage:
                mine = turn % tensor.size == tensor.rank and (len(stages) > 1 or pipeline.rank == 0)
                files.append(File(name, [jobs[index] for index in part], mine))
    return Shares(files, places, num_bytes)


def _at_first_stage(own: list[Job], stages: list[list[dict[str, int]]], pipeline: Group) -> list[Job]:
    """The jobs of all stages in order, each done by its stage and handed to the first."""

    def job(stage: int, number: int) -> Job:
        def make() -> dict[str, Tensor]:
            tensors = own[number].make() if pipeline.rank == stage else {}
            return pipeline.to_first(tensors, stage)

        return Job(stages[stage][number], make)

    return [job(stage, number) for stage in range(pipeline.size) for number in range(len(stages[stage]))]


def _split(sizes: Sequence[int], writers: int, most: int) -> list[range]:
    """Consecutive jobs that go into one file each, of about equal size where several ranks write."""
    total = sum(sizes)
    shares = min(writers, total // _SMALLEST_SHARE)
    if shares < 2:
        return _filled(sizes, most)
    count = max(shares, -(-total // most))
    while True:
        parts = _evenly(sizes, count)
        if all(len(part) == 1 or sum(sizes[part.start : part.stop]) <= most for part in parts):
            return parts
        count += 1


def _filled(sizes: Sequence[int], most: int) -> list[range]:
    """As few files as there can be."""
    starts, held = [0], 0
    for place, size in enumerate(sizes):
        if place > starts[-1] and held + size > most:
            starts.append(place)
            held = 0
        held += size
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _evenly(sizes: Sequence[int], count: int) -> list[range]:
    """``count`` files at most: a job goes where its middle lies, were the files cut out of all bytes in a row."""
    total = sum(sizes)
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    numbers = [min(int(middle * count / total), count - 1) for middle in middles]
    starts = [place for place, number in enumerate(numbers) if place == 0 or number != numbers[place - 1]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
