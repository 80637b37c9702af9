"""Freed memory is kept: allocating it again costs no page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from mlm_cli.training.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported"); sys.exit()
def churn():
    for _ in range(20):
        torch.ones(12_000_000)
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_no_page_faults_for_memory_that_was_had_before() -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    faults = {}
    for mode in ("keep", "default"):
        out = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, env=env, check=True)
        if out.stdout.strip() == "unsupported":
            pytest.skip("not glibc")
        faults[mode] = int(out.stdout)
    assert faults["keep"] * 20 < faults["default"], faults


def test_the_users_own_setting_wins() -> None:
    env = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    out = subprocess.run([sys.executable, "-c", SCRIPT, "keep"], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.strip() == "unsupported"
