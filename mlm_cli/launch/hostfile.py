"""Several machines: DeepSpeed's launcher starts the same command on every host of a hostfile."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlm_cli import log
from mlm_cli.errors import UsageError
from mlm_cli.launch.local import free_port

_LAUNCHER_LOG = re.compile(rb"\[\d{4}-\d\d-\d\d [^]]*\] \[(\w+)\] \[\w+\.py:\d+:")
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def read_hostfile(path: str) -> dict[str, int]:
    """Hosts and their slots, from lines ``NAME slots=N`` (DeepSpeed's and MPI's format).

    Raises:
        UsageError: no such file, or a line that is neither, with file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the hostfile `{path}`: {error.strerror}", hint="--hostfile FILE") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if match is None or int(match.group(2)) == 0:
            raise UsageError(
                f"{path}:{number}: `{line}` is not of the form `HOST slots=N`", hint="for example `node1 slots=8`"
            )
        if match.group(1) in hosts:
            raise UsageError(f"{path}:{number}: host `{match.group(1)}` is given twice", hint="keep one line a host")
        hosts[match.group(1)] = int(match.group(2))
    if not hosts:
        raise UsageError(f"the hostfile `{path}` names no host", hint="one line a host: `node1 slots=8`")
    return hosts


def world_size(hosts: dict[str, int], nproc: int | None) -> int:
    """Ranks over all hosts; ``nproc`` uses that many slots of each host.

    Raises:
        UsageError: a host has fewer slots than that.
    """
    if nproc is None:
        return sum(hosts.values())
    for host, slots in hosts.items():
        if nproc > slots:
            raise UsageError(
                f"`--nproc {nproc}`: host `{host}` has {slots} slots", hint=f"use `--nproc {slots}` or less"
            )
    return nproc * len(hosts)


def build_command(path: str, nproc: int | None, arguments: Sequence[str]) -> list[str]:
    """The command of DeepSpeed's launcher that starts ``mlm ARGUMENTS`` on every host."""
    hosts = read_hostfile(path)
    world_size(hosts, nproc)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={path}", "--no_local_rank"]
    if nproc is not None:
        command.append(f"--num_gpus={nproc}")
    if _is_here(hosts):
        # One machine, this one: no ssh server is needed.
        command += ["--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [*command, "--module", "mlm_cli", *arguments]


def run_hosts(path: str, nproc: int | None, arguments: Sequence[str]) -> int:
    """Start the job on all hosts and return its exit code.

    Raises:
        UsageError: several hosts, and no pdsh to reach them with.
    """
    hosts = read_hostfile(path)
    if not _is_here(hosts) and shutil.which("pdsh") is None:
        raise UsageError(
            "DeepSpeed's launcher reaches other hosts through `pdsh`, which is not installed",
            hint="install pdsh, or start the ranks with `srun mlm ...`, `mpirun mlm ...` or `torchrun -m mlm_cli ...`",
        )
    process = subprocess.Popen(build_command(path, nproc, arguments), stdout=subprocess.PIPE)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    assert process.stdout is not None
    for line in process.stdout:
        pass_on(line, tuple(hosts))
    code = process.wait()
    return code if code >= 0 else 128 - code


def pass_on(line: bytes, hosts: Sequence[str] = ()) -> None:
    """Keep stdout for data: DeepSpeed's launcher logs there too, and pdsh puts the host's name before every line."""
    for host in hosts:
        line = line.removeprefix(f"{host}: ".encode())
    match = _LAUNCHER_LOG.match(line)
    if match is None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    elif log.is_verbose() or (match.group(1) in (b"ERROR", b"CRITICAL") and b"exits with return code" not in line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def _is_here(hosts: dict[str, int]) -> bool:
    return len(hosts) == 1 and next(iter(hosts)) in (*LOCAL_NAMES, socket.gethostname())
