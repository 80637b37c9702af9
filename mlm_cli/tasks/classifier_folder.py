"""Classifiers on disk in transformers' ``...ForSequenceClassification`` layout; starting one from a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlm_cli.checkpoint.hub import Head, WeightFiles, load_model_folder, read_model_config, save_model_folder
from mlm_cli.data.tokenizer import Tokenizer
from mlm_cli.errors import CheckpointError
from mlm_cli.models.heads import SequenceClassifier
from mlm_cli.parallel.context import ParallelContext

ARCHITECTURE = "ForSequenceClassification"


@dataclass(frozen=True)
class ClassifierFacts:
    """What a classifier's ``config.json`` says beside the architecture of its backbone."""

    labels: tuple[str, ...]
    pad_id: int
    max_length: int


def pad_id_of(tokenizer: Tokenizer) -> int:
    """The id that fills up short texts; any will do, since nothing is read behind a text's last token."""
    if tokenizer.pad_id is not None:
        return tokenizer.pad_id
    return tokenizer.eod_id if tokenizer.eod_id is not None else 0


def start_classifier(
    folder: Path,
    parallel: ParallelContext,
    *,
    num_labels: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> SequenceClassifier:
    """A classifier with the weights of the language model (or other classifier) in ``folder`` and a new head.

    Args:
        changes: settings of the model section that weights do not depend on, such as dropout.

    Raises:
        CheckpointError: the folder holds no model that can be read.
    """
    gpt, _ = load_model_folder(folder, parallel, dtype=dtype, head_optional=True, changes=changes)
    return SequenceClassifier(gpt, num_labels, seed=seed)


def save_classifier(
    classifier: SequenceClassifier,
    folder: Path,
    tokenizer: Tokenizer,
    facts: ClassifierFacts,
    *,
    meta: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    later: list[Callable[[], None]] | None = None,
) -> None:
    """Write the model as transformers' classifier of its architecture. All ranks call.

    ``later``: as in ``save_model_folder``.
    """
    config = {
        "num_labels": len(facts.labels),
        "id2label": {str(number): label for number, label in enumerate(facts.labels)},
        "label2id": {label: number for number, label in enumerate(facts.labels)},
        "pad_token_id": facts.pad_id,
        "problem_type": "single_label_classification",
        "mlm_task": {"name": "classification", "max_length": facts.max_length},
    }
    head = Head(ARCHITECTURE, {"score.weight": classifier.score.weight.detach().cpu()}, config)
    save_model_folder(classifier.gpt, folder, tokenizer, meta=meta, dtype=dtype, head=head, later=later)


def load_classifier(
    folder: Path, parallel: ParallelContext, *, dtype: torch.dtype = torch.float32
) -> tuple[SequenceClassifier, ClassifierFacts]:
    """Open a classifier at any tensor size; ours or one that transformers saved.

    Raises:
        CheckpointError: not a classifier, or damaged.
    """
    facts = read_facts(folder)
    gpt, _ = load_model_folder(folder, parallel, dtype=dtype, head_optional=True)
    classifier = SequenceClassifier(gpt, len(facts.labels), seed=None)
    with WeightFiles(folder) as files, torch.no_grad():
        files.check_shape("score.weight", tuple(classifier.score.weight.shape))
        classifier.score.weight.copy_(files.read("score.weight"))
    return classifier, facts


def read_facts(folder: Path) -> ClassifierFacts:
    """Labels and limits from ``config.json``.

    Raises:
        CheckpointError: the model in ``folder`` is not a classifier.
    """
    section, config = read_model_config(folder)
    named = config.get("architectures", list, [])
    if not any(str(name).endswith(ARCHITECTURE) for name in named):
        raise CheckpointError(
            f"{folder} holds a {named[0] if named else 'model without architecture'}, not a classifier",
            hint="train one with `mlm finetune`, and name its run folder",
        )
    pad, task = config.get("pad_token_id", int, 0), config.get("mlm_task", dict, {})
    labels = _labels(config.get("id2label", dict, {"0": "LABEL_0", "1": "LABEL_1"}), folder)
    return ClassifierFacts(labels, pad, int(task.get("max_length") or section.seq_length))


def _labels(id2label: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    try:
        by_number: dict[int, str] = {int(number): str(label) for number, label in id2label.items()}
        labels: Sequence[str] = [by_number[number] for number in range(len(by_number))]
    except (ValueError, KeyError):
        raise CheckpointError(f"{folder / 'config.json'}: `id2label` does not number its labels from 0") from None
    return tuple(labels)
