"""An index that is kept: used while it is up to date, made anew when it is not, and never anything else's folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_cli.config.retrieval_section import RetrievalSection
from mlm_cli.errors import DataError, ResourceError, UsageError
from mlm_cli.generation import knowledge_base
from mlm_cli.generation.knowledge_base import open_knowledge_base

pytest.importorskip("bm25s")


@pytest.fixture
def section(tmp_path: Path) -> RetrievalSection:
    (tmp_path / "docs").mkdir()
    texts = ["the lion sleeps tonight", "a tiger runs", "lion and tiger"]
    (tmp_path / "docs" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return RetrievalSection(documents=(str(tmp_path / "docs"),), index=str(tmp_path / "deep" / "index"))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every index that is made."""
    made, real = list[int](), knowledge_base.read_documents

    def counting(*args: Any) -> Any:
        made.append(1)
        return real(*args)

    monkeypatch.setattr(knowledge_base, "read_documents", counting)
    return made


def ask(section: RetrievalSection, query: str = "lion") -> list[tuple[str, int, float]]:
    found = open_knowledge_base(section).search(query, 5, "here")
    return [(passage.text, passage.line, score) for passage, score in found.passages]


def test_a_kept_index_answers_as_a_new_one(section: RetrievalSection, builds: list[int]) -> None:
    first = ask(section)
    assert [text for text, _, _ in first] == ["lion and tiger", "the lion sleeps tonight"]
    assert ask(section) == first == ask(section.model_copy(update={"index": None}))
    assert len(builds) == 2
    kept = ask(section.model_copy(update={"num_passages": 1, "template": "{prompt}{passages}", "separator": ""}))
    assert kept == first and len(builds) == 2  # none of these is in the index
    assert section.index is not None
    assert sorted(path.name for path in Path(section.index).parent.iterdir()) == ["index"]


@pytest.mark.parametrize(
    "change", [{"passage_words": 2}, {"passage_overlap": 1}, {"k1": 2.0}, {"b": 0.0}, {"json_key": "body"}]
)
def test_other_settings_make_it_anew(section: RetrievalSection, builds: list[int], change: dict[str, Any]) -> None:
    [folder] = section.documents
    lines = [json.dumps({"text": "a lion sleeps tonight", "body": "lion"}), json.dumps({"text": "x", "body": "lion b"})]
    (Path(folder) / "a.jsonl").write_text("\n".join(lines))
    ask(section)
    changed = section.model_copy(update=change)
    found = ask(changed)
    assert len(builds) == 2 and found == ask(changed) and len(builds) == 2
    assert found == ask(changed.model_copy(update={"index": None}))


def test_other_documents_make_it_anew(section: RetrievalSection, builds: list[int], capsys: Any) -> None:
    ask(section)
    [folder] = section.documents
    file = Path(folder) / "a.jsonl"
    file.write_text(file.read_text().replace("sleeps", "snores"))  # as long as before
    os.utime(file, ns=(0, 1_000_000_007))
    assert ask(section, "snores")[0][0] == "the lion snores tonight"
    assert "changed since this index was made" in capsys.readouterr().err
    (Path(folder) / "b.txt").write_text("A panther.")
    assert ask(section, "panther")[0][:2] == ("A panther.", 1)
    (Path(folder) / "b.txt").unlink()
    assert ask(section, "panther") == []
    assert len(builds) == 4


@pytest.mark.parametrize(
    "victim", ["mlm-retrieval.json", "text.npy", "ends.npy", "places.npy", "data", "indptr", "vocab", "params"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "objects", "nonsense"])
def test_a_damaged_index_is_made_anew(
    section: RetrievalSection, builds: list[int], victim: str, damage: str, capsys: Any
) -> None:
    first = ask(section)
    assert section.index is not None
    [path] = [one for one in Path(section.index).rglob("*") if one.name.startswith(victim)]
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "objects":
        with path.open("wb") as out:
            np.save(out, np.array([print], dtype=object), allow_pickle=True)
    else:
        path.write_text("[3]")
    if (victim, damage) == ("mlm-retrieval.json", "gone"):  # then it is no index of ours, and stays
        with pytest.raises(UsageError, match="is there, and no index"):
            ask(section)
        return
    assert ask(section) == first
    assert "the index is damaged" in capsys.readouterr().err
    assert ask(section) == first and len(builds) == 2


def test_other_folders_are_left_alone(section: RetrievalSection, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1"):
        with pytest.raises(UsageError, match="is there, and no index"):
            ask(section.model_copy(update={"index": str(path)}))
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"
    assert ask(section)  # makes it
    assert section.index is not None
    note = Path(section.index) / "notes.txt"
    note.write_text("not to be lost")
    with pytest.raises(UsageError, match="is there, and no index"):
        ask(section.model_copy(update={"passage_words": 2}))
    assert note.read_text() == "not to be lost"
    with pytest.raises(UsageError, match="is among the documents"):
        ask(section.model_copy(update={"index": f"{section.documents[0]}/sub/index"}))
    (tmp_path / "empty").mkdir()
    assert ask(section.model_copy(update={"index": str(tmp_path / "empty")}))
    with pytest.raises(ResourceError, match="cannot write the index"):
        ask(section.model_copy(update={"index": str(tmp_path / "thesis" / "chapter1" / "below")}))


def test_what_is_no_base_is_told(section: RetrievalSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_knowledge_base(section)
    with pytest.raises(DataError, match="line 3: an empty prompt"):
        base.search(" ?", 3, "line 3")
    for documents, error, message in (
        ((str(tmp_path / "none"),), DataError, "does not exist"),
        (("-",), UsageError, "`-` is no file"),
        (("hf://owner/name",), UsageError, "is no file"),
    ):
        with pytest.raises(error, match=message):
            open_knowledge_base(section.model_copy(update={"documents": documents}))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="unknown format") as advice:
        open_knowledge_base(section.model_copy(update={"documents": (str(tmp_path / "a.csv"),)}))
    assert advice.value.hint is not None and "--" not in advice.value.hint
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UsageError, match="needs the package `bm25s`") as caught:
        open_knowledge_base(section.model_copy(update={"index": None}))
    assert caught.value.hint == "pip install 'mlm-cli[retrieval]'"
    with pytest.raises(UsageError, match="needs the package `bm25s`"):
        open_knowledge_base(section)  # a missing package is no damage
