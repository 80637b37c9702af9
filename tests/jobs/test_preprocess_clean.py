"""Cleaning inside `mlm preprocess`: what stays is what a run over the kept documents alone would write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlm_cli.cli.app import run as mlm
from mlm_cli.config.clean_section import CleanSection
from mlm_cli.data.sidecar import load_sidecar
from mlm_cli.errors import DataError, UsageError
from mlm_cli.jobs import preprocess as job
from tests.jobs.preprocess_runs import ROOT, jsonl, origins, preprocess, texts

FILES = ("_text_document.bin", "_text_document.idx", ".origins.npy", ".removed.jsonl")
WORDS = {"min_words": 8, "max_words": 400, "gopher_repetition": True}
ALL: dict[str, Any] = WORDS | {"pii": "redact", "phone_regions": (), "deduplicate": "near"}


@cache
def documents(count: int = 1500) -> list[str]:
    """Texts of random words among short, long, repeating and nearly equal ones, and some with personal data."""
    chance = random.Random(11)
    vocabulary = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(3000)]
    made: list[str] = []
    for number in range(count):
        words = chance.choices(vocabulary, k=chance.randint(20, 150))
        kind = number % 12
        if kind == 1:
            words = words[: chance.randint(0, 7)]
        elif kind == 2:
            words *= 12
        elif kind == 3:
            words = words[:6] * 10
        elif kind == 4 and made:
            words = chance.choice(made).split()
        elif kind == 5 and made:
            words = [*chance.choice(made).split(), chance.choice(vocabulary)]
        elif kind == 6:
            words[3:3] = ["jo@example.org", "8.8.8.8"]
        made.append(" ".join(words))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("clean") / "a.jsonl", documents())


@pytest.fixture(scope="module")
def straight(source: Path) -> dict[str, Path]:
    """The set of an uninterrupted run of one worker, by how duplicates are looked for."""
    for mode in ("near", "exact"):
        preprocess(source, output=source.with_name(mode), clean=CleanSection(**ALL | {"deduplicate": mode}))
    return {mode: source.with_name(mode) for mode in ("near", "exact")}


def removed(prefix: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{prefix}.removed.jsonl").read_text(encoding="utf-8").splitlines()]


def same(one: Path, other: Path, files: tuple[str, ...] = FILES) -> None:
    for suffix in files:
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes(), suffix
    first, second = load_sidecar(one), load_sidecar(other)
    assert (first.filters, first.sources, first.documents) == (second.filters, second.sources, second.documents)


def test_what_stays_is_what_a_run_over_it_alone_writes(tmp_path: Path, source: Path) -> None:
    summary = preprocess(source, output=tmp_path / "x", clean=CleanSection(**ALL))
    gone = {entry["line"]: entry for entry in removed(tmp_path / "x")}
    kept = [text for line, text in enumerate(documents(), 1) if line not in gone]
    kept = [text.replace("jo@example.org", "<EMAIL_ADDRESS>").replace("8.8.8.8", "<IP_ADDRESS>") for text in kept]
    plain = preprocess(jsonl(tmp_path / "kept.jsonl", kept), output=tmp_path / "y")
    for suffix in FILES[:2]:
        assert Path(f"{tmp_path}/x{suffix}").read_bytes() == Path(f"{tmp_path}/y{suffix}").read_bytes()
    assert summary["outputs"][0] | {"prefix": ""} == plain["outputs"][0] | {"prefix": ""}
    assert [line for _, line in origins(tmp_path / "x")] == [n for n in range(1, 1501) if n not in gone]
    assert summary["read"] == 1500 == summary["documents"] + summary["removed"] and summary["removed"] == len(gone)
    sidecar, plainly = load_sidecar(tmp_path / "x"), load_sidecar(tmp_path / "y")
    for count in ("documents", "characters", "text_tokens"):
        assert sidecar.sources[0][count] == plainly.sources[0][count]
    assert sidecar.sources[0]["removed"] == len(gone) and sidecar.filters == summary["filters"]
    names = [entry["filter"] for entry in gone.values()]
    for entry in sidecar.filters:
        assert entry["removed"] == names.count(entry["filter"])
    assert all(names.count(name) > 50 for name in ("min_words", "max_words", "gopher_repetition", "deduplicate"))
    [pii] = [entry for entry in sidecar.filters if entry["filter"] == "pii"]
    assert pii["redacted"] == {"EMAIL_ADDRESS": pii["changed"], "IP_ADDRESS": pii["changed"]} and pii["changed"] > 100
    assert pii["changed"] == sum("<EMAIL_ADDRESS>" in text for text in kept)  # not in what went as a duplicate
    for line, entry in gone.items():
        if entry["filter"] == "deduplicate":
            of = entry["of"]["line"]
            assert of < line and of not in gone
            assert (entry["rule"] == "exact") == (documents()[of - 1] == documents()[line - 1])


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_and_pieces_change_nothing(tmp_path: Path, workers: int) -> None:
    inputs = [jsonl(tmp_path / f"{name}.jsonl", documents(900)) for name in "ab"]  # the second holds nothing new
    clean = CleanSection(**ALL)
    one = preprocess(*inputs, output=tmp_path / "one", clean=clean)
    preprocess(*inputs, output=tmp_path / "more", clean=clean, workers=workers)
    same(tmp_path / "one", tmp_path / "more")
    assert [source["documents"] for source in load_sidecar(tmp_path / "one").sources] == [one["documents"], 0]


CODE = """
import sys
import time
from mlm_cli.config.clean_section import CleanSection
from tests.jobs.preprocess_runs import preprocess
from mlm_cli.jobs import preprocess as job
real = job.commit
job.commit = lambda *arguments: (time.sleep(0.2), real(*arguments))  # so that it is not done before it is killed
clean = CleanSection.model_validate_json(sys.argv[3])
preprocess(sys.argv[2], output=sys.argv[1], workers=2, journal_seconds=0.0, clean=clean)
"""


def test_killed_again_and_again_ends_with_the_same_files(
    tmp_path: Path, source: Path, straight: dict[str, Path]
) -> None:
    clean = CleanSection(**ALL)
    prefix, journal = tmp_path / "x", tmp_path / "x.partial/journal.jsonl"
    arguments = [sys.executable, "-c", CODE, str(prefix), str(source), clean.model_dump_json()]
    lines = 0
    for _ in range(2):
        run = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1]
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        lines = journal.read_bytes().count(b"\n")
        known = json.loads(journal.read_text().splitlines()[-1])
        assert known["sizes"]["seen"][0] == known["documents"] * (16 + 4 * 128) > 0 < sum(known["removed"].values())
    assert preprocess(source, output=prefix, clean=clean)["continued"] is True
    same(straight["near"], prefix)
    assert not Path(f"{prefix}.partial").exists()


class Stop(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stopped(count, ...)``: a run that ends with an error when it writes its segment number ``count``."""

    def run(count: int, *inputs: Path, **settings: Any) -> None:
        real, left = job.commit, [count]

        def commit(*arguments: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            real(*arguments)

        monkeypatch.setattr(job, "commit", commit)
        with pytest.raises(Stop):
            preprocess(*inputs, journal_seconds=0.0, **settings)
        monkeypatch.undo()

    return run


@pytest.mark.parametrize(("stop_at", "mode"), [(1, "near"), (3, "near"), (3, "exact")])
def test_stopped_runs_go_on(
    tmp_path: Path, source: Path, straight: dict[str, Path], stopped: Callable[..., None], stop_at: int, mode: str
) -> None:
    clean = CleanSection(**ALL | {"deduplicate": mode})
    stopped(stop_at, source, output=tmp_path / "x", clean=clean)
    assert preprocess(source, output=tmp_path / "x", clean=clean)["continued"] is True
    same(straight[mode], tmp_path / "x")


def test_other_settings_and_changed_test_files_are_not_continued(
    tmp_path: Path, source: Path, stopped: Callable[..., None]
) -> None:
    tests = tmp_path / "test.txt"
    tests.write_text(" ".join(documents()[30].split()[:14]))
    clean = CleanSection(decontaminate=(str(tests),), deduplicate="near")
    stopped(2, source, output=tmp_path / "x", clean=clean)
    for other in (CleanSection(), clean.model_copy(update={"jaccard_threshold": 0.7})):
        with pytest.raises(UsageError, match=r"other settings \(`clean`\)"):
            preprocess(source, output=tmp_path / "x", clean=other)
    before = tests.read_text()
    tests.write_text(" ".join(documents()[31].split()[:14]))
    with pytest.raises(UsageError, match=r"other settings \(`clean`\)"):
        preprocess(source, output=tmp_path / "x", clean=clean)
    tests.write_text(before)
    assert preprocess(source, output=tmp_path / "x", clean=clean)["continued"] is True
    assert [entry["line"] for entry in removed(tmp_path / "x") if entry["filter"] == "decontaminate"] == [31]
    again = preprocess(source, output=tmp_path / "x", clean=clean)
    assert again["already_there"] and again["read"] == 1500 and again["filters"] == load_sidecar(tmp_path / "x").filters
    with pytest.raises(UsageError, match="exists already"):
        preprocess(source, output=tmp_path / "x")


def test_without_the_keys_nothing_changes(tmp_path: Path, source: Path) -> None:
    """Files and sidecar as they were before there was cleaning; lists of an older, cleaned set go with it."""
    preprocess(source, output=tmp_path / "x", clean=CleanSection(**ALL))
    summary = preprocess(source, output=tmp_path / "x", overwrite=True)
    assert not Path(f"{tmp_path}/x.removed.jsonl").exists() and not {"removed", "filters"} & summary.keys()
    sidecar = json.loads(Path(f"{tmp_path}/x.json").read_text())
    assert sidecar["filters"] == [] and "clean" not in sidecar["settings"]
    keys = "path bytes sha256 lines documents skipped empty_documents characters text_tokens"
    assert list(sidecar["sources"][0]) == keys.split()
    data, at = Path(f"{tmp_path}/x_text_document.bin").read_bytes(), 0
    for text in documents():  # bytes: an id a byte, and 256 at the end of what is not empty
        wanted = [*text.encode(), 256] if text else []
        assert data[2 * at : 2 * (at + len(wanted))] == b"".join(number.to_bytes(2, "little") for number in wanted)
        at += len(wanted)
    assert len(data) == 2 * at


def test_sentences_lists_and_bad_lines(tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": "One sentence here. Another one there."}),
        "{broken",
        json.dumps({"text": ["One  sentence here.", "Another one there."]}),
        json.dumps({"text": "Too short."}),
        json.dumps({"text": ["Write to a@b.org now.", "", "Or to no one at all."]}),
        json.dumps({"text": []}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    clean = CleanSection(min_words=3, deduplicate="exact", pii="redact", phone_regions=())
    settings = {"split_sentences": True, "on_bad_line": "skip", "append_eod": False, "clean": clean}
    summary = preprocess(tmp_path / "a.jsonl", output=tmp_path / "x", **settings)
    assert (summary["documents"], summary["skipped"], summary["removed"], summary["read"]) == (2, 1, 3, 6)
    assert origins(tmp_path / "x") == [(0, 1), (0, 5)]
    assert texts(f"{tmp_path}/x_text_sentence") == [
        "One sentence here.Another one there.",
        "Write to <EMAIL_ADDRESS> now.Or to no one at all.",
    ]
    assert summary["outputs"][0]["sequences"] == 4
    assert [(entry["line"], entry["filter"]) for entry in removed(tmp_path / "x")] == [
        (3, "deduplicate"),
        (4, "min_words"),
        (6, "min_words"),
    ]


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["a b", "c d", "jo@example.org wrote that", "x"])
    clean = CleanSection(min_words=2, max_words=2, deduplicate="exact", pii="drop", phone_regions=())
    source.write_text(source.read_text().replace("a b", "a b c").replace("c d", "q@r.org s"))
    with pytest.raises(DataError) as error:
        preprocess(source, output=tmp_path / "x", clean=clean)
    told = "no document is left of 4: min_words: 1 removed; max_words: 2 removed; pii: 1 removed. The first is "
    assert error.value.message == f"{told}{source}:1: max_words, 3"
    assert error.value.hint and not list(tmp_path.glob("x*"))


def test_personal_data_is_never_listed(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "a.jsonl", ["nothing here", "mail jo@example.org", "card 4111 1111 1111 1111 and 8.8.8.8"]
    )
    preprocess(source, output=tmp_path / "x", clean=CleanSection(pii="drop", phone_regions=()))
    assert [entry["value"] for entry in removed(tmp_path / "x")] == [["EMAIL_ADDRESS"], ["CREDIT_CARD", "IP_ADDRESS"]]


@pytest.mark.parametrize(
    ("section", "package", "extra"),
    [({"languages": ("en",)}, "py3langid", "data"), ({"pii": "drop"}, "phonenumbers", "pii")],
)
def test_a_missing_package_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], package: str, extra: str
) -> None:
    from mlm_cli.data import language

    language._identifier.cache_clear()
    for name in (package, "py3langid.langid"):
        monkeypatch.setitem(sys.modules, name, None)
    source = jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UsageError, match=f"`{package}`, which is not installed") as error:
        preprocess(source, output=tmp_path / "x", clean=CleanSection(**section))
    assert error.value.hint is not None and error.value.hint.startswith(f"pip install 'mlm-cli[{extra}]'")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_several_keys_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UsageError, match="several --json-key"):
        preprocess(source, output=tmp_path / "x", json_key=("a", "b"), clean=CleanSection(min_words=1))


def test_merged_sets_keep_what_was_removed(tmp_path: Path, source: Path) -> None:
    from mlm_cli.jobs.indexed_tools import merge

    clean = CleanSection(deduplicate="exact")
    for name in ("a", "b"):
        preprocess(source, output=tmp_path / name, clean=clean)
    (tmp_path / "c.removed.jsonl").write_text("of an older set\n")
    merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))
    one = load_sidecar(tmp_path / "a").filters
    assert load_sidecar(tmp_path / "c").filters == one + one and not (tmp_path / "c.removed.jsonl").exists()


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `mlm ARGUMENTS` writes to standard output."""
    capfd.readouterr()
    code = mlm(list(arguments))
    found = capfd.readouterr()
    assert code == 0, found.err
    return found.out


def test_the_recipe_really_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prose = "The captain of the ship, who had been with us all that winter, would have nothing to do with the crew. "
    chance = random.Random(1)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    stories = [" ".join(chance.sample(prose.split() * 6, 90)) for _ in range(20)]
    told = [*stories, stories[3], stories[4] + " Ahoy!", "too short", "Wir haben das Schiff nicht gesehen. " * 20]
    jsonl(
        corpus / "a.jsonl",
        [*told, stories[5][:-4] + " write to jo@example.org or (415) 555-2671 about the ship and me"],
    )
    overrides = [] if _has("py3langid") else ["preprocess.clean.languages=[]"]
    overrides += [] if _has("phonenumbers") else ["preprocess.clean.phone_regions=[]"]
    # random order of few words repeats 2-grams more than prose does
    overrides += ["preprocess.clean.gopher_repetition=false", "preprocess.clean.jaccard_threshold=0.9"]
    arguments = ["preprocess", "--recipe", "preprocess/clean", "tokenizer=bytes", "output=x", *overrides]
    monkeypatch.chdir(tmp_path)
    dry = said(capfd, *arguments, "--dry-run")
    assert "  gopher_quality\n" in dry and '  deduplicate: deduplicate "near"' in dry and not list(tmp_path.glob("x*"))
    done = said(capfd, *arguments, "--workers", "2")
    assert f"4 of 25 removed: listed in {tmp_path}/x.removed.jsonl\n" in done
    assert "  deduplicate: 2 removed (exact 1, near 1)\n" in done
    document = json.loads(said(capfd, *arguments, "--format", "json"))
    filters = {entry["filter"]: entry for entry in document["filters"]}
    assert document["removed"] == 4 and filters["pii"]["redacted"]["EMAIL_ADDRESS"] == 1
    assert ("PHONE_NUMBER" in filters["pii"]["redacted"]) == _has("phonenumbers")
    assert sum(entry["removed"] for entry in filters.values()) == 4


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
