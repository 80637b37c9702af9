"""The ``retrieval`` section of a recipe, and what can be wrong with it beyond a single key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from mlm_cli.config.mistakes import Mistake
from mlm_cli.config.section import Section

PROMPT, PASSAGES = "{prompt}", "{passages}"


class RetrievalSection(Section):
    """Passages of a knowledge base that `mlm generate` puts before each prompt; none without `documents`."""

    documents: tuple[str, ...] = Field(
        default=(), description="files, folders or patterns of .jsonl, .txt or .parquet, also packed"
    )
    json_key: str = Field(default="text", description="of the text in .jsonl and .parquet")
    retriever: Literal["bm25", "dense"] = Field(
        default="bm25", description="by the words that a passage shares with the prompt, or by a model's embeddings"
    )
    embedding_model: str | None = Field(
        default=None, description="dense: a model that `mlm finetune` taught the task `embedding`"
    )
    passage_words: int = Field(default=100, ge=1, description="words of a passage")
    passage_overlap: int = Field(default=0, ge=0, description="words that a passage repeats of the one before it")
    num_passages: int = Field(default=3, ge=1, le=100, description="passages before a prompt, the best first")
    template: str = Field(
        default=f"{PASSAGES}\n\n{PROMPT}", description="what the model is given, with `{passages}` and `{prompt}`"
    )
    separator: str = Field(default="\n\n", description="between passages")
    index: str | None = Field(
        default=None, description="folder to keep the index in, so that large bases start fast; unset: made each time"
    )
    k1: float = Field(default=1.2, ge=0, description="bm25: how soon further occurrences of a word add no more")
    b: float = Field(default=0.75, ge=0, le=1, description="bm25: how much a word counts for less in a long passage")

    @field_validator("documents", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("template", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, dict):  # what YAML makes of {prompt}
            raise ValueError("a text that begins with `{` stands in quotes: '\"{passages}\\n\\n{prompt}\"'")
        return value


def check_retrieval(section: RetrievalSection, verb: str) -> Iterator[Mistake]:
    """What does not go together; for `mlm evaluate` documents are the texts of its questions."""
    changed = [key for key in RetrievalSection.model_fields if getattr(section, key) != getattr(_DEFAULT, key)]
    if verb == "generate" and changed and not section.documents:
        yield Mistake(
            (f"retrieval.{changed[0]}", "retrieval.documents"),
            f"`retrieval.{changed[0]}` is set, and no documents to retrieve from",
            "add `retrieval.documents=FILE_OR_FOLDER`",
        )
    if section.passage_overlap >= section.passage_words:
        yield Mistake(
            ("retrieval.passage_overlap", "retrieval.passage_words"),
            f"`retrieval.passage_overlap` {section.passage_overlap} leaves nothing new in passages of "
            f"`retrieval.passage_words` {section.passage_words}",
            f"use `retrieval.passage_overlap={section.passage_words // 2}` or less",
        )
    for mark in (PROMPT, PASSAGES):
        if section.template.count(mark) != 1:
            yield Mistake(
                ("retrieval.template",),
                f"`retrieval.template` has `{mark}` {section.template.count(mark)} times, and not once",
                "for example '\"{passages}\\n\\nQuestion: {prompt}\\nAnswer:\"'",
            )
    for key in ("template", "separator"):
        if "\\n" in getattr(section, key):  # what single quotes around it come to
            yield Mistake(
                (f"retrieval.{key}",),
                f"`retrieval.{key}` has a backslash and an n where a line break is meant",
                f"YAML reads \\n in double quotes: retrieval.{key}='\"...\\n...\"'",
            )
    if (section.retriever == "dense") != (section.embedding_model is not None):
        dense = section.retriever == "dense"
        yield Mistake(
            ("retrieval.embedding_model", "retrieval.retriever"),
            f"`retrieval.retriever` {section.retriever} "
            + ("needs an embedding model" if dense else "has no use for `retrieval.embedding_model`"),
            "add `retrieval.embedding_model=RUN`" if dense else "use `retrieval.retriever=dense`",
        )


_DEFAULT = RetrievalSection()
