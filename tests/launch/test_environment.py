"""Every launcher's variables lead to the same five."""

from __future__ import annotations

import pytest

from mlm_cli.errors import UsageError
from mlm_cli.launch.environment import adopt, detect, first_host, threads_per_rank


def test_alone() -> None:
    assert detect({}) is None
    assert detect({"RANK": "0"}) is None  # half of the variables is nobody's launch


@pytest.mark.parametrize(
    ("env", "launcher", "rank", "size", "local"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, "torchrun", 3, 4, 1),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "environment", 1, 2, 1),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MLM_SUPERVISED": "7"}, "mlm", 1, 2, 1),
        (
            {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "mpirun",
            5,
            8,
            1,
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}, "mpirun", 2, 4, 0),
        (
            {"SLURM_PROCID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"},
            "srun",
            9,
            16,
            1,
        ),
    ],
)
def test_launchers(env: dict[str, str], launcher: str, rank: int, size: int, local: int) -> None:
    found = detect(env)
    assert found is not None
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == (launcher, rank, size, local)


def test_a_slurm_batch_script_is_not_a_rank() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert detect(batch) is None
    assert detect({**batch, "SLURM_STEP_ID": "batch"}) is None


def test_slurm_finds_its_master() -> None:
    env = {
        "SLURM_PROCID": "9",
        "SLURM_STEP_ID": "2",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1234",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
    }
    joined = detect(env)
    assert joined is not None and joined.local_size == 8
    other = {**env, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    adopt(joined, env)
    first = detect(dict(other))
    assert first is not None
    adopt(first, other)
    assert env["MASTER_ADDR"] == other["MASTER_ADDR"] == "gpu007"
    assert env["MASTER_PORT"] == other["MASTER_PORT"]
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == ("9", "16", "1")
    assert int(env["OMP_NUM_THREADS"]) == threads_per_rank(8)


def test_what_the_user_set_stays() -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "OMP_NUM_THREADS": "5"}
    joined = detect(env)
    assert joined is not None
    adopt(joined, env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["OMP_NUM_THREADS"]) == ("a", "1", "5")


def test_mpi_over_several_machines_asks_for_the_address() -> None:
    env = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    joined = detect(env)
    assert joined is not None
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        adopt(joined, env)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_contradictions_are_usage_errors(env: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        detect(env)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-007,9],x", "gpu003"), ("node1,node2", "node1"), ("login", "login"), ("a-b[1,3]", "a-b1")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
