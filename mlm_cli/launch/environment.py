"""Which rank this process is, when some launcher started it: torchrun, deepspeed, srun, mpirun, or `mlm --nproc`.

Every launcher speaks its own environment variables; ``adopt`` translates them once to the names that
``distributed.init`` reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from mlm_cli.errors import UsageError

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class Joined:
    """This process as one rank of a job that something else started."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int


def detect(env: MutableMapping[str, str] | None = None) -> Joined | None:
    """The rank this process is, or None when nobody launched it as one.

    Raises:
        UsageError: the variables contradict each other.
    """
    env = os.environ if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "mlm" if "MLM_SUPERVISED" in env else "environment"
        return _joined(env, name, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in env:
        names = (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
        return _joined(env, "mpirun", *names)
    # A step number is there only under srun: a batch script and an interactive allocation are not ranks.
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_STEP_NUM_TASKS" in env:
        local_size = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])
        values = {**env, "_LOCAL_SIZE": re.split(r"\D", local_size)[0]}
        return _joined(values, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "_LOCAL_SIZE")
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        return _joined(env, "mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return None


def _joined(env: MutableMapping[str, str], launcher: str, rank: str, size: str, local: str, local_size: str) -> Joined:
    try:
        world_size = int(env[size])
        number = int(env[rank])
        found = Joined(launcher, number, world_size, int(env.get(local, number)), int(env.get(local_size, world_size)))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{launcher} set `{rank}` but no usable `{size}`: {error}", hint="unset these variables to run alone"
        ) from None
    if not 0 <= found.rank < found.world_size:
        raise UsageError(
            f"`{rank}` {found.rank} is outside `{size}` {found.world_size}",
            hint="unset both to run as a single process",
        )
    return found


def adopt(joined: Joined, env: MutableMapping[str, str] | None = None) -> None:
    """Set the variables that ``distributed.init`` reads, and a fair share of threads, where the launcher did not."""
    env = os.environ if env is None else env
    env["RANK"], env["WORLD_SIZE"] = str(joined.rank), str(joined.world_size)
    env["LOCAL_RANK"] = str(joined.local_rank)
    if joined.world_size > 1:
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _master_address(joined, env)
        env.setdefault("MASTER_PORT", str(_master_port(joined, env)))
    env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(joined.local_size)))


def threads_per_rank(local_size: int) -> int:
    """An equal share of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_size))


def _master_address(joined: Joined, env: MutableMapping[str, str]) -> str:
    if joined.local_size >= joined.world_size:
        return "127.0.0.1"
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST")
    if nodes and joined.launcher == "srun":
        return first_host(nodes)
    raise UsageError(
        f"{joined.launcher} started ranks on several machines and `MASTER_ADDR` is not set",
        hint="set MASTER_ADDR to the name of the first machine, for example `mpirun -x MASTER_ADDR=node1 ...`",
    )


def _master_port(joined: Joined, env: MutableMapping[str, str]) -> int:
    """The same port on every rank, and likely another one for another job on the same machine."""
    if joined.launcher == "srun":
        return 15000 + (int(env.get("SLURM_JOB_ID", "0")) * 16 + int(env["SLURM_STEP_ID"])) % 15000
    if joined.local_size >= joined.world_size:
        return 15000 + os.getppid() % 15000
    return DEFAULT_PORT


def first_host(nodelist: str) -> str:
    """The first machine of a Slurm node list such as ``gpu[003-007,9],login1``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if match is None:
        raise UsageError(f"cannot read the node list `{nodelist}`", hint="set MASTER_ADDR by hand")
    return match.group(1) + (match.group(2) or "")
