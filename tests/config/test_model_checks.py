"""What a family has no use for, or needs, is said before anything starts."""

from __future__ import annotations

import re

import pytest

from mlm_cli.config.checks import check
from mlm_cli.config.resolve import resolve_recipe


def mistakes(spec: str, *overrides: str) -> list[str]:
    found = check(resolve_recipe(spec, ["data.path=/d/x", *overrides]), verb="pretrain", world_size=None)
    assert all(mistake.hint for mistake in found), "every mistake has a way out"
    return [mistake.message for mistake in found]


@pytest.mark.parametrize("spec", ["debug/gpt", "debug/llama", "debug/bert", "debug/t5", "t5/small"])
def test_good_recipes_have_none(spec: str) -> None:
    assert mistakes(spec, "tokenizer=tok") == []


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("debug/gpt", ["model.position=relative"], "gpt has learned or rotary positions, not relative"),
        ("debug/bert", ["model.position=relative"], "bert has learned positions, not relative"),
        ("debug/bert", ["model.position=rotary"], "bert has learned positions, not rotary"),
        ("debug/t5", ["model.position=learned"], "t5 has relative positions, not learned"),
        ("debug/gpt", ["model.num_decoder_layers=2"], "`model.num_decoder_layers` is for `model.family` t5, not gpt"),
        ("debug/bert", ["model.relative_buckets=16"], "`model.relative_buckets` is for `model.family` t5, not bert"),
        ("debug/gpt", ["model.num_token_types=2"], "`model.num_token_types` is for `model.family` bert, not gpt"),
        ("debug/t5", ["model.binary_head=sentence_order"], "`model.binary_head` is for `model.family` bert, not t5"),
        ("debug/t5", ["model.init_std=0.1"], "T5's initial weights follow from its sizes"),
        ("debug/t5", ["model.relative_buckets=6"], "6 cannot be halved twice"),
        ("debug/t5", ["model.relative_max_distance=16"], "leaves the buckets of far distances empty"),
        ("debug/t5", ["model.attention.pattern=local"], "has no place for T5's relative positions"),
        ("debug/t5", ["model.experts={num_experts: 4}"], "not for t5"),
        ("debug/t5", ["model.bias=true"], "no Hugging Face architecture holds this model"),
        ("debug/t5", ["parallel.sequence=true", "parallel.tensor=2"], "needs a `model.decoder_seq_length`"),
        (
            "debug/t5",
            ["parallel.sequence=true", "parallel.tensor=2", "model.decoder_seq_length=15"],
            "a multiple of `parallel.tensor` 2",
        ),
        (
            "debug/llama",
            [
                "model.rotary_scaling={type: yarn, factor: 4, original_seq_length: 64, beta_fast: 1, beta_slow: 32}",
            ],
            "`model.rotary_scaling.beta_fast` 1 must be above `beta_slow` 32",
        ),
        ("debug/t5", ["parallel.pipeline=5"], "`model.num_layers` 4 cannot fill `parallel.pipeline` 5"),
    ],
)
def test_what_makes_no_sense(spec: str, overrides: list[str], message: str) -> None:
    found = mistakes(spec, *overrides)
    assert any(re.search(message, text) for text in found), found


def test_a_whole_t5_may_share_out_tokens_and_stages() -> None:
    overrides = ["parallel.sequence=true", "parallel.tensor=2", "model.decoder_seq_length=16", "parallel.pipeline=4"]
    assert mistakes("debug/t5", *overrides) == []
