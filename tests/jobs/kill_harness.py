"""Runs a recipe in forked children and kills them at random; a program of its own, so that nothing is forked in pytest.

``python kill_harness.py RECIPE KILLS SEED`` prints one JSON object: what happened at every kill and restart.

The parent imports everything once and forks one child an attempt: a child begins to train within a few hundredths of a
second, so that kills fall into training and saves and not into imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

MOMENTS = ("save", "step", "save", "step", "save", "step", "start")


def newest_complete(run: Path) -> int:
    """Step of the newest checkpoint all of whose files are what its manifest says; by nothing but hashlib."""
    for folder in sorted(run.glob("step-*"), reverse=True):
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
        except (OSError, ValueError):
            continue
        if all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == f["sha256"] for name, f in files.items()):
            return int(folder.name.removeprefix("step-"))
    return 0


def last_step(run: Path) -> int:
    """Newest step on record; a line torn by the kill does not count."""
    step = 0
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                step = int(json.loads(line)["step"])
            except ValueError:
                continue
    return step


def start(recipe_file: str, said: Path) -> int:
    """One attempt in a forked child; returns its process id."""
    from mlm_cli.config.resolve import resolve_recipe
    from mlm_cli.jobs import pretrain

    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = pretrain.run(resolve_recipe(recipe_file))
    finally:
        sys.stderr.flush()
        os._exit(code)


def is_saving(run: Path) -> bool:
    return run.is_dir() and any(path.name.startswith((".tmp-step", ".trash-")) for path in run.iterdir())


def has_begun(said: Path) -> bool:
    """Has it found its checkpoint, if there is one, and built the model?"""
    return said.exists() and " parameters, " in said.read_text(errors="replace")


def wait_and_kill(child: int, run: Path, said: Path, chance: random.Random, moment: str) -> int:
    """Kill at a random moment of a save, of training, or while it starts; its exit code, -9 unless it ended before."""
    begin = last_step(run)
    deadline = time.monotonic() + 60
    while moment != "start" and time.monotonic() < deadline:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(how)
        if has_begun(said) and (is_saving(run) if moment == "save" else last_step(run) != begin):
            break
        time.sleep(0.0005)
    time.sleep(chance.uniform(0.0, 0.02 if moment == "save" else 0.3))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    import torch

    from mlm_cli.jobs import pretrain  # noqa: F401 - before the forks

    torch.set_num_threads(1)
    recipe_file, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(int(sys.argv[3]))
    from mlm_cli.config.resolve import resolve_recipe

    run = Path(resolve_recipe(recipe_file).output or "")
    said = Path(recipe_file).with_suffix(".said")
    events: list[dict[str, Any]] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        before = newest_complete(run)
        said.unlink(missing_ok=True)
        child = start(recipe_file, said)
        if len(events) < kills:
            code = wait_and_kill(child, run, said, chance, MOMENTS[len(events) % len(MOMENTS)])
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        resumed = re.search(r"resuming .* from step-(\d+)", said.read_text(errors="replace") if said.exists() else "")
        resumed_step = int(resumed.group(1)) if resumed else 0 if has_begun(said) else None  # None: not so far
        events.append(
            {
                "resumed": resumed_step,
                "newest": before,
                "killed": code == -signal.SIGKILL,
                "last": last_step(run),
                "saving": is_saving(run),
            }
        )
    print(json.dumps({"exit": code, "events": events, "newest": newest_complete(run)}))


if __name__ == "__main__":
    main()
