"""Cleaning as a run sees it: what must be there before it, which duplicates go, and what is told afterwards."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlm_cli import log
from mlm_cli.config.clean_section import CleanSection
from mlm_cli.data.clean import Cleaner, Cleaning, Removal
from mlm_cli.data.decontaminate import read_test_texts
from mlm_cli.data.language import check_languages
from mlm_cli.data.partial import PartialRun
from mlm_cli.data.pii import check_regions
from mlm_cli.data.seen import SeenDocuments
from mlm_cli.data.sources import Source
from mlm_cli.errors import UsageError

# In the order in which they are asked; which keys of the section each has.
_KEYS = {
    "min_words": ("min_words",),
    "max_words": ("max_words",),
    "gopher_quality": (),
    "gopher_repetition": (),
    "languages": ("languages", "min_language_probability"),
    "decontaminate": ("decontaminate", "decontaminate_ngram"),
    "pii": ("pii", "phone_regions"),
    "deduplicate": ("deduplicate", "jaccard_threshold", "shingle_words", "num_permutations"),
}


@dataclass(frozen=True)
class PreparedCleaning:
    """The cleaner of the workers, and the settings that an unfinished run must share to be continued."""

    cleaner: Cleaner
    settings: dict[str, Any]


def prepare_cleaning(section: CleanSection, keys: tuple[str, ...]) -> PreparedCleaning | None:
    """Look up what the filters need; None where nothing is to be cleaned.

    Raises:
        UsageError: a package, language or country that is not there; more than one JSON key.
        DataError: a test file that cannot be read.
    """
    if not section.active:
        return None
    if len(keys) > 1:
        raise UsageError(
            "`preprocess.clean` judges a document by its text, and several --json-key give it several",
            hint="preprocess each key by itself, or give `preprocess.clean=null`",
        )
    settings = section.model_dump(mode="json")
    packages: list[str] = []
    if section.languages:
        check_languages(section.languages)
        packages.append("py3langid")
    if section.pii != "none" and section.phone_regions:
        check_regions(section.phone_regions)
        packages.append("phonenumbers")
    tests = None
    if section.decontaminate:
        tests = read_test_texts(section.decontaminate, section.decontaminate_ngram)
        settings["decontaminate"] = [
            [str(Path(path).absolute()), sha256] for path, sha256 in zip(tests.paths, tests.hashes, strict=True)
        ]
        if tests.short:
            log.warn(f"{tests.short:,} texts of the test files have fewer than {tests.n} words: they cannot be found")
    settings["packages"] = {name: importlib.metadata.version(name) for name in packages}
    return PreparedCleaning(Cleaner(section, tests), settings)


class Duplicates:
    """Which documents of a segment go because their text, or nearly it, was there before.

    Decided here, in the order of the input, so that the number of workers changes nothing.
    """

    def __init__(self, section: CleanSection, partial: PartialRun, sources: list[Source]) -> None:
        near = section.deduplicate == "near"
        self._partial, self._sources = partial, sources
        self._seen = SeenDocuments(
            partial.seen.path,
            partial.seen.size,
            num_permutations=section.num_permutations if near else 0,
            threshold=section.jaccard_threshold,
        )
        assert self._seen.count == partial.position.documents, "as many records as documents kept"

    def remove(
        self, cleaning: Cleaning, numbers: npt.NDArray[np.int64], source: int
    ) -> tuple[npt.NDArray[np.bool_], list[tuple[int, Removal]]]:
        """Of the documents at lines ``numbers`` of a segment: which stay [documents], and (line, why) of the others."""
        at, keep, removed = self._partial.position, np.ones(len(numbers), bool), []
        here: list[tuple[int, int]] = []  # (source, line) of those kept in this segment
        looked_up = self._seen.look_up(cleaning.keys)
        for index, document in enumerate(zip(cleaning.digests, cleaning.signatures, cleaning.keys, strict=True)):
            found = self._seen.find(*document, looked_up[index])
            if found is None:
                self._partial.seen.append(self._seen.add(*document))
                here.append((source, at.line + int(numbers[index])))
                continue
            keep[index] = False
            before = found.document < at.documents
            origin = self._partial.origin(found.document) if before else here[found.document - at.documents]
            reason: dict[str, Any] = {"of": {"file": shown(self._sources[origin[0]]), "line": origin[1]}}
            if found.similarity is not None:
                reason["similarity"] = round(found.similarity, 4)
            rule = "exact" if found.similarity is None else "near"
            removed.append((int(numbers[index]), Removal("deduplicate", rule, reason)))
        return keep, removed

    def close(self) -> None:
        self._seen.close()


def shown(source: Source) -> str:
    """What lists call a source."""
    return "standard input" if source.path == "-" else source.path


def removal_lines(file: str, line: int, removed: Iterable[tuple[int, Removal]]) -> bytes:
    """Lines of ``PREFIX.removed.jsonl`` for documents of a segment that begins behind ``line``."""
    entries = []
    for number, removal in removed:
        entry = {"file": file, "line": line + number, "filter": removal.filter}
        entry |= ({"rule": removal.rule} if removal.rule else {}) | removal.found
        entries.append(json.dumps(entry, ensure_ascii=False) + "\n")
    return "".join(entries).encode("utf-8")


def filter_report(section: CleanSection, partial: PartialRun | None = None) -> list[dict[str, Any]]:
    """Each filter asked for: its name, settings and, of a run, what it removed, by rule where it has several."""
    report: list[dict[str, Any]] = []
    asked = section.model_dump(mode="json")
    for name, keys in _KEYS.items():
        if asked[name] is False or asked[name] in (None, [], "none"):
            continue
        if name == "deduplicate" and section.deduplicate == "exact":
            keys = ("deduplicate",)
        entry: dict[str, Any] = {"filter": name, "settings": {key: asked[key] for key in keys}}
        if partial is not None:
            counts = partial.position.removed
            rules = {key.partition(".")[2]: count for key, count in counts.items() if key.startswith(f"{name}.")}
            entry["removed"] = counts.get(name, 0) + sum(rules.values())
            if rules:
                entry["rules"] = dict(sorted(rules.items()))
            if name == "pii" and section.pii == "redact":
                entry |= {
                    "redacted": dict(sorted(partial.position.redacted.items())),
                    "changed": partial.position.changed,
                }
        report.append(entry)
    return report


def filter_text(entry: dict[str, Any]) -> str:
    """One line on a filter: its settings, or what it removed."""
    if "removed" not in entry:
        settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in entry["settings"].items())
        return entry["filter"] + (f": {settings}" if settings else "")
    rules = ", ".join(f"{rule} {count:,}" for rule, count in entry.get("rules", {}).items())
    text = f"{entry['filter']}: {entry['removed']:,} removed" + (f" ({rules})" if rules else "")
    if "redacted" in entry:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in entry["redacted"].items())
        text = f"{entry['filter']}: {entry['changed']:,} documents changed" + (f" ({kinds})" if kinds else "")
    return text
