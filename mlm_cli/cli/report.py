"""`mlm report`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import FormatFlag, OutputFlag, QuietFlag, VerboseFlag
from mlm_cli.cli.output import emit, emit_json


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders of pretrain or finetune.")],
    output: OutputFlag = None,
    smooth: Annotated[
        float,
        typer.Option("--smooth", min=0.0, max=0.999, metavar="SHARE", help="Of the past in a curve's running mean."),
    ] = 0.0,
    format: FormatFlag = "text",
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> int:
    """Compare runs: curves of loss, scores and speed.

    Reads metrics.jsonl and status.json, also of runs that are still going on. With --output, a folder with report.md
    and one picture for each curve (needs matplotlib).

    \b
    Examples:
      mlm report runs/bert
      mlm report runs/bert runs/bert-large --output report --smooth 0.9
      mlm report runs/bert --format json
    """
    begin(quiet=quiet, verbose=verbose)
    from mlm_cli.jobs.report import as_text, read_run, summary, write_report

    found = [read_run(run) for run in runs]
    if output is not None:
        write_report(found, output, smooth=smooth)
    if format == "json":
        emit_json({"runs": [summary(run) for run in found]})
    else:
        emit(as_text(found))
    return 0
