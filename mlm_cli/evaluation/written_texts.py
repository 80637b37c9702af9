"""The texts that a model in training or evaluation writes for a task, as the task asks it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch.distributed as dist

from mlm_cli.checkpoint import agree
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.generation.answer import EncodedPrompt, Settings
from mlm_cli.generation.answerer import Answerer, decoder_of, make_answerer
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.sampling import Sampling
from mlm_cli.generation.text_stream import text_stream
from mlm_cli.models.model import Model
from mlm_cli.parallel.context import Group
from mlm_cli.tasks.features import Features
from mlm_cli.tasks.writing import Writing

_ROUND = 4  # batches; a round ends with rows that have nothing to do


def write_texts(
    model: Model,
    task: Writing,
    features: Features,
    *,
    batch_size: int,
    on_text: Callable[[], None] = lambda: None,
    interrupt: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """What the model writes for each unit, by its number, equal on all ranks. All ranks call; data ranks share units.

    Args:
        model: in evaluation mode.
        batch_size: texts at once on one rank; changes none of them beyond float rounding.
        on_text: called when a text is done, on the first rank of each tensor group.
        interrupt: called by all ranks before every few batches of texts; may raise to leave off.
    """
    tensor, data = model.parallel.tensor, model.parallel.data
    section = task.section
    settings = Settings(
        Sampling(temperature=0.0),
        section.max_target_length,
        end_ids=task.end_ids,
        beams=section.beams,
        length_penalty=section.length_penalty,
    )
    decoder = decoder_of(model, batch_size, settings, start_id=task.start_id, max_length=task.encoder.max_length)
    answerer = make_answerer(decoder, settings, lambda: text_stream(task.encoder.tokenizer))
    written: dict[int, str] = {}
    together = _ROUND * batch_size * data.size  # units that all ranks write between two looks at `interrupt`
    for first in range(0, len(features), together):
        interrupt()
        mine = range(first + data.rank, min(first + together, len(features)), data.size)
        prompts = (
            EncodedPrompt(Prompt(unit, "", unit, f"text {unit}"), features.rows[unit].ids.tolist()) for unit in mine
        )
        found = _answers(decoder, answerer, prompts, tensor, lambda _done: on_text())
        written.update((mine[place], text) for place, text in found.items())
    return gather_units(gather_units(written, tensor), data)


def answer_prompts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[EncodedPrompt],
    settings: Settings,
    *,
    batch_size: int,
    max_length: int,
    on_text: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, str]:
    """What a causal model writes behind each prompt, by its place, equal on all ranks. All ranks call.

    Args:
        settings: of prompts that bring none.
        batch_size: texts at once on one rank; changes none of them beyond float rounding.
        max_length: tokens of prompt and answer.
        on_text: told (texts done, texts in all) of this rank, on the first rank of each tensor group.
    """
    tensor, data = model.parallel.tensor, model.parallel.data
    decoder = decoder_of(model, batch_size, settings, start_id=None, max_length=max_length)
    answerer = make_answerer(decoder, settings, lambda: text_stream(tokenizer))
    mine = range(data.rank, len(prompts), data.size)
    todo = (prompts[number] for number in mine)
    found = _answers(decoder, answerer, todo, tensor, lambda done: on_text(done, len(mine)))
    return gather_units(gather_units({mine[place]: text for place, text in found.items()}, tensor), data)


def _answers(
    decoder: Decoder,
    answerer: Answerer,
    prompts: Iterator[EncodedPrompt],
    tensor: Group,
    on_done: Callable[[int], None],
) -> dict[int, str]:
    """Texts by their place among ``prompts``, on the first rank of the tensor group; nothing on those that follow it.

    What fails on one rank (numbers that are none, in a text of its own) fails on all: none waits for its texts.
    """

    def answer() -> dict[int, str]:
        found: dict[int, str] = {}
        if tensor.rank != 0:
            decoder.follow()
            return found
        with closing(decoder):
            for place, done in answerer.as_done(prompts):
                found[place] = done.text
                on_done(len(found))
        return found

    return agree.all_succeed(answer)


def gather_units(mine: dict[int, str], group: Group) -> dict[int, str]:
    """What the ranks of a group have for different units, on each of them."""
    if group.size == 1:
        return mine
    parts: list[dict[int, str]] = [{}] * group.size
    dist.all_gather_object(parts, mine, group=group.handle)
    return {unit: value for part in parts for unit, value in part.items()}
