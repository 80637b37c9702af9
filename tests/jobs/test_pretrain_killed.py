"""SIGKILL at random moments, half of them inside a save: it goes on from the newest complete checkpoint, to the same
end by the SHA-256 of every file of model/ and state/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import fingerprints, losses, make_recipe, metrics, write_data

from mlm_cli.checkpoint.folder import RunFolder
from mlm_cli.config.resolve import write_recipe
from mlm_cli.jobs import pretrain

ROOT = Path(__file__).resolve().parents[2]
EVERY = 4


def kill_often(folder: Path, kills: int, steps: int, *, background: bool, seed: int) -> dict[str, Any]:
    """A calm run and one that is killed, of the same recipe; what the harness saw."""
    data = write_data(folder / "data")
    changes: dict[str, Any] = {
        "train__steps": steps,
        "checkpoint__every": EVERY,
        "checkpoint__keep_last": 2,
        "checkpoint__background": background,
        "evaluate__every": 0,
        "schedule": {"warmup_steps": 3, "decay_steps": steps},
    }
    for name in ("calm", "killed"):
        write_recipe(make_recipe(data, folder / name / "run", **changes), folder / f"{name}.yaml")
    assert pretrain.run(make_recipe(data, folder / "calm" / "run", **changes)) == 0
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_harness.py")), "killed.yaml", str(kills), str(seed)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder: Path, found: dict[str, Any], kills: int, steps: int, *, background: bool) -> None:
    events = found["events"]
    assert found["exit"] == 0 and found["newest"] == steps
    assert sum(event["killed"] for event in events) == kills, "the run ended before it was killed often enough"
    for number, event in enumerate(events):
        if event["resumed"] is not None:  # else it was killed before it came so far
            assert event["resumed"] == event["newest"], f"restart {number} did not go on from the newest complete one"
    # In the background the save of one interval may be under way while the next is trained.
    most = EVERY * (2 if background else 1)
    lost = [event["last"] - after["newest"] for event, after in pairwise(events)]
    assert max(lost) <= most and min(lost) >= 0, lost
    calm, killed = folder / "calm" / "run", folder / "killed" / "run"
    last = f"step-{steps:08d}"
    assert fingerprints(killed / last) == fingerprints(calm / last)
    assert losses(killed) == losses(calm) and [record["step"] for record in metrics(killed)] == list(
        range(1, steps + 1)
    )
    assert not [path.name for path in killed.iterdir() if path.name.startswith((".tmp", ".trash"))]
    assert RunFolder(killed).steps() == RunFolder(calm).steps()


def test_killed_a_few_times(tmp_path: Path) -> None:
    found = kill_often(tmp_path, 3, 80, background=True, seed=1)
    check(tmp_path, found, 3, 80, background=True)


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_killed_fifty_times(background: bool, tmp_path: Path) -> None:
    steps = 1200
    found = kill_often(tmp_path, 50, steps, background=background, seed=2)
    check(tmp_path, found, 50, steps, background=background)
    inside = sum(event["saving"] for event in found["events"])
    print(f"\n50 kills, {inside} inside a save; most steps lost: ", end="")
    events = found["events"]
    print(max(event["last"] - after["newest"] for event, after in pairwise(events)))
    assert inside >= 10
