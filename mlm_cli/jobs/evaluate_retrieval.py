"""`mlm evaluate --task retrieval`: is the passage that answers a question found?"""

from __future__ import annotations

from pathlib import Path

from mlm_cli.checkpoint import agree
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.evaluation.retrieval_scores import (
    cut_texts,
    ranks,
    read_retrieval_questions,
    retrieval_records,
    retrieval_result,
)
from mlm_cli.generation.knowledge_base import make_retriever, open_embedder
from mlm_cli.jobs.scoring_parts import Progress
from mlm_cli.parallel.context import ParallelContext


def evaluate_retrieval(request: EvaluateRequest, parallel: ParallelContext, *, output: Path | None) -> TaskResult:
    """Score the retriever of ``request.retrieval`` on the questions of ``request.data``. All ranks call, rank 0 works.

    Args:
        output: where the rank of each question's answer goes; None: nowhere.

    Raises:
        UsageError: the package bm25s is missing. DataError, CheckpointError: questions or model that cannot be used.
    """
    return agree.on_rank_zero(lambda: _evaluate(request, parallel, output))


def _evaluate(request: EvaluateRequest, parallel: ParallelContext, output: Path | None) -> TaskResult:
    section = request.retrieval
    assert section is not None
    asked = read_retrieval_questions(request.data)
    passages = cut_texts(asked, section.passage_words, section.passage_overlap)
    retriever = make_retriever(section, passages.texts(), open_embedder(section, parallel.device))
    with Progress("retrieval") as progress:
        found = ranks(asked, passages, retriever.search, limit=request.limit, on_question=progress.update)
    if output is not None:
        write_texts({"retrieval.jsonl": retrieval_records(asked, found)}, output)
    config: dict[str, object] = {
        "dataset_path": list(request.data),
        "output_type": "retrieval",
        "retriever": section.retriever,
        "passage_words": section.passage_words,
        "passage_overlap": section.passage_overlap,
        "num_passages": len(passages),
        "num_texts": len(asked.texts),
        "num_unanswerable": asked.num_unanswerable,
        **({"k1": section.k1, "b": section.b} if section.retriever == "bm25" else {}),
    }
    return retrieval_result(found, config=config, num_original=len(asked.questions))
