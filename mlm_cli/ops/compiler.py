"""Compiles ``csrc/`` into ``mlm_cli/ops/_lib``: ``python -m mlm_cli.ops.build [--cuda auto|off|on]``.

Stands alone (standard library only), so that an installer can load this one file and call ``build()``.

Plain compiler calls, no build system and no lock: objects go to a private folder and each library is moved into place
whole, so that two builds at once or a build that is killed leave either the old library or the new one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LIBRARY_FOLDER = Path(__file__).resolve().parent / "_lib"
# The oldest torch whose stable ABI has all we use (parallel_for, TORCH_BOX): one binary serves it and all later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

AVX512 = ["-DMLM_ISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
AVX2 = ["-DMLM_ISA_AVX2", "-mavx2", "-mfma", "-mf16c"]
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
COMMON += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
KERNEL_FLAGS = ["-fno-exceptions", "-Wno-maybe-uninitialized"]

# What nvcc 13 still compiles for, oldest to newest; TORCH_CUDA_ARCH_LIST overrides.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0")


class BuildError(Exception):
    """No compiler, or it failed; the message is one line followed by the compiler's own words."""


@dataclass(frozen=True)
class Compile:
    """One object file."""

    source: Path
    name: str
    flags: tuple[str, ...]


def source_folder() -> Path:
    """``csrc`` beside the package in a checkout, ``mlm_cli/_csrc`` in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "csrc", package / "_csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise BuildError(f"no C++ sources beside `{package}`: neither `csrc/` nor `mlm_cli/_csrc/`")


def schema_id(csrc: Path) -> int:
    """Hash of the schemas: a library compiled from others must not be called through these."""
    return int(hashlib.sha256((csrc / "ops.cpp").read_bytes()).hexdigest()[:15], 16)


def find_cxx() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no C++ compiler found ({wanted or 'g++, clang++ or c++'})")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or next((str(p) for p in [Path("/usr/local/cuda/bin/nvcc")] if p.is_file()), None)


def torch_folders() -> tuple[list[str], Path]:
    """Include flags and the library folder of the torch that will load the result, without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed: the operators are built against its headers")
    root = Path(spec.origin).parent
    return ["-isystem", str(root / "include"), "-isystem", str(root / "include/torch/csrc/api/include")], root / "lib"


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} failed: `{command[0]}` exited {done.returncode}\n{done.stderr.strip()[-4000:]}")


def _cpu_compiles(csrc: Path) -> list[Compile]:
    kernels = csrc / "cpu" / "kernels.cpp"
    units = [Compile(kernels, "kernels_plain", tuple(KERNEL_FLAGS))]
    if platform.machine().lower() in ("x86_64", "amd64"):
        units.append(Compile(kernels, "kernels_avx512bf16", (*KERNEL_FLAGS, *AVX512, "-mavx512bf16")))
        units.append(Compile(kernels, "kernels_avx512", (*KERNEL_FLAGS, *AVX512)))
        units.append(Compile(kernels, "kernels_avx2", (*KERNEL_FLAGS, *AVX2)))
    names = ("norm", "softmax", "attention", "activation", "training", "decode", "shared_memory", "select")
    units += [Compile(csrc / "cpu" / f"{name}.cpp", name, ()) for name in names]
    return [*units, Compile(csrc / "ops.cpp", "schemas", (f"-DMLM_SCHEMA_ID={schema_id(csrc)}",))]


def _jobs(count: int) -> int:
    return max(1, min(count, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)))


def _move_into_place(built: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(built, staged)
    staged.replace(target)


def build_cpu(folder: Path = LIBRARY_FOLDER) -> Path:
    """Compile and link the CPU library; returns its path.

    Raises:
        BuildError: no compiler or a failed one.
    """
    csrc, cxx = source_folder(), find_cxx()
    includes, torch_lib = torch_folders()
    units = _cpu_compiles(csrc)
    with tempfile.TemporaryDirectory(prefix="mlm-build-") as scratch:
        objects = [str(Path(scratch) / f"{unit.name}.o") for unit in units]

        def compile_one(index: int) -> None:
            unit = units[index]
            define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
            command = [cxx, *COMMON, *unit.flags, define, *includes, "-c", str(unit.source), "-o", objects[index]]
            _run(command, f"compiling `{unit.source.name}`")

        with ThreadPoolExecutor(_jobs(len(units))) as pool:
            list(pool.map(compile_one, range(len(units))))
        built = Path(scratch) / "libmlm_cpu.so"
        _run([cxx, "-shared", "-o", str(built), *objects, f"-L{torch_lib}", "-ltorch_cpu", "-ltorch"], "linking")
        _move_into_place(built, folder / built.name)
    return folder / "libmlm_cpu.so"


def cuda_architectures() -> list[str]:
    """``-gencode`` flags, from ``TORCH_CUDA_ARCH_LIST`` (``"8.0;9.0+PTX"``) or the default list."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", " ").replace(";", " ").split()
    flags = []
    for entry in listed or [*CUDA_ARCHITECTURES[:-1], CUDA_ARCHITECTURES[-1] + "+PTX"]:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def build_cuda(folder: Path = LIBRARY_FOLDER, *, nvcc: str | None = None) -> Path:
    """Compile and link the CUDA library; it loads beside any torch from 2.10 on that has CUDA, here or elsewhere.

    Raises:
        BuildError: no nvcc or a failed one.
    """
    nvcc = nvcc or find_nvcc()
    if nvcc is None:
        raise BuildError("no CUDA compiler found (`nvcc` on PATH or CUDA_HOME)")
    csrc = source_folder()
    includes, torch_lib = torch_folders()
    sources = sorted((csrc / "cuda").glob("*.cu"))
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *cuda_architectures(), *includes]
    flags += ["--threads", str(_jobs(len(CUDA_ARCHITECTURES)))]  # architectures side by side
    with tempfile.TemporaryDirectory(prefix="mlm-build-") as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]

        def compile_one(index: int) -> None:
            _run([nvcc, *flags, "-c", str(sources[index]), "-o", objects[index]], f"compiling `{sources[index].name}`")

        with ThreadPoolExecutor(_jobs(len(sources))) as pool:
            list(pool.map(compile_one, range(len(sources))))
        built = Path(scratch) / "libmlm_cuda.so"
        link = [nvcc, "-shared", "-o", str(built), *objects, f"-L{torch_lib}", "-ltorch_cpu", "-ltorch"]
        if not _torch_has_cuda():
            # The library is for another machine, whose torch has CUDA: it must ask for that part of torch by name.
            stub = [find_cxx(), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", os.devnull]
            _run([*stub, "-o", str(Path(scratch) / "libtorch_cuda.so")], "linking")
            link.append(f"-L{scratch}")
        _run([*link, "-Xlinker", "--no-as-needed", "-ltorch_cuda"], "linking")
        _move_into_place(built, folder / built.name)
    return folder / "libmlm_cuda.so"


def _torch_has_cuda() -> bool:
    try:
        return (torch_folders()[1] / "libtorch_cuda.so").is_file()
    except BuildError:  # no torch: building for the CPU will say so
        return False


def build(cuda: str = "auto") -> bool:
    """Build what this machine can build, saying one line for each library. Returns False if something wanted failed.

    ``cuda``: ``off``, ``on`` (a failure counts), or ``auto`` (where torch has CUDA and nvcc is found).
    """
    wanted: dict[str, Callable[[], Path]] = {"CPU": build_cpu}
    if cuda == "on" or (cuda == "auto" and find_nvcc() and _torch_has_cuda()):
        wanted["CUDA"] = build_cuda
    good = True
    with ThreadPoolExecutor(len(wanted)) as pool:
        for name, building in [(name, pool.submit(make)) for name, make in wanted.items()]:
            try:
                say(f"built {building.result()}")
            except BuildError as failure:
                say(f"{name} kernels not built, the plain-torch reference will run instead: {failure}")
                good = False
    return good


def say(line: str) -> None:
    sys.stderr.write(f"mlm ops: {line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mlm_cli.ops.build", description="Build the fused kernels.")
    parser.add_argument("--cuda", choices=("auto", "off", "on"), default="auto")
    return 0 if build(parser.parse_args().cuda) else 1


if __name__ == "__main__":
    raise SystemExit(main())
