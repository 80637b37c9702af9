"""Preprocessing JSON lines with GPT-2's BPE against `datasets.map` with `tokenizers`, wall time from a cold start.

    python benchmarks/preprocess.py                       # 20 and 80 MB, 5 rounds: about 5 minutes on two cores
    python benchmarks/preprocess.py --megabytes 20 --rounds 2

Each turn is a command of its own, from the start of its interpreter to its end. Contenders take turns; ratios are
medians of pairs, beside `mlm` against itself. The rival is the usual script (as nanoGPT's prepare.py): load_dataset,
map in batches with as many processes, ids into one memory-mapped file. Both outputs are compared byte by byte.
Processor seconds of the whole process tree are given too, as they hardly depend on what else the machine does.

The tokenising itself is timed in one process with a warm cache of words: encoding the documents into the u16 array that
is written, ends of documents included, against the same backend whose results are dropped (called text by text, as we
call it, and in batches), and in batches with the same array made from the result.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from interleave import save

ROOT = Path(__file__).resolve().parents[1]
MLM = [sys.executable, "-c", "from mlm_cli.cli.app import main; main()", "preprocess"]
RIVAL = """
import sys
import numpy as np
from datasets import load_dataset
from tokenizers import Tokenizer

source, tokenizer_json, output, processes, cache = sys.argv[1:6]
tokenizer = Tokenizer.from_file(tokenizer_json)
end = tokenizer.token_to_id("<|endoftext|>")


def encode(batch):
    found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
    ids = [one.ids + [end] for one in found]
    return {"ids": ids, "len": [len(one) for one in ids]}


data = load_dataset("json", data_files=source, split="train", cache_dir=cache)
data = data.map(encode, batched=True, remove_columns=data.column_names, num_proc=int(processes))
total = int(np.sum(data["len"], dtype=np.int64))
out = np.memmap(output + ".bin", dtype=np.uint16, mode="w+", shape=(total,))
at = 0
for batch in data.with_format("numpy").iter(1024):
    flat = np.concatenate(batch["ids"])
    out[at : at + len(flat)] = flat
    at += len(flat)
out.flush()
"""


def texts(folder: Path) -> Iterator[str]:
    """Paragraph groups of real books where the test data is, else the standard library's sources; without end."""
    books = sorted((folder / "corpora/english_novels").glob("*.gz"))
    rng = random.Random(0)
    while True:
        if books:
            for book in books:
                with gzip.open(book, "rt", encoding="utf-8-sig") as stream:
                    lines = [line for line in stream.read().split("\n") if line]
                at = 0
                while at < len(lines):
                    count = rng.randint(1, 30)
                    yield "\n".join(lines[at : at + count])
                    at += count
        else:
            for source in sorted(Path(json.__file__).parents[1].rglob("*.py")):
                yield source.read_text(encoding="utf-8", errors="replace")


def write_input(path: Path, megabytes: float, folder: Path) -> None:
    with path.open("wb") as out:
        for text in texts(folder):
            out.write(json.dumps({"text": text}).encode() + b"\n")
            if out.tell() >= megabytes * 1e6:
                return


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(wall, processor) seconds of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cold_start(work: Path, megabytes: float, rounds: int, workers: int, tokenizer: Path, data: Path) -> dict[str, Any]:
    source = work / "input.jsonl"
    write_input(source, megabytes, data)
    script = work / "rival.py"
    script.write_text(RIVAL)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_DATASETS_CACHE": str(work / "cache"), "PYTHONPYCACHEPREFIX": str(work / "bytecode")}
    contenders = ("mlm", "mlm-again", "datasets.map")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}

    def turn(name: str) -> None:
        output, cache = work / f"out-{name}", work / "cache"
        for old in work.glob(f"out-{name}*"):
            old.unlink()
        shutil.rmtree(cache, ignore_errors=True)  # or the rival would find its own earlier work
        ours = [*MLM, str(source), "--tokenizer", str(tokenizer), "-o", str(output), "--workers", str(workers), "-q"]
        json_path = str(tokenizer / "tokenizer.json")
        theirs = [sys.executable, str(script), str(source), json_path, str(output), str(workers), str(cache)]
        wall, used = timed(theirs if name == "datasets.map" else ours, environment)
        seconds[name].append(wall)
        processor[name].append(used)

    for name in contenders:  # once unmeasured: byte code, page cache, and the proof that both write the same
        turn(name)
    same = (work / "out-mlm_text_document.bin").read_bytes() == (work / "out-datasets.map.bin").read_bytes()
    if not same:
        raise SystemExit("the two outputs differ: nothing to compare")
    for values in (*seconds.values(), *processor.values()):
        values.clear()
    for number in range(rounds):
        for name in contenders if number % 2 == 0 else contenders[::-1]:
            turn(name)
    return {
        "megabytes": source.stat().st_size / 1e6,
        "workers": workers,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "processor_seconds": {name: statistics.median(values) for name, values in processor.items()},
        "all_seconds": seconds,
        "faster": paired(seconds["datasets.map"], seconds["mlm"]),
        "faster_by_processor_time": paired(processor["datasets.map"], processor["mlm"]),
        "self_against_self": paired(seconds["mlm-again"], seconds["mlm"]),
    }


def paired(rival: list[float], ours: list[float]) -> float:
    return statistics.median(theirs / mine for theirs, mine in zip(rival, ours, strict=True))


def tokenising(work: Path, tokenizer: Path, data: Path, rounds: int) -> dict[str, Any]:
    """MB/s of the encode step and of the raw backend, on the same documents in one process."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    from mlm_cli.data.encode import EncodeSettings, encode_documents
    from mlm_cli.data.tokenizer import load_tokenizer
    from mlm_cli.data.tokenizer_backends import choose_encoder

    source = work / "tokenising.jsonl"
    write_input(source, 20, data)
    with source.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    batches = [documents[at : at + 1024] for at in range(0, len(documents), 1024)]
    size = sum(len(text.encode()) for text in documents)
    loaded = load_tokenizer(str(tokenizer))
    choice = choose_encoder(loaded)
    settings = EncodeSettings(("text",), "uint16", loaded.eod_id, False, 1 << 30)

    def ours() -> None:
        for batch in batches:
            encode_documents(batch, settings, choice.encoder)

    runs: dict[str, Callable[[], None]] = {"mlm": ours}
    if choice.encoder.name == "gigatoken":
        from gigatoken.gigatoken_rs import load_hf_json

        raw = load_hf_json(loaded.definition_json)

        def one_by_one() -> None:
            for batch in batches:
                for text in batch:
                    raw.encode(text)

        def in_batches() -> None:
            for batch in batches:
                raw.encode_batch(batch, parallel=False)

        def laid_out() -> None:
            for batch in batches:
                found = raw.encode_batch(batch, parallel=False).layout
                ids = np.asarray(found.content.data).astype(np.uint16)
                np.insert(ids, np.asarray(found.offsets.data)[1:], loaded.eod_id)

        runs |= {"raw, text by text": one_by_one, "raw, in batches": in_batches}
        runs["raw, in batches, laid out the same"] = laid_out
    else:

        def library() -> None:
            for batch in batches:
                loaded.reference.encode_batch_fast(batch, add_special_tokens=False)

        runs["raw, in batches"] = library
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in runs if number % 2 == 0 else list(runs)[::-1]:
            begun = time.process_time()
            runs[name]()
            if number:  # the first fills the caches
                times[name].append(time.process_time() - begun)
    return {
        "backend": choice.encoder.name,
        "mb_per_s": {name: size / 1e6 / statistics.median(values) for name, values in times.items()},
        "share_of_raw": {name: paired(values, times["mlm"]) for name, values in times.items() if name != "mlm"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[20.0, 80.0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", help="folder with GPT-2's files; default: those of the test data")
    arguments = parser.parse_args()
    data = Path(os.environ.get("MLM_TEST_DATA", ROOT.parent / "shared/data"))
    given = arguments.tokenizer or str(data / "tokenizers/gpt2")
    sys.path.insert(0, str(ROOT))
    from mlm_cli.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as folder:
        work = Path(folder)
        load_tokenizer(given).save(work / "gpt2")
        report: dict[str, Any] = {"cold_start": []}
        for megabytes in arguments.megabytes:
            found = cold_start(work, megabytes, arguments.rounds, arguments.workers, work / "gpt2", data)
            report["cold_start"].append(found)
            print(
                f"{found['megabytes']:.0f} MB, {arguments.workers} workers: mlm {found['seconds']['mlm']:.2f} s, "
                f"datasets.map {found['seconds']['datasets.map']:.2f} s: {found['faster']:.1f}x "
                f"({found['faster_by_processor_time']:.1f}x by processor time; "
                f"self against self {found['self_against_self']:.2f})"
            )
        report["tokenising"] = tokenising(work, work / "gpt2", data, max(3, arguments.rounds))
    speeds = report["tokenising"]["mb_per_s"]
    shares = report["tokenising"]["share_of_raw"]
    print(f"tokenising itself, one core, backend {report['tokenising']['backend']}:")
    for name, speed in speeds.items():
        share = f", mlm reaches {shares[name]:.0%} of it" if name in shares else ""
        print(f"  {name:<36} {speed:7.1f} MB/s{share}")
    print(f"written to {save('preprocess', report)}")


if __name__ == "__main__":
    main()
