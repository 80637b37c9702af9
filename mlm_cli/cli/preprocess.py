"""`mlm preprocess`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import DryRunFlag, FormatFlag, OutputFlag, QuietFlag, RecipeFlag, VerboseFlag, overlay
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.cli.preprocess_recipe import from_recipe, inputs_and_keys
from mlm_cli.cli.text_flags import (
    InputFormatFlag,
    InputsArgument,
    JsonKeyFlag,
    MaxLineFlag,
    OnBadLineFlag,
    OverwriteFlag,
    TxtDocumentsFlag,
    refuse,
)
from mlm_cli.errors import UsageError

if TYPE_CHECKING:
    from mlm_cli.jobs.preprocess import PreprocessRequest

TokenizerFlag = Annotated[
    str | None, typer.Option("--tokenizer", metavar="TOK", help="Folder, file, Hub name, or `bytes`.")
]
AppendEodFlag = Annotated[
    bool | None,
    typer.Option("--append-eod/--no-append-eod", help="End each document with the tokenizer's end token. [on]"),
]
SentencesFlag = Annotated[
    bool, typer.Option("--split-sentences", help="Each sentence a sequence; writes PREFIX_KEY_sentence.")
]
WorkersFlag = Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="Processes. [all cores]")]
BackendFlag = Annotated[
    Literal["auto", "gigatoken", "tokenizers"] | None,
    typer.Option("--backend", help="auto: the fastest that is right. [auto]"),
]
InspectFlag = Annotated[
    str | None, typer.Option("--inspect", metavar="PREFIX", help="Show a finished set: counts, first texts.")
]
DocumentsFlag = Annotated[
    int | None, typer.Option("--documents", min=0, metavar="N", help="--inspect: how many to show. [3]")
]
MergeFlag = Annotated[bool, typer.Option("--merge", help="Inputs are finished sets: join them into PREFIX.")]
# What a recipe says about the same things; flags win.
MERGED = ("tokenizer", "output", "json_key", "append_eod", "on_bad_line", "workers", "clean")


def preprocess(
    inputs: InputsArgument = None,
    tokenizer: TokenizerFlag = None,
    output: OutputFlag = None,
    json_key: JsonKeyFlag = None,
    input_format: InputFormatFlag = None,
    txt_documents: TxtDocumentsFlag = None,
    append_eod: AppendEodFlag = None,
    split_sentences: SentencesFlag = False,
    on_bad_line: OnBadLineFlag = None,
    max_line_mb: MaxLineFlag = None,
    workers: WorkersFlag = None,
    backend: BackendFlag = None,
    overwrite: OverwriteFlag = False,
    inspect: InspectFlag = None,
    documents: DocumentsFlag = None,
    merge: MergeFlag = False,
    recipe: RecipeFlag = None,
    dry_run: DryRunFlag = False,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Turn text into token files (Megatron's .bin/.idx) that training reads.

    INPUT is a .jsonl, .txt or .parquet file (also .gz or .zst), a folder, a pattern, a Hub data set
    (hf://owner/name[/config][:split]), or - for standard input. Writes PREFIX_text_document.bin and .idx, and
    PREFIX.json. A run that was stopped goes on when the same command is given again.

    \b
    Examples:
      mlm preprocess books/ --tokenizer bytes --output data/books
      mlm preprocess 'wiki/*.jsonl.gz' --tokenizer runs/tok --output data/wiki --workers 8
      zcat big.jsonl.gz | mlm preprocess - --tokenizer gpt2/ -o data/big --on-bad-line skip
      mlm preprocess --inspect data/wiki
      mlm preprocess --merge data/part1 data/part2 -o data/all
    """
    begin(quiet=quiet, verbose=verbose)
    given, keys = inputs_and_keys(inputs)
    reading: dict[str, Any] = {
        "--input-format": input_format,
        "--txt-documents": txt_documents,
        "--max-line-mb": max_line_mb,
    }
    reading |= {"--json-key": json_key, "--on-bad-line": on_bad_line, "--backend": backend, "--workers": workers}
    reading |= {"--append-eod": append_eod, "--no-append-eod": append_eod is False, "--recipe": recipe}
    reading |= {"--split-sentences": split_sentences, "KEY=VALUE": keys}
    if inspect is not None:
        writing = {"INPUT": given, "--output": output, "--overwrite": overwrite, "--merge": merge}
        refuse("`--inspect PREFIX`", writing | {"--dry-run": dry_run} | reading)
        return _inspect(inspect, tokenizer, 3 if documents is None else documents, format)
    refuse("`mlm preprocess` without `--inspect`", {"--documents": documents})
    if merge:
        refuse("`--merge`", {"--tokenizer": tokenizer} | reading)
        return _merge(given, output, overwrite, dry_run, format)
    flags = overlay(tokenizer=tokenizer, output=output, json_key=json_key, workers=workers)
    flags |= overlay(append_eod=append_eod, on_bad_line=on_bad_line)
    if recipe is not None or keys:
        merged = from_recipe(recipe, keys, given, flags)
        given, flags = merged.inputs, overlay(**{name: getattr(merged, name) for name in MERGED})
    if flags.get("tokenizer") is None:
        raise UsageError("no tokenizer given", hint="--tokenizer FOLDER, a Hub name, or `--tokenizer bytes`")
    flags |= overlay(input_format=input_format, txt_documents=txt_documents, backend=backend)
    flags |= overlay(max_line_mb=max_line_mb)
    flags |= {"output": _prefix(flags.get("output")), "json_key": tuple(flags.get("json_key") or ("text",))}
    from mlm_cli.jobs import preprocess as job

    request = job.PreprocessRequest(inputs=given, split_sentences=split_sentences, overwrite=overwrite, **flags)
    if dry_run:
        return _dry_run(request, format)
    summary = job.run(request)
    emit_json(summary) if format == "json" else emit(_text(summary))
    return 0


def _prefix(output: str | None) -> str:
    if output is None:
        raise UsageError("no output given", hint="--output PREFIX, for example --output data/wiki")
    if output.endswith("/") or Path(output).name in ("", ".", ".."):
        raise UsageError(f"`--output {output}` names a folder", hint=f"--output is a prefix: {Path(output, 'wiki')}")
    return output


def _inspect(prefix: str, tokenizer: str | None, documents: int, format: str) -> int:
    from mlm_cli.jobs.indexed_tools import inspect, inspection_text

    report = inspect(prefix, tokenizer=tokenizer, documents=documents)
    emit_json(report) if format == "json" else emit(inspection_text(report))
    return 0


def _merge(prefixes: tuple[str, ...], output: str | None, overwrite: bool, dry_run: bool, format: str) -> int:
    from mlm_cli.jobs.indexed_tools import merge

    summary = merge(prefixes, _prefix(output), overwrite=overwrite, dry_run=dry_run)
    if format == "json":
        emit_json(summary)
    else:
        emit(_text(summary) if not dry_run else "\n".join(f"would write {name}" for name in summary["outputs"]))
    return 0


def _dry_run(request: PreprocessRequest, format: str) -> int:
    from mlm_cli.jobs import preprocess as job
    from mlm_cli.jobs.preprocess_clean import filter_report

    work = job.plan(request)
    found = [source.__dict__ for source in work.sources]
    names = [f"{request.output}_{name}" for name in work.names.values()]
    report = {"inputs": found, "bytes": work.total_bytes, "outputs": names, "dtype": work.encode.dtype}
    if request.clean.active:
        report["filters"] = filter_report(request.clean)
    emit_json(report) if format == "json" else emit(_dry_text(report))
    return 0


def _dry_text(report: dict[str, Any]) -> str:
    lines = [f"{source['size']:>15,}  {source['format']:<8} {source['path']}" for source in report["inputs"]]
    lines.append(f"{report['bytes']:>15,}  bytes in all")
    lines += _filter_lines(report)
    return "\n".join([*lines, *(f"would write {name}.bin and .idx ({report['dtype']})" for name in report["outputs"])])


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{Path(summary['prefix']).with_name(output['prefix'])}: {output['tokens']:,} tokens, "
        f"{output['documents']:,} documents, {output['sequences']:,} sequences ({output['dtype']})"
        for output in summary["outputs"]
    ]
    if summary.get("skipped"):
        lines.append(f"{summary['skipped']:,} of {summary['read']:,} skipped: listed in {summary['prefix']}.bad.jsonl")
    if summary.get("removed"):
        count = f"{summary['removed']:,} of {summary['read']:,}"
        lines.append(f"{count} removed: listed in {summary['prefix']}.removed.jsonl")
    lines += _filter_lines(summary)
    if summary.get("empty_documents"):
        lines.append(f"{summary['empty_documents']:,} documents are empty")
    if "seconds" in summary and "backend" in summary:
        speed = f", {summary['mb_per_s']:,.1f} MB/s" if summary["bytes"] > 1e6 else ""
        lines.append(f"{summary['seconds']:.2f} s{speed}, backend {summary['backend']}")
    return "\n".join(lines)


def _filter_lines(report: dict[str, Any]) -> list[str]:
    from mlm_cli.jobs.preprocess_clean import filter_text

    return [f"  {filter_text(entry)}" for entry in report.get("filters", ())]
