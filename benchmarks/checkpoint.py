"""Checkpoints: write rate against the disk's own, how long training waits, and how fast another layout resumes.

    python benchmarks/checkpoint.py                      # some 30M parameters, half a gigabyte: about 3 minutes
    python benchmarks/checkpoint.py --hidden 1024 --layers 12 --folder /scratch

The disk's own rate is that of one file of as many bytes, written in pieces of 64 MB and made durable (fsync), in turns
with the saves: through the page cache and past it, of which the faster counts. A save also hashes every byte and reads
it back, which the disk's rate does not. Resuming is timed from an open run folder to weights in place: on the layout
that wrote the checkpoint, and on others, which lay it out anew.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LENGTH = 256
# name -> ranks, and the layout that resumes what tensor 2 has written
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2 (as written)": (2, {"tensor": 2}),
    "one rank": (1, {}),
    "data 2, ZeRO-1": (2, {"zero": 1}),
    "data 2, ZeRO-3": (2, {"zero": 3}),
    "pipeline 2": (2, {"pipeline": 2}),
}


def on_ranks(size: int, role: str, args: argparse.Namespace, **layout: Any) -> dict[str, Any]:
    """Run this program as ``size`` ranks in the given role; what rank 0 found."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    env = {
        **os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [
        sys.executable, __file__, "--role", role, "--layout", json.dumps(layout), "--folder", args.folder,
        "--hidden", str(args.hidden), "--layers", str(args.layers), "--vocab", str(args.vocab),
        "--rounds", str(args.rounds),
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(size)
    ]
    out, _ = ranks[0].communicate()
    if any(rank.wait() for rank in ranks):
        raise SystemExit(f"error: {role} on {size} ranks failed")
    return json.loads(out.splitlines()[-1])


def build(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """This rank's group, model, engine and checkpointer."""
    from mlm_cli import distributed
    from mlm_cli.checkpoint.folder import RunFolder
    from mlm_cli.checkpoint.hub import save_model_folder
    from mlm_cli.checkpoint.save import Checkpointer, Identity
    from mlm_cli.config.schema import ModelSection
    from mlm_cli.models.registry import build_gpt
    from mlm_cli.parallel.context import ParallelContext
    from mlm_cli.training.engine import OptimizerSettings
    from mlm_cli.training.engine_choice import build_engine, choose_engine

    layout = dict(json.loads(args.layout))
    zero = layout.pop("zero", 1)
    parallel = ParallelContext.create(device=distributed.init().device, **layout)
    section = ModelSection(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.hidden // 64, seq_length=LENGTH,
        vocab_size=args.vocab,
    )  # fmt: skip
    import torch

    from mlm_cli.training.allocator import keep_freed_memory

    keep_freed_memory()  # as every job of training does
    model = build_gpt(section, parallel, seed=1)
    kind = choose_engine("auto", zero=zero, parallel=parallel)
    engine = build_engine(
        kind, model, parallel, OptimizerSettings(), dtype=torch.float32, accumulation=1, micro_batch_size=1, zero=zero
    )

    def write_model(folder: Path, position: Any, metrics: Any, later: Any = None) -> Any:
        return save_model_folder(model, folder, None, meta={}, later=later)

    checkpointer = Checkpointer(
        RunFolder(Path(args.folder) / "run"), engine, parallel, write_model=write_model,
        identity=Identity("benchmark"), keep_last=1, background=True,
    )  # fmt: skip
    return parallel, model, engine, checkpointer


def disk_seconds(folder: Path, size: int, *, direct: bool) -> float | None:
    """One file of ``size`` bytes (``direct``: past the page cache, whole blocks); None where that cannot be done."""
    piece = mmap.mmap(-1, 1 << 26)  # aligned to pages, as direct writing asks
    piece.write(os.urandom(1 << 26))
    path = folder / "disk"
    flags = os.O_WRONLY | os.O_CREAT | (getattr(os, "O_DIRECT", 0) if direct else 0)
    start = time.perf_counter()
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None  # a file system without direct writing
    try:
        left = size
        while left > 0:
            left -= os.write(descriptor, memoryview(piece)[: min(-(-left // 4096) * 4096, len(piece))])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def role_save(args: argparse.Namespace) -> dict[str, Any]:
    """Saves that training waits for and saves in the background, in turns with the disk alone."""
    from mlm_cli.checkpoint.state import Position

    parallel, _, _, checkpointer = build(args)
    run = checkpointer.run.path
    run.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {name: [] for name in ("disk", "direct", "waited", "blocked", "background")}
    size = 0
    for number in range(args.rounds):
        checkpointer.run.finish_removals()  # the disk's own rate is that of an idle disk
        parallel.world.barrier()
        if parallel.world.rank == 0 and size:
            for name in ("disk", "direct"):
                seconds = disk_seconds(run, size, direct=name == "direct")
                found[name] += [] if seconds is None else [seconds]
        parallel.world.barrier()
        saved = checkpointer.save(Position(2 * number + 1, 0))
        assert saved is not None
        found["waited"].append(saved.seconds)
        size = sum(path.stat().st_size for path in saved.folder.rglob("*") if path.is_file())
        checkpointer.save(Position(2 * number + 2, 0), wait=False)
        while checkpointer.writing:
            time.sleep(0.01)  # here training would go on
        parallel.world.barrier()
        saved = checkpointer.finish()
        assert saved is not None
        found["blocked"].append(saved.blocked)
        found["background"].append(saved.seconds)
    return {"bytes": size, **found}


def role_load(args: argparse.Namespace) -> dict[str, Any]:
    from mlm_cli.checkpoint.load import find_newest, load_state

    parallel, _, engine, checkpointer = build(args)
    parallel.world.barrier()
    start = time.perf_counter()
    found = find_newest(checkpointer.run)
    assert found is not None
    checked = time.perf_counter()
    load_state(found, engine, None, parallel)
    parallel.world.barrier()
    return {"verify": checked - start, "load": time.perf_counter() - checked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=str(HERE / "results" / "checkpoint-scratch"), help="on the disk to measure")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        found = {"save": role_save, "load": role_load}[args.role](args)
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        from mlm_cli import distributed

        distributed.leave(0)
    from interleave import save

    report: dict[str, Any] = {"saves": {}, "resume": {}}
    try:
        for name, size, layout in (("one rank", 1, {}), ("tensor 2", 2, {"tensor": 2})):
            shutil.rmtree(args.folder, ignore_errors=True)
            report["saves"][name] = tell_saves(name, on_ranks(size, "save", args, **layout))
        print(f"\n  {'resume at':<24}{'verify s':>10}{'load s':>9}")
        for name, (size, layout) in LAYOUTS.items():
            report["resume"][name] = row = on_ranks(size, "load", args, **layout)
            print(f"  {name:<24}{row['verify']:>10.2f}{row['load']:>9.2f}")
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(f"\nwritten to {save('checkpoint', report)}")


def tell_saves(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Print one layout's rates; the first save pays for memory and is left out."""
    alone = {name: statistics.median(found[name]) for name in ("disk", "direct") if found[name]}
    disk = min(alone.values())
    rows = {key: statistics.median(found[key][1:] or found[key]) for key in ("waited", "blocked", "background")}
    size = found["bytes"]
    print(f"\n{name}: {size / 1e6:,.0f} MB a checkpoint, disk alone {size / disk / 1e6:,.0f} MB/s")
    for kind, seconds in alone.items():
        label = "disk, " + {"disk": "page cache", "direct": "direct"}[kind]
        print(f"  {label:<20}{seconds:>7.2f} s{size / seconds / 1e6:>8,.0f} MB/s")
    for key, label in (("waited", "waited for"), ("background", "in the background")):
        share = disk / rows[key]
        print(f"  {label:<20}{rows[key]:>7.2f} s{size / rows[key] / 1e6:>8,.0f} MB/s{share:>7.0%} of the disk's rate")
    print(f"  {'training blocked':<20}{rows['blocked']:>7.2f} s of the background save")
    return {"megabytes": size / 1e6, "disk_seconds": alone, **rows, "share_of_disk": disk / rows["waited"]}


if __name__ == "__main__":
    main()
