"""`mlm generate` with a knowledge base: opening it, and telling what it gave."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlm_cli import log
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import UsageError
from mlm_cli.generation.answer import Answer
from mlm_cli.generation.grounding import GroundedEncoder
from mlm_cli.generation.knowledge_base import open_knowledge_base
from mlm_cli.parallel.context import ParallelContext

if TYPE_CHECKING:
    from mlm_cli.config.requests import GenerateRequest


def check_knowledge(request: GenerateRequest) -> None:
    """Raises UsageError: a conversation with a knowledge base."""
    if request.retrieval is not None and request.interactive:
        raise UsageError(
            "`--interactive` is one text that grows; the passages of each turn would soon fill the model's context",
            hint="ask with --prompt, --prompts, standard input or --serve, or leave retrieval.documents out",
        )


def grounded_encoder(
    request: GenerateRequest,
    tokenizer: Tokenizer,
    max_length: int,
    parallel: ParallelContext,
    *,
    ends: bool,
    affixes: tuple[str, str],
) -> GroundedEncoder:
    """Open the knowledge base, on this rank alone. Raises: as ``open_knowledge_base``."""
    assert request.retrieval is not None
    return GroundedEncoder(
        tokenizer,
        max_length,
        base=open_knowledge_base(request.retrieval, parallel.device),
        section=request.retrieval,
        max_new_tokens=request.max_new_tokens,
        ends=ends,
        affixes=affixes,
    )


def tell_sources(answer: Answer, request: GenerateRequest) -> None:
    """Beside an answer in text form: where its passages come from."""
    retrieved = answer.prompt.retrieved
    if retrieved is not None and request.format == "text":
        found = [f"{passage.path}:{passage.line} ({score:.3g})" for passage, score in retrieved.passages]
        log.info(f"{answer.prompt.id}: passages {', '.join(found) or 'none'}")


def tell_dropped(num_dropped: int, num_answers: int) -> None:
    """That there was no room for all passages."""
    log.warn(
        f"{num_dropped} of {num_answers} prompts left no room in the model's context for all their passages; those "
        "with the lowest scores were left out"
    )
    log.info("fewer or shorter ones: retrieval.num_passages, retrieval.passage_words; or a lower --max-new-tokens")
