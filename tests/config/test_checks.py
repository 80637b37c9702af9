"""Checks across keys: each impossible recipe is refused with its keys and a way out that works."""

from __future__ import annotations

import re

import pytest

from mlm_cli.config.builtin import builtin_names
from mlm_cli.config.checks import check
from mlm_cli.config.derived import batch_arithmetic
from mlm_cli.config.resolve import resolve_recipe
from mlm_cli.config.schema import Recipe
from mlm_cli.errors import UsageError

GOOD = ["data.path=/d/x"]


def mistakes(
    *overrides: str, verb: str = "pretrain", world_size: int | None = None, spec: str = "debug/gpt"
) -> list[str]:
    found = check(resolve_recipe(spec, [*GOOD, *overrides]), verb=verb, world_size=world_size)
    assert all(mistake.hint for mistake in found), "every mistake has a way out"
    return [mistake.message for mistake in found]


def test_a_good_recipe_has_none() -> None:
    assert mistakes(world_size=1) == []
    assert mistakes("parallel.tensor=2", world_size=2) == []
    assert mistakes("parallel.tensor=2", world_size=4) == []
    assert mistakes(spec="debug/llama", world_size=1) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["model.num_attention_heads=5"], None, "cannot be divided into .* 5 heads"),
        (["parallel.tensor=3"], 3, r"`model.num_attention_heads` 4 cannot be sliced over `parallel.tensor` 3"),
        (["parallel.tensor=8"], 8, r"`model.num_attention_heads` 4 cannot be sliced"),
        (["model.ffn_hidden_size=255", "parallel.tensor=2"], 2, r"`model.ffn_hidden_size` 255 cannot be sliced"),
        (
            ["model.vocab_size=257", "model.make_vocab_size_divisible_by=1", "parallel.tensor=2"],
            2,
            "padded vocabulary of 257 rows cannot be sliced",
        ),
        (["model.num_query_groups=3"], None, "not a multiple of `model.num_query_groups` 3"),
        (["model.position=rotary"], None, "no Hugging Face architecture holds this model"),
        (["schedule.warmup_steps=50"], None, "leaves nothing of `train.steps` 50"),
        (["schedule.decay=wsd", "schedule.decay_steps=46"], None, "exceed `train.steps`"),
        (["schedule.min_lr=1"], None, "`schedule.min_lr` 1 is above"),
        (["data.path=null"], None, "no training data"),
        (["data.train=/d/y"], None, "both set"),
        (["data.path=[]"], None, "`data.path` is empty"),
        (["tokenizer=null"], None, "`tokenizer` is not set"),
        (["output=null"], None, "`output` is not set"),
        (["train.engine=deepspeed", "parallel.zero=0"], None, "needs `parallel.zero` of 1, 2 or 3"),
        (
            ["parallel.sequence=true", "parallel.tensor=2", "model.seq_length=63"],
            2,
            "`model.seq_length` 63 is not a multiple",
        ),
        (["parallel.pipeline=2", "parallel.zero=2"], 2, "`parallel.pipeline` 2 runs with ZeRO-1"),
        (["parallel.pipeline=2", "train.engine=plain"], 2, "`parallel.pipeline` 2 runs with ZeRO-1"),
        (["parallel.pipeline=16"], 16, "cannot fill `parallel.pipeline` 16 stages"),
        (["parallel.pipeline=2", "init_from=runs/x"], 2, "a stage is a part of one"),
        (["parallel.pipeline=2", "parallel.tensor=2"], 2, "x `parallel.pipeline` 2 needs 4 ranks"),
        (["train.compile=true", "parallel.zero=3"], None, "`train.compile` cannot follow weights"),
        (["parallel.tensor=2"], 1, "needs 2 ranks, and there is 1"),
        (["parallel.tensor=2"], 3, "3 ranks are not a multiple of the 2"),
        (["train.global_batch_size=10"], 2, "10 is not a multiple of micro-batch size 4 x 2 data ranks"),
        (["train.engine=plain"], 2, "does not average gradients"),
    ],
)
def test_impossible_recipes(overrides: list[str], world_size: int | None, message: str) -> None:
    found = mistakes(*overrides, world_size=world_size)
    assert any(re.search(message, text) for text in found), found


def test_llama_shapes() -> None:
    assert any("even head size" in text for text in mistakes("model.hidden_size=36", spec="debug/llama"))
    sliced = mistakes("parallel.tensor=4", spec="debug/llama", world_size=4)
    assert any("`model.num_query_groups` 2 cannot be sliced" in text for text in sliced)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_attention_heads=5"],
        ["schedule.min_lr=1"],
        ["schedule.warmup_steps=50"],
        ["schedule.decay=wsd", "schedule.decay_steps=46"],
        ["model.vocab_size=257", "model.make_vocab_size_divisible_by=1", "parallel.tensor=2"],
        ["parallel.tensor=3"],
        ["train.global_batch_size=10"],
    ],
)
def test_following_the_hint_mends_it(overrides: list[str]) -> None:
    world = {"parallel.tensor=3": 3, "parallel.tensor=2": 2}.get(overrides[-1], 1)
    recipe = resolve_recipe("debug/gpt", [*GOOD, *overrides])
    (first, *_) = check(recipe, verb="pretrain", world_size=world)
    assert first.hint is not None
    remedy = re.search(r"`([\w.]+=[^`]+)`", first.hint)
    way_out = [remedy.group(1)] if remedy else [f"model.num_attention_heads={re.search('[0-9]+', first.hint).group()}"]  # type: ignore[union-attr]
    if way_out[0].startswith("parallel.tensor"):
        world = int(way_out[0].partition("=")[2])
    mended = resolve_recipe("debug/gpt", [*GOOD, *overrides, *way_out])
    assert first.message not in [m.message for m in check(mended, verb="pretrain", world_size=world)]


def test_finetune_needs_a_task_and_a_model() -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe("debug/gpt", [], verb="finetune", world_size=1)
    assert "`task` is not set" in str(caught.value) and "`init_from` is not set" in str(caught.value)


def test_batch_arithmetic() -> None:
    recipe = resolve_recipe("gpt/8.3b")
    batch = batch_arithmetic(recipe, 512)
    assert (batch.data_parallel_size, batch.micro_batch_size, batch.gradient_accumulation_steps) == (64, 4, 2)
    unset = resolve_recipe("debug/gpt", ["train.global_batch_size=null"])
    assert batch_arithmetic(unset, 4).global_batch_size == 16


@pytest.mark.parametrize("split", ["0,0,0", "0,1", "a,b", "1,2,3,4", "-1,2", "nan", ""])
def test_a_split_is_checked_by_every_verb(split: str) -> None:
    with pytest.raises(UsageError, match=r"`data\.split` must be up to three shares"):
        resolve_recipe("debug/gpt", [f"data.split='{split}'"], verb="plan")


def test_keep_best_needs_a_validation_before_each_checkpoint() -> None:
    def keys(every: int, evaluations: int) -> list[tuple[str, ...]]:
        recipe = Recipe.model_validate(
            {"checkpoint": {"keep_best": 1, "every": every}, "evaluate": {"every": evaluations}}
        )
        return [mistake.keys for mistake in check(recipe, verb="plan") if "checkpoint.keep_best" in mistake.keys]

    assert keys(100, 50) == keys(100, 100) == []
    assert len(keys(100, 0)) == len(keys(100, 70)) == len(keys(0, 100)) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.name=regression", "task.doc_stride=64"], "`task.doc_stride` means nothing to `task.name` regression"),
        (["task.name=regression", "task.metric=f1"], "`task.metric` f1 is not measured by regression"),
        (["task.name=question_answering", "task.metric=exact"], "did you mean `exact_match`?"),
        (["task.name=embedding"], "`task.text_pair_column` is not set"),
        (["task.name=token_classification", "task.text_column=word"], "the columns of CoNLL files have numbers"),
        (["task.name=embedding", "task.pooling=max", "task.text_pair_column=1"], "`task.pooling` must be"),
        (
            ["task.name=embedding", "task.text_pair_column=1", "task.loss=contrastive", "train.micro_batch_size=1"],
            "`task.loss` contrastive tells a pair from the others",
        ),
        (["task.name=ner"], "task.name"),
        (["task.max_anwser_length=3"], "did you mean `task.max_answer_length`?"),
    ],
)
def test_tasks_that_make_no_sense(overrides: list[str], message: str) -> None:
    base = ["task.train=a.tsv", "task.dev=b.tsv", "init_from=runs/x", "output=runs/y"]
    with pytest.raises(UsageError) as caught:
        resolve_recipe(None, [*base, *overrides], verb="finetune")
    assert message in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("name", [name for name in builtin_names() if name.startswith(("finetune/", "debug/"))])
def test_recipes_of_tasks_are_whole(name: str) -> None:
    if resolve_recipe(name).task is not None:
        assert resolve_recipe(name, verb="finetune").init_from
    else:
        assert not name.startswith("finetune/")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.offload=nvme", "parallel.zero=2"], "`parallel.offload` goes with `parallel.zero` 3 alone"),
        (["parallel.offload=cpu"], "`parallel.offload` goes with `parallel.zero` 3 alone"),
        (["parallel.offload=cpu", "parallel.zero=3", "train.engine=plain"], "`parallel.offload` goes with"),
    ],
)
def test_what_offload_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    assert any(words in text for text in mistakes(*overrides))
    for offload in ("cpu", "nvme"):
        assert not any("offload" in text for text in mistakes(f"parallel.offload={offload}", "parallel.zero=3"))


def test_a_length_penalty_without_beams_is_said() -> None:
    task = {"name": "translation", "train": "a", "dev": "b", "length_penalty": 0.6}
    for beams, count in ((1, 1), (4, 0)):
        recipe = Recipe.model_validate({"task": {**task, "beams": beams}})
        found = [str(mistake) for mistake in check(recipe, verb="finetune")]
        assert sum("`task.length_penalty` 0.6 is for a beam search" in text for text in found) == count
