"""`mlm tokenizer train|show`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mlm_cli.cli.app import begin, new_app
from mlm_cli.cli.flags import FormatFlag, OutputFlag, QuietFlag, VerboseFlag, overlay
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.cli.text_flags import (
    InputFormatFlag,
    InputsArgument,
    JsonKeyFlag,
    MaxLineFlag,
    OnBadLineFlag,
    OverwriteFlag,
    TxtDocumentsFlag,
)
from mlm_cli.errors import UsageError

tokenizer_app = new_app(help="Train or inspect a tokenizer.", context_settings={"help_option_names": ["-h", "--help"]})


KindFlag = Annotated[
    Literal["bpe", "wordpiece", "unigram"], typer.Option("--kind", help="bpe: byte-level, as GPT-2's.")
]
VocabSizeFlag = Annotated[
    int | None, typer.Option("--vocab-size", min=1, metavar="N", help="Tokens, special ones included.")
]
LowercaseFlag = Annotated[bool, typer.Option("--lowercase", help="Lower-case all text.")]
MinFrequencyFlag = Annotated[
    int, typer.Option("--min-frequency", min=1, metavar="N", help="bpe, wordpiece: pairs seen less are not merged.")
]
SpecialTokensFlag = Annotated[
    Literal["gpt", "bert", "t5"] | None,
    typer.Option("--special-tokens", help="Whose to reserve. [bpe: gpt, wordpiece: bert, unigram: t5]"),
]
ByteFallbackFlag = Annotated[
    bool, typer.Option("--byte-fallback", help="unigram: spell characters without a token in bytes.")
]
MaxTrainFlag = Annotated[
    float | None, typer.Option("--max-train-mb", metavar="MB", help="Learn from the first MB of text only.")
]


@tokenizer_app.command("train")
def train(
    inputs: InputsArgument = None,
    kind: KindFlag = "bpe",
    vocab_size: VocabSizeFlag = None,
    output: OutputFlag = None,
    json_key: JsonKeyFlag = None,
    input_format: InputFormatFlag = None,
    txt_documents: TxtDocumentsFlag = None,
    on_bad_line: OnBadLineFlag = None,
    max_line_mb: MaxLineFlag = None,
    lowercase: LowercaseFlag = False,
    min_frequency: MinFrequencyFlag = 2,
    special_tokens: SpecialTokensFlag = None,
    byte_fallback: ByteFallbackFlag = False,
    max_train_mb: MaxTrainFlag = None,
    overwrite: OverwriteFlag = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Train a tokenizer from text.

    INPUT is what `mlm preprocess` reads. Writes a folder with tokenizer.json and tokenizer_config.json, which
    transformers' AutoTokenizer opens too.

    \b
    Examples:
      mlm tokenizer train books/ --vocab-size 8192 --output runs/tok
      mlm tokenizer train 'wiki/*.jsonl.gz' --kind wordpiece --lowercase --vocab-size 30522 -o runs/bert-tok
      mlm tokenizer train big.parquet --kind unigram --vocab-size 32000 --max-train-mb 500 -o runs/uni
    """
    begin(quiet=quiet, verbose=verbose)
    if output is None:
        raise UsageError("no output given", hint="--output DIR, for example --output runs/tok")
    if vocab_size is None:
        raise UsageError("no vocabulary size given", hint="--vocab-size N, for example --vocab-size 8192")
    from mlm_cli.jobs import tokenizer as job

    given = overlay(input_format=input_format, txt_documents=txt_documents, on_bad_line=on_bad_line)
    given |= overlay(json_key=tuple(json_key) if json_key else None)
    given |= overlay(max_line_mb=max_line_mb, max_train_mb=max_train_mb)
    request = job.TrainRequest(
        inputs=tuple(inputs or ()),
        output=output,
        kind=kind,
        vocab_size=vocab_size,
        lowercase=lowercase,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
        byte_fallback=byte_fallback,
        overwrite=overwrite,
        **given,
    )
    report = job.train(request)
    emit_json(report) if format == "json" else emit(job.description_text(report))
    return 0


@tokenizer_app.command("show")
def show(
    tokenizer: Annotated[str, typer.Argument(metavar="DIR", help="Folder, file, Hub name, or `bytes`.")],
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Describe a tokenizer: kind, size, special tokens, which backend encodes with it and why.

    \b
    Examples:
      mlm tokenizer show runs/tok
      mlm tokenizer show bytes --format json
    """
    begin(quiet=quiet, verbose=verbose)
    from mlm_cli.jobs import tokenizer as job

    report = job.show(tokenizer)
    emit_json(report) if format == "json" else emit(job.description_text(report))
    return 0
