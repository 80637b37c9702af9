"""Cleaning of `mlm preprocess`: each filter by itself beside named rivals, and whole runs with and without it.

    python benchmarks/clean.py                        # some 10 MB of novels, 3 rounds: about 10 minutes on two cores
    python benchmarks/clean.py --novels 3 --rounds 1

Documents are pieces of 3,000 characters of English novels (MLM_TEST_DATA). Filters run in one process on one core;
contenders take turns; figures are medians of processor time, which hardly depends on what else the machine does.
Rivals are used where they are installed: `datasketch` (MinHash, LSH), `datatrove` (Gopher's rules, with words between
white space as ours, and with its own tokenizer, which is spaCy's) and `presidio-analyzer` (its pattern recognisers
alone, without a language model, for as many countries).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from interleave import save

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MLM = [sys.executable, "-c", "from mlm_cli.cli.app import main; main()", "preprocess"]
CHARACTERS = 3000
SETTINGS: dict[str, list[str]] = {
    "nothing": [],
    "nothing, again": [],
    "min_words": ["min_words=10"],
    "gopher_quality": ["gopher_quality=true"],
    "gopher_repetition": ["gopher_repetition=true"],
    "languages": ["languages=[en]"],
    "decontaminate": ["decontaminate=[TESTS]"],
    "pii": ["pii=redact"],
    "deduplicate exact": ["deduplicate=exact"],
    "deduplicate near": ["deduplicate=near"],
}
SETTINGS["everything"] = [key for name, keys in SETTINGS.items() if name != "deduplicate exact" for key in keys]


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def documents(data: Path, novels: int) -> list[str]:
    found = []
    for path in sorted((data / "corpora/english_novels").glob("*.gz"))[:novels]:
        text = gzip.decompress(path.read_bytes()).decode("utf-8-sig")
        found += [text[at : at + CHARACTERS] for at in range(0, len(text), CHARACTERS)]
    return found


def ours(tests: Path) -> dict[str, Callable[[list[str]], Any]]:
    """Each filter as a worker runs it."""
    from mlm_cli.config.clean_section import CleanSection
    from mlm_cli.data.clean import Cleaner
    from mlm_cli.data.decontaminate import read_test_texts
    from mlm_cli.data.parse import Parsed

    def runner(**settings: Any) -> Callable[[list[str]], Any]:
        cleaner = Cleaner(
            CleanSection(**settings), read_test_texts([str(tests)], 13) if "decontaminate" in settings else None
        )
        return lambda texts: cleaner.clean(Parsed({"text": list(texts)}, numbers=list(range(len(texts)))))

    return {
        "min_words": runner(min_words=10),
        "gopher_quality": runner(gopher_quality=True),
        "gopher_repetition": runner(gopher_repetition=True),
        "decontaminate": runner(decontaminate=(str(tests),)),
        "deduplicate exact": runner(deduplicate="exact"),
        "deduplicate near": runner(deduplicate="near"),
        **({"languages": runner(languages=("en",))} if installed("py3langid") else {}),
        **({"pii": runner(pii="redact")} if installed("phonenumbers") else {}),
    }


def decisions(texts: list[str]) -> None:
    """What the main process adds for near duplicates: signatures known, each document looked for and remembered."""
    with tempfile.NamedTemporaryFile() as records:
        from mlm_cli.data.seen import SeenDocuments

        seen = SeenDocuments(Path(records.name), 0, num_permutations=128)
        known = signatures(tuple(texts))
        for at in range(0, len(known), 700):  # as many as a worker sends together
            looked_up = seen.look_up([keys for _, _, keys in known[at : at + 700]])
            for document, before in zip(known[at : at + 700], looked_up, strict=True):
                if seen.find(*document, before) is None:
                    records.write(seen.add(*document))
                    records.flush()
        seen.close()


@cache
def signatures(texts: tuple[str, ...]) -> list[tuple[bytes, Any, Any]]:
    from mlm_cli.data.clean import digest
    from mlm_cli.data.minhash import MinHash, bands_for, shingles
    from mlm_cli.data.ngrams import word_numbers, words_of
    from mlm_cli.data.seen import document_keys

    minhash = MinHash(128)
    digests = [digest(text) for text in texts]
    made = [minhash.signature(shingles(word_numbers(words_of(text)), 5)) for text in texts]
    keys = document_keys(b"".join(digests), np.stack(made), bands_for(0.8, 128))
    return list(zip(digests, made, keys, strict=True))


def rivals() -> dict[str, Callable[[list[str]], Any]]:
    found: dict[str, Callable[[list[str]], Any]] = {}
    if installed("datasketch"):
        import datasketch

        def signature(text: str) -> Any:
            words = text.lower().split()
            made = datasketch.MinHash(num_perm=128)
            made.update_batch([" ".join(words[at : at + 5]).encode() for at in range(len(words) - 4)])
            return made

        def look_up(texts: list[str]) -> None:
            if not kept:  # in the round that does not count
                kept.extend(map(signature, texts))
            index = datasketch.MinHashLSH(threshold=0.8, num_perm=128)
            for number, made in enumerate(kept):
                if not index.query(made):
                    index.insert(number, made)

        kept: list[Any] = []

        found["deduplicate near: datasketch's signatures"] = lambda texts: [signature(text) for text in texts]
        found["near decisions: datasketch's LSH"] = look_up
    if installed("datatrove", "spacy"):
        found |= datatrove()
    if installed("presidio_analyzer"):
        found["pii: presidio's recognisers"] = presidio()
    return found


def datatrove() -> dict[str, Callable[[list[str]], Any]]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        GopherQualityFilter,
        GopherRepetitionFilter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    found: dict[str, Callable[[list[str]], Any]] = {}
    for name, one, module in (
        ("gopher_quality", GopherQualityFilter(), gopher_quality_filter),
        ("gopher_repetition", GopherRepetitionFilter(), gopher_repetition_filter),
    ):
        own = module.split_into_words

        def run(texts: list[str], split: Any, one: Any = one, module: Any = module) -> None:
            module.split_into_words = split
            for number, text in enumerate(texts):
                one.filter(Document(text=text, id=str(number)))

        found[f"{name}: datatrove, our words"] = lambda texts, run=run: run(texts, lambda text, _: text.split())
        found[f"{name}: datatrove"] = lambda texts, run=run, own=own: run(texts[:150], own)
    return found


def presidio() -> Callable[[list[str]], Any]:
    import tldextract
    from presidio_analyzer import predefined_recognizers as known

    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())  # else it fetches a list
    names = ("EmailRecognizer", "IbanRecognizer", "CreditCardRecognizer", "UsSsnRecognizer", "IpRecognizer")
    recognisers = [getattr(known, name)() for name in names] + [known.PhoneRecognizer(supported_regions=("US", "GB"))]

    def run(texts: list[str]) -> None:
        for text in texts:
            for one in recognisers:
                one.analyze(text, one.supported_entities, None)

    return run


def filters(texts: list[str], tests: Path, rounds: int) -> dict[str, dict[str, float]]:
    runs = {**ours(tests), "near decisions": decisions, **rivals()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            begun = time.process_time()
            runs[name](texts)
            if number:  # the first fills caches
                seconds[name].append(time.process_time() - begun)
    report = {}
    for name, values in sorted(seconds.items()):
        some = texts[:150] if name.endswith(": datatrove") else texts
        taken = statistics.median(values)
        size = sum(len(text.encode()) for text in some) / 1e6
        report[name] = {"mb_per_s": size / taken, "documents_per_s": len(some) / taken}
        print(f"{name:<45} {size / taken:8.2f} MB/s {len(some) / taken:10,.0f} documents/s")
    return report


def whole_runs(texts: list[str], tests: Path, work: Path, rounds: int, tokenizer: str) -> dict[str, dict[str, float]]:
    """Seconds of `mlm preprocess` with two workers, from the start of the command to its end, and of its processors."""
    source = work / "input.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    path = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}
    for number in range(rounds + 1):
        for name in list(SETTINGS) if number % 2 else list(SETTINGS)[::-1]:
            keys = [f"preprocess.clean.{setting}".replace("TESTS", str(tests)) for setting in SETTINGS[name]]
            fixed = ["--tokenizer", tokenizer, "-o", str(work / "out"), "--workers", "2", "--overwrite", "-q"]
            begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*MLM, str(source), *keys, *fixed], check=True, env=environment, capture_output=True)
            if number:
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                seconds[name].append((time.perf_counter() - begun, used))
    report = {}
    for name, values in seconds.items():
        wall, used = (statistics.median(column) for column in zip(*values, strict=True))
        report[name] = {"seconds": wall, "processor_seconds": used, "mb": source.stat().st_size / 1e6}
        print(f"whole run, {name:<25} {wall:7.2f} s, {used:7.2f} s of processors")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--novels", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    data = Path(os.environ.get("MLM_TEST_DATA", ROOT.parent / "shared/data"))
    texts = documents(data, arguments.novels)
    with tempfile.TemporaryDirectory(prefix="bench-clean-") as folder:
        tests = Path(folder, "tests.jsonl")
        held_out = documents(data, 100)[-500:]  # half a test set's worth of words
        tests.write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out), encoding="utf-8")
        print(f"{len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB")
        report: dict[str, Any] = {"filters": filters(texts, tests, arguments.rounds)}
        tokenizer = str(data / "tokenizers/gpt2")
        report["whole_runs"] = whole_runs(texts, tests, Path(folder), arguments.rounds, tokenizer)
    print(f"written to {save('clean', report)}")


if __name__ == "__main__":
    main()
