"""What answers prompts in the way that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable

from mlm_cli.generation.answer import Settings
from mlm_cli.generation.beam_search import BeamSearch
from mlm_cli.generation.contrastive_search import ContrastiveSearch
from mlm_cli.generation.decoder import Decoder
from mlm_cli.generation.encoder_decoder import EncoderDecoder
from mlm_cli.generation.generator import Generator
from mlm_cli.generation.prompts import Prompt
from mlm_cli.generation.text_stream import TextStream
from mlm_cli.models.gpt import GPT
from mlm_cli.models.model import Model
from mlm_cli.models.t5 import T5

Answerer = Generator | BeamSearch | ContrastiveSearch


def decoder_of(
    model: Model, batch_size: int, settings: Settings, *, start_id: int | None, max_length: int | None = None
) -> Decoder:
    """What decodes ``batch_size`` texts of a model at once, answered as ``settings`` say.

    Args:
        start_id: begins every answer of an encoder-decoder.
        max_length: of a causal model, longest prompt and answer; unset: its context.
    """
    rows, keep_states = batch_size * settings.width, settings.contrastive_alpha > 0
    if isinstance(model, T5):
        assert start_id is not None
        room = settings.max_new_tokens + 1
        return EncoderDecoder(model, rows, max_length=room, start_id=start_id, keep_states=keep_states)
    assert isinstance(model, GPT)
    return Decoder(model, rows, max_length, keep_states=keep_states)


def make_answerer(
    decoder: Decoder,
    settings: Settings,
    new_stream: Callable[[], TextStream],
    show: Callable[[Prompt, str], None] | None = None,
) -> Answerer:
    """Greedy, sampled, or by a search; ``show`` is called with each piece of text as soon as it is certain."""
    if settings.contrastive_alpha:
        return ContrastiveSearch(decoder, settings, new_stream, show=show)
    return (BeamSearch if settings.searches else Generator)(decoder, settings, new_stream, show=show)
