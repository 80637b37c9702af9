"""`mlm convert`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import DryRunFlag, FormatFlag, KeysArgument, QuietFlag, VerboseFlag, split_arguments
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.errors import UsageError

SourceArgument = Annotated[str | None, typer.Argument(metavar="SRC", hidden=True)]
TargetArgument = Annotated[str | None, typer.Argument(metavar="DST", hidden=True)]
ToFlag = Annotated[Literal["hf", "megatron", "mlm"] | None, typer.Option("--to", help="Layout of DST.")]
DtypeFlag = Annotated[
    Literal["auto", "fp32", "bf16", "fp16", "int8"],
    typer.Option("--dtype", help="Of the weights in DST; auto: as in SRC. int8: the layers' matrices."),
]
TensorFlag = Annotated[int | None, typer.Option("--tensor", min=1, metavar="N", help="megatron: tensor ranks.")]
PipelineFlag = Annotated[int | None, typer.Option("--pipeline", min=1, metavar="N", help="megatron: stages.")]
VersionFlag = Annotated[
    float | None,
    typer.Option("--checkpoint-version", metavar="V", help="megatron: 0, 1, 2 or 3, which today's reads too."),
]
PickleFlag = Annotated[
    bool, typer.Option("--from-pickle", help="SRC holds pytorch_model.bin: read the weights in it, run nothing.")
]
TokenizerFlag = Annotated[
    str | None, typer.Option("--tokenizer", metavar="TOK", help="Instead of the one beside SRC: folder, file or name.")
]


def convert(
    source: SourceArgument = None,
    target: TargetArgument = None,
    keys: KeysArgument = None,
    to: ToFlag = None,
    dtype: DtypeFlag = "auto",
    tensor: TensorFlag = None,
    pipeline: PipelineFlag = None,
    checkpoint_version: VersionFlag = None,
    from_pickle: PickleFlag = False,
    tokenizer: TokenizerFlag = None,
    dry_run: DryRunFlag = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Convert a model between mlm, transformers and Megatron-LM.

    SRC is a run, checkpoint or Hugging Face folder, a Hub name, or a checkpoint folder of Megatron-LM in its classic
    layout (latest_checkpointed_iteration.txt, iter_0000123/mp_rank_00/...), of any number of ranks. DST must not exist;
    it appears when all of it is written. The tokenizer goes along.
    hf: a folder for transformers. mlm: a checkpoint folder (model/ in the same layout, and a manifest with a sha256 of
    every file), without optimizer state. megatron: the classic layout for --tensor x --pipeline ranks.
    Keys model.* are for files of Megatron-LM that lack the number of heads, or of tokens without padding.

    \b
    Examples:
      mlm convert runs/gpt exported --to hf --dtype bf16
      mlm convert runs/gpt small --to mlm --dtype int8
      mlm convert openai-community/gpt2 megatron/gpt2 --to megatron --tensor 2 --pipeline 2
      mlm convert megatron/gpt2 gpt2 --to hf
      mlm convert release/ old --to mlm --tokenizer gpt2/ model.num_attention_heads=16
      mlm convert old-download/ new --to hf --from-pickle
    """
    begin(quiet=quiet, verbose=verbose)
    words, overrides = split_arguments(source, [word for word in (target, *(keys or ())) if word is not None])
    if len(words) != 2:
        what = (
            "no SRC given" if not words else "no DST given" if len(words) == 1 else f"one word too many: `{words[2]}`"
        )
        raise UsageError(what, hint="mlm convert SRC DST --to hf|megatron|mlm")
    if to is None:
        raise UsageError("no target layout given", hint="--to hf, --to megatron or --to mlm")
    layout = {"--tensor": tensor, "--pipeline": pipeline, "--checkpoint-version": checkpoint_version}
    if to != "megatron":
        given = [name for name, value in layout.items() if value is not None]
        if given:
            raise UsageError(
                f"`{given[0]}` is for `--to megatron`",
                hint=f"a folder for `--to {to}` is read at any size: leave it out",
            )
    settings = _model_keys(overrides)
    from mlm_cli.jobs import convert as job

    request = job.ConvertRequest(
        source=words[0],
        target=words[1],
        to=to,
        dtype=dtype,
        tensor=tensor or 1,
        pipeline=pipeline or 1,
        checkpoint_version=3.0 if checkpoint_version is None else checkpoint_version,
        from_pickle=from_pickle,
        tokenizer=tokenizer,
        model_keys=tuple(settings.items()),
    )
    report = job.plan(request) if dry_run else job.run(request)
    emit_json(report) if format == "json" else emit(job.report_text(report))
    return 0


def _model_keys(overrides: list[str]) -> dict[str, Any]:
    """``model.*`` overrides by name.

    Raises:
        UsageError: another key.
    """
    if not overrides:
        return {}
    from mlm_cli.config.keys import suggest
    from mlm_cli.config.schema import ModelSection
    from mlm_cli.config.yaml_text import parse_value

    found: dict[str, Any] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        name = key.removeprefix("model.")
        if not key.startswith("model.") or name not in ModelSection.model_fields:
            near = suggest(key)
            hint = (
                f"did you mean `{near}`?" if near and near.startswith("model.") else "only model.* keys are taken here"
            )
            raise UsageError(f"`{key}` is not a key of `mlm convert`", hint=hint)
        found[name] = parse_value(value)
    return found
