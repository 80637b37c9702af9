"""The operator tests run on the compiled kernels: a missing build is a failure wherever a compiler could make one."""

from __future__ import annotations

import shutil

import pytest
import torch

from mlm_cli.ops import registry


@pytest.fixture(scope="session")
def kernels() -> None:
    if registry.cpu_loaded:
        return
    if shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"):
        pytest.fail(f"compiled kernels are not in use although there is a compiler: {registry.cpu_reason}")
    pytest.skip(f"no C++ compiler on this machine: {registry.cpu_reason}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20240607)
