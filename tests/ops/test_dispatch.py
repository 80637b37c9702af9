"""Which backend runs, why, and that no failure of a build stops anyone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlm_cli import ops
from mlm_cli.ops import compiler, registry

ROOT = Path(__file__).resolve().parents[2]
STATUS = "from mlm_cli import ops; import torch; ops.rms_norm(torch.ones(2, 4), torch.ones(4)); print(ops.status()[0])"

# Loads the package as it is, but looking for libraries in another folder.
USE_FOLDER = """
import importlib.util, pathlib, sys
import mlm_cli
source = pathlib.Path(mlm_cli.__file__).parent / "ops" / "compiler.py"
spec = importlib.util.spec_from_file_location("mlm_cli.ops.compiler", source)
compiler = sys.modules["mlm_cli.ops.compiler"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)
compiler.LIBRARY_FOLDER = pathlib.Path({folder!r})
from mlm_cli import ops
from tests.ops.oracle import kernels  # noqa: F401
import torch
for _ in range(3):
    print(ops.rms_norm(torch.ones(2, 4), torch.ones(4)).sum())
print(ops.status()[0])
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_status_names_every_operator_with_a_reason() -> None:
    rows = ops.status()
    assert {row["name"] for row in rows} == set(registry.OPERATORS)
    assert all(row["backend"] in ("cuda", "cpu", "reference") and row["reason"] for row in rows)


def test_the_processor_chooses_and_a_lower_set_can_be_asked_for() -> None:
    assert registry.cpu_capability() in ops.status()[0]["reason"]
    done = _python(STATUS, MLM_CPU_ISA="plain")
    assert "'backend': 'cpu'" in done.stdout and "baseline" in done.stdout


def test_references_can_be_forced_without_a_warning() -> None:
    done = _python(STATUS, MLM_OPS="reference")
    assert "'backend': 'reference'" in done.stdout and "MLM_OPS=reference" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_missing_or_broken_library_gives_one_warning_and_the_reference(tmp_path: Path, damage: str) -> None:
    if damage == "garbage":
        (tmp_path / "libmlm_cpu.so").write_bytes(b"not a library")
    done = _python(USE_FOLDER.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "'backend': 'reference'" in done.stdout
    assert done.stderr.count("warning:") == 1 and "fused kernels are not used" in done.stderr


def test_no_compiler_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler.build("off") is False
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no C++ compiler found" in said and "reference" in said


def test_a_failed_compile_keeps_the_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "libmlm_cpu.so"
    old.write_bytes(b"old")
    failing = tmp_path / "failing-compiler"
    failing.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(compiler.BuildError, match="exited 3\nno such flag"):
        compiler.build_cpu(tmp_path)
    assert old.read_bytes() == b"old" and list(tmp_path.glob(".lib*")) == []


def test_cuda_architectures_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert compiler.cuda_architectures() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert compiler.cuda_architectures()[0].endswith("sm_75")


def test_cuda_sources_compile_and_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a CPU-only torch too: that library is then for inspection only."""
    nvcc = compiler.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA sources are not compiled here")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0"))
    library = compiler.build_cuda(tmp_path, nvcc=nvcc)
    names = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    for operator in ("layer_norm", "residual_norm_backward", "softmax_backward", "bias_gelu", "cross_entropy_stats"):
        assert f"mlm::cuda::(anonymous namespace)::{operator}(" in names
    assert (
        shutil.which("cuobjdump") is None
        or "sm_90" in subprocess.run(["cuobjdump", "--list-elf", str(library)], capture_output=True, text=True).stdout
    )


def test_float64_on_a_gpu_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cpu, is_cuda, dtype = False, True, torch.float64

    monkeypatch.setattr(registry, "cuda_loaded", True)
    assert registry.serves(OnGpu()) is False  # type: ignore[arg-type]
    OnGpu.dtype = torch.bfloat16
    assert registry.serves(OnGpu()) is True  # type: ignore[arg-type]
