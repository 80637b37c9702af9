"""Hostfiles, and the command given to DeepSpeed's launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlm_cli.errors import UsageError
from mlm_cli.launch.hostfile import build_command, read_hostfile, run_hosts, world_size


def write(folder: Path, text: str) -> str:
    path = folder / "hosts"
    path.write_text(text)
    return str(path)


def test_reading(tmp_path: Path) -> None:
    hosts = read_hostfile(write(tmp_path, "# two nodes\nnode1 slots=8\n\nnode2 slots=4  # half\n"))
    assert hosts == {"node1": 8, "node2": 4}
    assert world_size(hosts, None) == 12 and world_size(hosts, 4) == 8
    with pytest.raises(UsageError, match="node2"):
        world_size(hosts, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", r"hosts:1: `node1`"),
        ("a slots=1\nb slots=x\n", r"hosts:2"),
        ("a slots=0\n", r"hosts:1"),
        ("a slots=1\na slots=1\n", r"hosts:2: .*twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_hostfile(write(tmp_path, text))


def test_missing_hostfile() -> None:
    with pytest.raises(UsageError, match="no/hosts"):
        read_hostfile("no/hosts")


def test_command(tmp_path: Path) -> None:
    path = write(tmp_path, "node1 slots=8\nnode2 slots=8\n")
    command = build_command(path, 4, ["pretrain", "debug/gpt", "seed=3"])
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert f"--hostfile={path}" in command and "--num_gpus=4" in command
    assert command[-5:] == ["--module", "mlm_cli", "pretrain", "debug/gpt", "seed=3"]
    assert "--no_ssh" not in command
    assert "--no_ssh" in build_command(write(tmp_path, "localhost slots=2\n"), None, [])


def test_several_hosts_without_pdsh_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match="pdsh"):
        run_hosts(write(tmp_path, "node1 slots=8\nnode2 slots=8\n"), None, [])


@pytest.mark.slow
def test_one_host_for_real(tmp_path: Path) -> None:
    """DeepSpeed's launcher starts our command twice on this machine, and each knows its rank."""
    hosts = write(tmp_path, "localhost slots=2\n")
    done = subprocess.run(
        build_command(hosts, None, ["doctor", "--format", "json"]), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert '"RANK": "0"' in done.stdout and '"RANK": "1"' in done.stdout and '"WORLD_SIZE": "2"' in done.stdout
