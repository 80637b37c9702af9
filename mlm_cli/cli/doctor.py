"""`mlm doctor`."""

from __future__ import annotations

from mlm_cli.cli.app import begin
from mlm_cli.cli.flags import FormatFlag, QuietFlag, VerboseFlag
from mlm_cli.cli.output import emit, emit_json


def doctor(format: FormatFlag = "text", quiet: QuietFlag = False, verbose: VerboseFlag = False) -> int:
    """Report versions, devices and kernels, to paste into an issue.

    \b
    Examples:
      mlm doctor
      mlm doctor --format json
    """
    begin(quiet=quiet, verbose=verbose)
    from mlm_cli.jobs.doctor import as_text, examine

    report = examine()
    if format == "json":
        emit_json(report)
    else:
        emit(as_text(report))
    return 0
