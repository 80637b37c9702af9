"""Checks that need more than one key of a recipe, or the number of ranks. Each names its keys and a way out."""

from __future__ import annotations

from collections.abc import Iterator

from mlm_cli.config.durations import parse_duration
from mlm_cli.config.layout_checks import TRAINING_VERBS, check_context, check_layout, nearest_divisor
from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.model_checks import check_contrast, check_model
from mlm_cli.config.preprocess_checks import check_preprocess
from mlm_cli.config.retrieval_section import check_retrieval
from mlm_cli.config.schema import DataSection, Recipe
from mlm_cli.config.shapes import (
    ffn_hidden_size,
    head_dim,
    hub_layout,
    num_decoder_layers,
    num_query_groups,
    padded_vocab_size,
)
from mlm_cli.config.tasks import WRITTEN_KINDS, check_task
from mlm_cli.config.watermark_checks import check_watermark
from mlm_cli.errors import UsageError


def check(recipe: Recipe, *, verb: str, world_size: int | None = None) -> list[Mistake]:
    """Every mistake that ``verb`` would meet with this recipe.

    Args:
        recipe: a recipe whose keys are each valid by themselves.
        verb: ``pretrain``, ``finetune``, ``plan`` (a pretraining recipe whose data need not be there yet), ``evaluate``
            or ``generate``.
        world_size: ranks that will run; None when not yet known, which leaves out what depends on it.
    """
    found: list[Mistake] = []
    if verb in ("pretrain", "plan"):
        found += check_model(recipe)
        found += _shapes(recipe)
    if verb in (*TRAINING_VERBS, "plan"):
        found += _schedule(recipe)
        found += _rollback(recipe)
        found += _time_limit(recipe)
        found += _engine(recipe)
        found += check_context(recipe, verb)
        found += _keep_best(recipe)
        found += check_contrast(recipe)
    if verb == "pretrain":
        found += _data(recipe.data)
        found += _tokenizer(recipe)
    if verb == "preprocess":
        found += check_preprocess(recipe)
    if verb == "finetune":
        found += _task(recipe)
    if verb in ("generate", "evaluate"):
        found += [*check_watermark(recipe, verb), *check_retrieval(recipe.retrieval, verb)]
    if verb in TRAINING_VERBS and recipe.output is None:
        found.append(
            Mistake(("output",), "`output` is not set: there is no folder for the run", "add `--output runs/NAME`")
        )
    if world_size is not None:
        found += check_layout(recipe, verb, world_size)
    return found


def _shapes(recipe: Recipe) -> Iterator[Mistake]:
    model, tensor = recipe.model, recipe.parallel.tensor
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if model.head_dim is None and model.hidden_size % heads:
        yield Mistake(
            ("model.num_attention_heads", "model.hidden_size"),
            f"`model.hidden_size` {model.hidden_size} cannot be divided into `model.num_attention_heads` {heads} heads",
            f"use {nearest_divisor(model.hidden_size, heads)} heads, or set `model.head_dim`",
        )
    elif model.position == "rotary" and head_dim(model) % 2:
        yield Mistake(
            ("model.head_dim", "model.hidden_size", "model.num_attention_heads"),
            f"rotary positions need an even head size; it is {head_dim(model)}",
            "choose another number of heads, or `model.position=learned`",
        )
    if heads % groups:
        yield Mistake(
            ("model.num_query_groups", "model.num_attention_heads"),
            f"`model.num_attention_heads` {heads} is not a multiple of `model.num_query_groups` {groups}",
            f"use {nearest_divisor(heads, groups)} query groups",
        )
    sliced = [
        ("model.num_attention_heads", heads),
        ("model.num_query_groups", groups),
        ("model.ffn_hidden_size", ffn_hidden_size(model)),
    ]
    if model.experts is not None:
        sliced.append(("model.experts.num_experts", model.experts.num_experts))
    for key, size in sliced:
        if size % tensor and (key != "model.num_query_groups" or groups != heads):
            yield Mistake(
                ("parallel.tensor", key),
                f"`{key}` {size} cannot be sliced over `parallel.tensor` {tensor} ranks",
                f"use `parallel.tensor={nearest_divisor(size, tensor)}`",
            )
    if model.vocab_size is not None:
        padded = padded_vocab_size(model)
        if padded % tensor:
            yield Mistake(
                ("parallel.tensor", "model.make_vocab_size_divisible_by", "model.vocab_size"),
                f"the padded vocabulary of {padded} rows cannot be sliced over `parallel.tensor` {tensor} ranks",
                f"use `model.make_vocab_size_divisible_by={model.make_vocab_size_divisible_by * tensor}`",
            )
    if model.head_dim is None and model.hidden_size % heads:
        return  # what follows from a head size that there is not would only repeat it
    try:
        hub_layout(model)
    except UsageError as error:
        keys = ("model.position", "model.norm", "model.activation", "model.num_query_groups", "model.head_dim")
        yield Mistake(keys, error.message, error.hint)


def _schedule(recipe: Recipe) -> Iterator[Mistake]:
    train, schedule = recipe.train, recipe.schedule
    if schedule.warmup_steps >= train.steps and not (recipe.task and recipe.task.epochs):
        yield Mistake(
            ("schedule.warmup_steps", "train.steps"),
            f"`schedule.warmup_steps` {schedule.warmup_steps} leaves nothing of `train.steps` {train.steps}",
            f"use `schedule.warmup_steps={train.steps // 100}` or more steps",
        )
    elif schedule.decay == "wsd" and (schedule.decay_steps or 0) + schedule.warmup_steps > train.steps:
        yield Mistake(
            ("schedule.decay_steps", "schedule.warmup_steps", "train.steps"),
            f"warm-up {schedule.warmup_steps} and decay {schedule.decay_steps} exceed `train.steps` {train.steps}",
            f"use `schedule.decay_steps={max(1, train.steps // 10)}`",
        )
    if schedule.min_lr > recipe.optimizer.lr:
        yield Mistake(
            ("schedule.min_lr", "optimizer.lr"),
            f"`schedule.min_lr` {schedule.min_lr:g} is above `optimizer.lr` {recipe.optimizer.lr:g}",
            f"use `schedule.min_lr={recipe.optimizer.lr / 10:g}`",
        )


def _rollback(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.train.on_bad_loss == "rollback" and recipe.checkpoint.every == 0:
        yield Mistake(
            ("train.on_bad_loss", "checkpoint.every"),
            "`train.on_bad_loss` rollback needs checkpoints to go back to, and `checkpoint.every` is 0",
            f"use `checkpoint.every={max(1, recipe.train.steps // 20)}`, or `train.on_bad_loss=skip`",
        )


def _time_limit(recipe: Recipe) -> Iterator[Mistake]:
    limit = recipe.train.time_limit
    try:
        if limit is not None:
            parse_duration(limit)
    except ValueError:
        yield Mistake(
            ("train.time_limit",),
            f"`train.time_limit` is `{limit}`, which is no length of time",
            "minutes or H:MM:SS, for example `train.time_limit=90` or `train.time_limit=1:30:00`",
        )


def _keep_best(recipe: Recipe) -> Iterator[Mistake]:
    every, evaluations = recipe.checkpoint.every, recipe.evaluate.every
    if recipe.checkpoint.keep_best and recipe.task is None and not (evaluations and every and every % evaluations == 0):
        yield Mistake(
            ("checkpoint.keep_best", "evaluate.every", "checkpoint.every"),
            f"`checkpoint.keep_best` needs a validation before each checkpoint, and `evaluate.every` is {evaluations}"
            f" with `checkpoint.every` {every}",
            f"use `evaluate.every={every or 1000}` and `checkpoint.every={every or 1000}`",
        )


def _data(data: DataSection) -> Iterator[Mistake]:
    separate = [name for name in ("train", "valid", "test") if getattr(data, name) is not None]
    if data.path is None and data.train is None:
        yield Mistake(
            ("data.path", "data.train"),
            "no training data: neither `data.path` nor `data.train` is set",
            "make some with `mlm preprocess`, then add `data.path=PREFIX`",
        )
    elif data.path is not None and separate:
        yield Mistake(
            (f"data.{separate[0]}", "data.path"),
            f"`data.path` and `data.{separate[0]}` are both set",
            f"one path with a `data.split`, or separate files: `data.path=null` or `data.{separate[0]}=null`",
        )
    for name in ("path", "train", "valid", "test"):
        if getattr(data, name) in ("", ()):
            yield Mistake((f"data.{name}",), f"`data.{name}` is empty", "give the prefix that `mlm preprocess` wrote")


def _tokenizer(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.tokenizer is None:
        yield Mistake(
            ("tokenizer",),
            "`tokenizer` is not set",
            "name the tokenizer the data was made with: `tokenizer=PATH_OR_NAME` (it travels with the model)",
        )


def _task(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.task is None:
        yield Mistake(
            ("task",), "`task` is not set: nothing to fine-tune on", "start from `mlm recipe show finetune/sst2`"
        )
    else:
        yield from check_task(recipe.task)
        if recipe.task.name in WRITTEN_KINDS and recipe.parallel.zero == 3 and recipe.evaluate.every:
            yield Mistake(
                ("parallel.zero", "evaluate.every", "task.name"),
                "`parallel.zero` 3 gathers weights for all ranks at once, and each writes texts at its own pace",
                "use `parallel.zero=2`, or `evaluate.every=0` and `mlm evaluate` afterwards",
            )
        if recipe.task.loss == "contrastive" and recipe.train.micro_batch_size < 2:
            yield Mistake(
                ("train.micro_batch_size", "task.loss"),
                "`task.loss` contrastive tells a pair from the others of its micro-batch, which holds only one",
                "use `train.micro_batch_size=64`, or as many as there is memory for",
            )
    if recipe.train.rampup is not None:
        yield Mistake(
            ("train.rampup",),
            "`train.rampup` is for pretraining alone",
            "use `train.rampup=null`, and schedule.warmup_steps",
        )
    if recipe.parallel.sequence:
        yield Mistake(
            ("parallel.sequence",),
            "`parallel.sequence` needs samples of one length, and texts differ",
            "use `parallel.sequence=false`",
        )
    if recipe.init_from is None:
        yield Mistake(
            ("init_from",),
            "`init_from` is not set: no model to start from",
            "add `init_from=RUN`, a pretrained run or folder",
        )


def _engine(recipe: Recipe) -> Iterator[Mistake]:
    """What cannot be combined, whatever the number of ranks."""
    train, parallel = recipe.train, recipe.parallel
    if train.engine == "deepspeed" and parallel.zero == 0:
        yield Mistake(
            ("train.engine", "parallel.zero"),
            "`train.engine` deepspeed needs `parallel.zero` of 1, 2 or 3",
            "use `parallel.zero=1`, or `train.engine=auto`",
        )
    if parallel.pipeline > 1 and (parallel.zero != 1 or train.engine == "plain"):
        yield Mistake(
            ("parallel.pipeline", "parallel.zero", "train.engine"),
            f"`parallel.pipeline` {parallel.pipeline} runs with ZeRO-1 on DeepSpeed alone: stages keep their gradients "
            "and weights over many micro-batches",
            "use `parallel.zero=1` and `train.engine=auto`, or `parallel.pipeline=1`",
        )
    layers = recipe.model.num_layers + (num_decoder_layers(recipe.model) if recipe.model.family == "t5" else 0)
    if parallel.pipeline > layers:
        yield Mistake(
            ("parallel.pipeline", "model.num_layers"),
            f"`model.num_layers` {layers} cannot fill `parallel.pipeline` {parallel.pipeline} stages",
            f"use `parallel.pipeline={layers}` or less",
        )
    if parallel.pipeline > 1 and recipe.init_from is not None:
        yield Mistake(
            ("parallel.pipeline", "init_from"),
            "`init_from` reads whole models, and a stage is a part of one",
            "use `parallel.pipeline=1`, with `parallel.tensor` or `parallel.zero=3` for large models",
        )
    if parallel.sequence and recipe.model.seq_length % parallel.tensor:
        yield Mistake(
            ("parallel.sequence", "model.seq_length", "parallel.tensor"),
            f"`model.seq_length` {recipe.model.seq_length} is not a multiple of `parallel.tensor` {parallel.tensor}",
            "use `parallel.sequence=false`",
        )
    yield from _offload(recipe)
    if train.compile and parallel.zero == 3:
        yield Mistake(
            ("train.compile", "parallel.zero"),
            "`train.compile` cannot follow weights that `parallel.zero` 3 gathers and lets go",
            "use `parallel.zero=2`, or `train.compile=false`",
        )


def _offload(recipe: Recipe) -> Iterator[Mistake]:
    parallel, keys = recipe.parallel, ("parallel.offload", "parallel.zero", "train.engine")
    if parallel.offload == "none":
        return
    if parallel.zero != 3 or recipe.train.engine == "plain":
        yield Mistake(
            keys,
            "`parallel.offload` goes with `parallel.zero` 3 alone: at 1 and 2 DeepSpeed would add gradients up "
            "in half precision",
            "use `parallel.zero=3` and `train.engine=auto`, or `parallel.offload=none`",
        )
    elif recipe.task is not None:
        yield Mistake(keys[:1], "`parallel.offload` is for pretraining alone", "use `parallel.offload=none`")
