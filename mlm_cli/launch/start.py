"""One job, however many ranks: in this process, as N of this machine, on many hosts, or as a rank others started."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlm_cli import log
from mlm_cli.errors import UsageError
from mlm_cli.launch import environment, hostfile, local
from mlm_cli.launch.rank_log import keep_log
from mlm_cli.launch.verdict import RANK_LOST


@dataclass(frozen=True)
class Ranks:
    """How the ranks of a job come to be.

    Attributes:
        how: ``here`` (one rank, in this process), ``local`` (``nproc`` processes of this machine), ``hosts``
            (DeepSpeed's launcher), ``joined`` (this process is already a rank).
        world_size: ranks of the whole job.
        detail: the launcher's name, or the hostfile.
    """

    how: str
    world_size: int
    detail: str | None = None
    nproc: int | None = None

    def describe(self) -> str:
        return {
            "here": "1 rank, in this process",
            "local": f"{self.world_size} ranks, as processes of this machine",
            "hosts": f"{self.world_size} ranks, on the hosts of {self.detail}",
            "joined": f"{self.world_size} ranks, started by {self.detail}",
        }[self.how]

    def command(self) -> list[str] | None:
        """What would be started; None when nothing is."""
        if self.how == "hosts" and self.detail is not None:
            return hostfile.build_command(self.detail, self.nproc, sys.argv[1:])
        return local.same_command() if self.how == "local" else None


def find_ranks(nproc: int | None, hosts: str | None) -> Ranks:
    """Decide how to run, before anything heavy is imported.

    Raises:
        UsageError: a bad hostfile or environment.
    """
    joined = environment.detect()
    if joined is not None:
        environment.adopt(joined)
        return Ranks("joined", joined.world_size, joined.launcher)
    if hosts is not None:
        return Ranks("hosts", hostfile.world_size(hostfile.read_hostfile(hosts), nproc), hosts, nproc)
    if nproc is not None and nproc > 1:
        return Ranks("local", nproc, nproc=nproc)
    return Ranks("here", 1)


def is_follower() -> bool:
    """True in a process that leaves words for the user to another: a rank of `mlm --nproc`, or any but the first."""
    return "MLM_SUPERVISED" in os.environ or os.environ.get("RANK", "0") != "0"


def run(
    ranks: Ranks, body: Callable[[], int | None], *, run_folder: str | None = None, share_terminal: bool = False
) -> int:
    """Run ``body`` on every rank and return the exit code of the job.

    Args:
        ranks: from ``find_ranks``.
        body: the job, called only in processes that are ranks.
        run_folder: its ``logs/`` keeps what every rank says.
        share_terminal: rank 0 reads from the terminal.
    """
    log_folder = Path(run_folder) / "logs" if run_folder else None
    try:
        if ranks.how == "local":
            code = local.run_local(
                local.same_command(), ranks.world_size, log_folder=log_folder, share_terminal=share_terminal
            )
            if code == RANK_LOST and run_folder is not None:
                record_loss(Path(run_folder))
            return code
        if ranks.how == "hosts" and ranks.detail is not None:
            return hostfile.run_hosts(ranks.detail, ranks.nproc, sys.argv[1:])
        local.die_with_parent()
        if log_folder is not None:
            keep_log(log_folder)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UsageError(f"cannot write to `{run_folder}`: {error.strerror}", hint="choose another --output") from None
    log.detail(ranks.describe())
    if not log.is_verbose():
        # Libraries tell each other what will change; the user can do nothing about it.
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category)
    return body() or 0


def record_loss(run_folder: Path) -> None:
    """Put the true exit code into ``status.json``: a lost rank wrote nothing, its neighbours what it did to them."""
    path = run_folder / "status.json"
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        if status.get("exit_code") != RANK_LOST:  # else a rank has said it better
            status.update(state="failed", exit_code=RANK_LOST, message="a rank was lost; see logs/")
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    except (OSError, ValueError) as error:
        log.detail(f"status.json not updated: {error}")
