"""The console entry point: finds the verb, loads only that one, and turns every failure into an exit code.

``mlm --help`` and usage errors load no verb and no heavy library; a verb's file loads its job inside its body.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NoReturn

from mlm_cli import __version__, log
from mlm_cli.cli.early_stop import leaving
from mlm_cli.cli.failures import exit_code_of

if TYPE_CHECKING:
    import typer

# verb -> module, name of its function or group there, what it does
VERBS: dict[str, tuple[str, str, str]] = {
    "preprocess": ("mlm_cli.cli.preprocess", "preprocess", "Turn text into token files that training reads."),
    "tokenizer": ("mlm_cli.cli.tokenizer", "tokenizer_app", "Train or inspect a tokenizer."),
    "pretrain": ("mlm_cli.cli.pretrain", "pretrain", "Train a language model from scratch, or resume a run."),
    "finetune": ("mlm_cli.cli.finetune", "finetune", "Fine-tune a pretrained model on a task."),
    "evaluate": ("mlm_cli.cli.evaluate", "evaluate", "Score a model and write results.json."),
    "generate": ("mlm_cli.cli.generate", "generate", "Continue prompts with a model."),
    "report": ("mlm_cli.cli.report", "report", "Compare runs: curves of loss, scores and speed."),
    "convert": ("mlm_cli.cli.convert", "convert", "Convert a model between mlm, transformers and Megatron-LM."),
    "plan": ("mlm_cli.cli.plan", "plan", "Say what a recipe needs: ranks, memory, FLOPs, time."),
    "recipe": ("mlm_cli.cli.recipe", "recipe_app", "List, show and check recipes."),
    "doctor": ("mlm_cli.cli.doctor", "doctor", "Report versions, devices and kernels, to paste into an issue."),
}
TRAINING = ("pretrain", "finetune")

HELP = """\
Usage: mlm VERB [OPTIONS] ...

Megatron-LM as a command suite: from raw text to a pretrained, fine-tuned,
evaluated and talking language model, on a laptop or a cluster.

Verbs:
{verbs}

Options:
  --version   Print the version.
  -h, --help  Show this message.

Every verb explains itself with examples: mlm VERB --help
A first run, of seconds, on any text:
  mlm preprocess book.txt --tokenizer bytes --output data/book
  mlm pretrain debug/gpt data.path=data/book --output runs/first
"""


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    from mlm_cli import distributed

    distributed.leave(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Every exception becomes a message on stderr and an exit code (DESIGN section 1)."""
    try:
        try:
            code = _dispatch(list(arguments))
        finally:
            sys.stdout.flush()
        return code
    except BaseException as error:
        return exit_code_of(error, arguments)


def _dispatch(arguments: list[str]) -> int:
    from mlm_cli.errors import UsageError

    if not arguments:
        sys.stderr.write(help_text())
        return UsageError.exit_code
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0
    if first == "--version":
        sys.stdout.write(f"mlm {__version__}\n")
        return 0
    if first.startswith("-"):
        hint = "mlm VERB [OPTIONS] ...; `mlm --help` lists the verbs"
        raise UsageError(f"no such option `{first}` before the verb", hint=hint)
    if first not in VERBS:
        close = difflib.get_close_matches(first, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean `mlm {close[0]}`?" if close else "`mlm --help` lists the verbs"
        raise UsageError(f"no such command `{first}`", hint=hint)
    return run_verb(first, arguments[1:])


def help_text() -> str:
    width = max(map(len, VERBS))
    return HELP.format(verbs="\n".join(f"  {verb:<{width}}  {what}" for verb, (_, _, what) in VERBS.items()))


def run_verb(verb: str, arguments: list[str]) -> int:
    """Load one verb and run it."""
    with leaving() if verb in TRAINING else nullcontext():
        from typer.main import get_command

        command = get_command(verb_app(verb))
        result = command.main(args=arguments, prog_name=f"mlm {verb}", standalone_mode=False)
        return result if isinstance(result, int) else 0


def verb_app(verb: str) -> typer.Typer:
    """The typer application of one verb: a group as it is, a function as the only command."""
    import typer

    module, name, _ = VERBS[verb]
    found = getattr(importlib.import_module(module), name)
    if isinstance(found, typer.Typer):
        return found
    app = new_app()
    app.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})(found)
    return app


def new_app(**settings: object) -> typer.Typer:
    """A typer application with our manners: plain help (rich markup costs start-up time), no completion options."""
    import typer

    os.environ.setdefault("TYPER_USE_RICH", "0")
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings)  # type: ignore[arg-type]


def begin(*, quiet: bool, verbose: bool) -> None:
    """First line of every verb: how much to say."""
    from mlm_cli.errors import UsageError

    if quiet and verbose:
        raise UsageError("`--quiet` and `--verbose` exclude each other", hint="use one of them")
    log.setup(quiet=quiet, verbose=verbose)
