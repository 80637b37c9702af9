"""The ``retrieval`` section: what it refuses, with the key and a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlm_cli.config.resolve import recipe_text, resolve_recipe
from mlm_cli.errors import UsageError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrieval.retriever=colbert"], r"retrieval.retriever"),
        (["retrieval.passage_overlap=100"], r"`retrieval.passage_overlap` 100 leaves nothing new"),
        (['retrieval.template="{passages}"'], r"`retrieval.template` has `{prompt}` 0 times"),
        (['retrieval.template="{prompt}"'], r"`retrieval.template` has `{passages}` 0 times"),
        (['retrieval.template="{prompt} {passages} {prompt}"'], r"`retrieval.template` has `{prompt}` 2 times"),
        (["retrieval.template={prompt}"], r"stands in quotes"),
        (["retrieval.template={passages}\\n{prompt}"], r"`retrieval.template` has a backslash and an n"),
        (["retrieval.separator='\\n'"], r"`retrieval.separator` has a backslash and an n"),
        (["retrieval.retriever=dense"], r"dense needs an embedding model"),
        (["retrieval.embedding_model=runs/x"], r"bm25 has no use for `retrieval.embedding_model`"),
        (["retrieval.num_passages=0"], r"retrieval.num_passages"),
        (["retrieval.passage_word=5"], r"passage_words"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_recipe(None, ["retrieval.documents=a.txt", *overrides], verb="generate")
    assert re.search(message, f"{caught.value.message} {caught.value.hint}")
    assert caught.value.hint


def test_settings_without_documents_are_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"`retrieval.passage_words` is set, and no documents"):
        resolve_recipe(None, ["retrieval.passage_words=50"], verb="generate")
    assert resolve_recipe(None, ["retrieval.passage_words=50"], verb="evaluate").retrieval.passage_words == 50


def test_documents_are_one_or_several_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in (("a.txt", ["a.txt"]), ("[a.txt, docs/*.jsonl]", ["a.txt", "docs/*.jsonl"])):
        found = resolve_recipe(
            None, [f"retrieval.documents={given}", "retrieval.index=kept"], verb="generate"
        ).retrieval
        assert found.documents == tuple(str(tmp_path / name) for name in expected)
        assert found.index == str(tmp_path / "kept")


def test_a_recipe_says_nothing_of_it_unless_asked() -> None:
    assert "retrieval" not in recipe_text(resolve_recipe(None))
    assert "retrieval" in recipe_text(resolve_recipe(None, ["retrieval.documents=a.txt"]))
