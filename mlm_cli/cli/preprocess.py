"""`mlm preprocess`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import DryRunFlag, FormatFlag, OutputFlag, QuietFlag, RecipeFlag, VerboseFlag, overlay
from mlm_cli.cli.output import emit, emit_json
from mlm_cli.cli.preprocess_recipe import from_recipe, inputs_and_keys
from mlm_cli.errors import UsageError


def preprocess(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="INPUT...", hidden=True)] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="TOK", help="Folder, file, Hub name, or `bytes`.")
    ] = None,
    output: OutputFlag = None,
    json_key: Annotated[
        list[str] | None,
        typer.Option("--json-key", metavar="KEY", help="Where the text is; repeat for one set a key. [text]"),
    ] = None,
    input_format: Annotated[
        Literal["auto", "jsonl", "txt", "parquet"], typer.Option("--input-format", help="auto: by the file's name.")
    ] = "auto",
    txt_documents: Annotated[
        Literal["file", "line"], typer.Option("--txt-documents", help="A .txt file: one document, or one a line.")
    ] = "file",
    append_eod: Annotated[
        bool | None,
        typer.Option("--append-eod/--no-append-eod", help="End each document with the tokenizer's end token. [on]"),
    ] = None,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="Each sentence a sequence; writes PREFIX_KEY_sentence.")
    ] = False,
    on_bad_line: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option("--on-bad-line", help="skip: left out, counted and listed. [stop]"),
    ] = None,
    max_line_mb: Annotated[
        float, typer.Option("--max-line-mb", metavar="MB", help="A longer line (or .txt document) is a bad one.")
    ] = 32.0,
    workers: Annotated[int | None, typer.Option("--workers", min=1, metavar="N", help="Processes. [all cores]")] = None,
    backend: Annotated[
        Literal["auto", "gigatoken", "tokenizers"],
        typer.Option("--backend", help="auto: the fastest that is right."),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is under PREFIX.")] = False,
    inspect: Annotated[
        str | None,
        typer.Option("--inspect", metavar="PREFIX", help="Show a finished set: counts, first texts."),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=0, metavar="N", help="--inspect: how many to show.")] = 3,
    merge: Annotated[bool, typer.Option("--merge", help="Inputs are finished sets: join them into PREFIX.")] = False,
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
    if recipe is not None or keys:
        flags = overlay(tokenizer=tokenizer, output=output, json_key=json_key, workers=workers)
        flags |= overlay(append_eod=append_eod, on_bad_line=on_bad_line)
        merged = from_recipe(recipe, keys, given, flags)
        given, tokenizer, output, workers = merged.inputs, merged.tokenizer, merged.output, merged.workers
        json_key, append_eod, on_bad_line = list(merged.json_key), merged.append_eod, merged.on_bad_line
    if inspect is not None:
        if given or merge:
            raise UsageError("`--inspect PREFIX` takes no input")
        from mlm_cli.jobs.indexed_tools import inspect as look
        from mlm_cli.jobs.indexed_tools import inspection_text

        report = look(inspect, tokenizer=tokenizer, documents=documents)
        emit_json(report) if format == "json" else emit(inspection_text(report))
        return 0
    if output is None:
        raise UsageError("no output given", hint="--output PREFIX, for example --output data/wiki")
    if merge:
        from mlm_cli.jobs.indexed_tools import merge as join

        summary = join(given, output, overwrite=overwrite)
        emit_json(summary) if format == "json" else emit(_text(summary))
        return 0
    if tokenizer is None:
        raise UsageError("no tokenizer given", hint="--tokenizer FOLDER, a Hub name, or `--tokenizer bytes`")
    from mlm_cli.jobs import preprocess as job

    request = job.PreprocessRequest(
        inputs=given,
        tokenizer=tokenizer,
        output=output,
        json_key=tuple(json_key or ("text",)),
        input_format=input_format,
        txt_documents=txt_documents,
        append_eod=append_eod is not False,
        split_sentences=split_sentences,
        on_bad_line=on_bad_line or "stop",
        max_line_mb=max_line_mb,
        workers=workers,
        backend=backend,
        overwrite=overwrite,
    )
    if dry_run:
        work = job.plan(request)
        found = [source.__dict__ for source in work.sources]
        names = [f"{output}_{name}" for name in work.names.values()]
        report = {"inputs": found, "bytes": work.total_bytes, "outputs": names, "dtype": work.encode.dtype}
        emit_json(report) if format == "json" else emit(_dry_text(report))
        return 0
    summary = job.run(request)
    emit_json(summary) if format == "json" else emit(_text(summary))
    return 0


def _dry_text(report: dict[str, Any]) -> str:
    lines = [f"{source['size']:>15,}  {source['format']:<8} {source['path']}" for source in report["inputs"]]
    lines.append(f"{report['bytes']:>15,}  bytes in all")
    return "\n".join([*lines, *(f"would write {name}.bin and .idx ({report['dtype']})" for name in report["outputs"])])


def _text(summary: dict[str, Any]) -> str:
    lines = [
        f"{Path(summary['prefix']).with_name(output['prefix'])}: {output['tokens']:,} tokens, "
        f"{output['documents']:,} documents, {output['sequences']:,} sequences ({output['dtype']})"
        for output in summary["outputs"]
    ]
    if summary.get("skipped"):
        lines.append(f"{summary['skipped']:,} of {summary['read']:,} skipped: listed in {summary['prefix']}.bad.jsonl")
    if summary.get("empty_documents"):
        lines.append(f"{summary['empty_documents']:,} documents are empty")
    if "seconds" in summary and "backend" in summary:
        speed = f", {summary['mb_per_s']:,.1f} MB/s" if summary["bytes"] > 1e6 else ""
        lines.append(f"{summary['seconds']:.2f} s{speed}, backend {summary['backend']}")
    return "\n".join(lines)
