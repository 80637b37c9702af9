"""The search for watermarks of ``mlm evaluate``: tokenizer and key, and no weights."""

from __future__ import annotations

from pathlib import Path

from mlm_cli import heartbeat, log
from mlm_cli.checkpoint import agree
from mlm_cli.checkpoint.hub import read_model_config
from mlm_cli.config.requests import EvaluateRequest
from mlm_cli.errors import CheckpointError, DataError, UsageError
from mlm_cli.evaluation.results import TaskResult, write_texts
from mlm_cli.evaluation.watermark import Count, Detector, count_green, read_texts_of, text_records, watermark_result
from mlm_cli.jobs.scoring_parts import Progress, tokenizer_of
from mlm_cli.jobs.watermark import watermark_of


def evaluate_watermark(request: EvaluateRequest, folder: Path, *, output: Path | None) -> TaskResult:
    """Look for the request's watermark in its texts. All ranks call; rank 0 does it.

    Args:
        output: where what was found in every text goes, as ``watermark.jsonl``; None: nowhere.

    Raises:
        UsageError: an ensemble, or no key.
        DataError, CheckpointError: texts, a tokenizer or a configuration that cannot be used.
    """
    if request.ensemble:
        raise UsageError("a watermark is looked for with the tokenizer of one model", hint="leave --ensemble out")
    return agree.on_rank_zero(lambda: _look(request, folder, output))


def _look(request: EvaluateRequest, folder: Path, output: Path | None) -> TaskResult:
    watermark = watermark_of(request)
    section, _ = read_model_config(folder)
    if section.vocab_size is None:
        raise CheckpointError(f"{folder / 'config.json'} does not say how large the vocabulary is")
    tokenizer = tokenizer_of(request, folder, section)
    found = list(read_texts_of(request.data))
    texts = found[: request.limit]
    if not texts:
        raise DataError(f"no text in {', '.join(request.data)}")
    counts: list[Count] = []
    with Progress("watermark") as progress:
        for _, text in texts:
            counts.append(count_green(tokenizer.encode(text), watermark, section.vocab_size))
            heartbeat.beat()
            progress.update(len(counts), len(texts))
    detector = Detector(watermark.ratio, request.watermark_z)
    if output is not None:
        write_texts({"watermark.jsonl": text_records(texts, counts, detector)}, output)
    config: dict[str, object] = {
        "dataset_path": list(request.data),
        "scheme": watermark.scheme,
        "context": watermark.context,
        "ratio": watermark.ratio,
        "threshold": detector.threshold,
        "least_tokens": detector.least,
    }
    result = watermark_result(counts, detector, config=config, num_original=len(found))
    if short := result.config["num_too_short"]:
        log.warn(f"{short} of {len(texts)} texts have fewer than {detector.least} tokens to score: too short to tell")
    return result
