"""The command surface is frozen: a flag that changes here changes for every job script out there."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.main import get_command

from mlm_cli.cli.app import VERBS, help_text, verb_app

SHARED = {
    "--recipe",
    "--output -o",
    "--nproc",
    "--hostfile",
    "--dry-run",
    "--format",
    "--quiet -q",
    "--verbose -v",
    "--seed",
}
TALK = {"--format", "--quiet -q", "--verbose -v"}
FROZEN: dict[str, set[str]] = {
    "pretrain": SHARED | {"--verify", "--replay"},
    "finetune": SHARED,
    "evaluate": SHARED | {"--task", "--data", "--stride", "--batch-size", "--limit", "--ensemble"},
    "generate": SHARED
    | {
        "--prompt",
        "--prompts",
        "--interactive",
        "--serve",
        "--host",
        "--port",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
    }
    | {"--repetition-penalty", "--stop", "--batch-size"},
    "convert": TALK
    | {
        "--to",
        "--dtype",
        "--tensor",
        "--pipeline",
        "--checkpoint-version",
        "--from-pickle",
        "--tokenizer",
        "--dry-run",
    },
    "plan": SHARED | {"--device-tflops", "--mfu"},
    "report": TALK | {"--output -o", "--smooth"},
    "doctor": TALK,
    "recipe ls": TALK,
    "recipe show": TALK | {"--recipe", "--output -o", "--resolved"},
    "recipe check": TALK | {"--recipe", "--nproc"},
    "recipe schema": TALK,
    "preprocess": TALK
    | {"--recipe", "--output -o", "--dry-run", "--tokenizer", "--workers", "--append-eod --no-append-eod"}
    | {"--json-key", "--on-bad-line", "--split-sentences", "--inspect", "--documents", "--merge", "--overwrite"}
    | {"--input-format", "--txt-documents", "--max-line-mb", "--backend"},
    "tokenizer train": TALK
    | {"--kind", "--vocab-size", "--output -o", "--json-key", "--input-format", "--txt-documents", "--on-bad-line"}
    | {"--max-line-mb", "--max-train-mb", "--min-frequency", "--lowercase", "--overwrite"}
    | {"--special-tokens", "--byte-fallback"},
    "tokenizer show": TALK,
}


def options(command: Any) -> set[str]:
    found = set()
    for parameter in command.params:
        names = [*getattr(parameter, "opts", ()), *getattr(parameter, "secondary_opts", ())]
        if names and names[0].startswith("-") and "--help" not in names:
            found.add(" ".join(sorted(names, key=lambda name: (not name.startswith("--"), "--no-" in name))))
    return found


def commands(verb: str) -> dict[str, Any]:
    command = get_command(verb_app(verb))
    inner = getattr(command, "commands", None)
    return {f"{verb} {name}": sub for name, sub in inner.items()} if inner else {verb: command}


@pytest.mark.parametrize("verb", list(VERBS))
def test_flags_are_frozen(verb: str) -> None:
    for name, command in commands(verb).items():
        assert options(command) == FROZEN[name], name


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_explains_itself_with_examples(verb: str) -> None:
    for name, command in commands(verb).items():
        assert "Examples:" in (command.help or ""), name
        assert f"mlm {name}" in (command.help or "").partition("Examples:")[2], name


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("preprocess", "tokenizer")])
def test_the_list_of_verbs_says_what_the_verb_says(verb: str) -> None:
    assert isinstance(verb_app(verb), typer.Typer)
    what = VERBS[verb][2]
    assert (get_command(verb_app(verb)).help or "").startswith(what.rstrip("."))
    assert what in help_text()
