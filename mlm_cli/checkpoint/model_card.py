"""The README.md that travels with a model: what it is, what made it, and what is not known about it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, hub_layout, is_sparse, num_decoder_layers, num_query_groups
from mlm_cli.models.count import count_parameters, layer_counts

_STYLE = {
    "gpt2": "GPT-2 style",
    "llama": "Llama style",
    "bert": "BERT",
    "megatron-bert": "Megatron-LM BERT",
    "t5": "T5",
    "mlm": "mixture-of-experts",
}
_KIND = {"gpt": "causal language model", "bert": "masked language model", "t5": "encoder-decoder"}
_OPENS = re.compile(r"Opens (as `\w+` in `transformers`, and )?wherever `mlm` takes a MODEL of its kind\.")
_PIPELINE = {"gpt": "text-generation", "bert": "fill-mask", "t5": "text2text-generation"}


# Tasks by the end of transformers' class name: what the model is, and the Hub's name for what it does.
_TASKS = {
    "ForSequenceClassification": ("text classifier", "text-classification"),
    "ForTokenClassification": ("token classifier", "token-classification"),
    "ForQuestionAnswering": ("reader that finds answers in a text", "question-answering"),
    "ForMultipleChoice": ("chooser between answers", "multiple-choice"),
    "Model": ("encoder of texts as vectors", "sentence-similarity"),
}


def model_card(
    model: ModelSection, architecture: str, dtype: str, meta: Mapping[str, Any], *, layout: str | None = None,
    head_parameters: int | None = None,
) -> str:  # fmt: skip
    """Markdown with the Hub's front matter.

    Args:
        architecture: transformers' class name.
        dtype: of the weights.
        meta: training facts, shown as they are; ``name`` becomes the title.
        layout: ``model_type`` of the folder; unset: that of the model.
        head_parameters: of a task's head, which stands in place of the model's own; None: it has its own.
    """
    kind, pipeline = _KIND[model.family], _PIPELINE[model.family]
    if head_parameters is not None:
        kind, pipeline = next(found for ending, found in _TASKS.items() if architecture.endswith(ending))
    rows = {
        "layers": f"{model.num_layers} + {num_decoder_layers(model)}" if model.family == "t5" else model.num_layers,
        "hidden size": model.hidden_size,
        "feed-forward size": ffn_hidden_size(model),
        "attention heads": model.num_attention_heads,
        "key/value heads": num_query_groups(model),
        "longest context": f"{model.seq_length} tokens",
        "vocabulary": f"{model.vocab_size} tokens",
        "positions, norm, activation": f"{model.position}, {model.norm}, {model.activation}",
        "parameters": f"{_exact_parameters(model, head_parameters):,}",
        "weights": dtype,
    }
    facts = {key: value for key, value in meta.items() if key != "name" and value is not None}
    style = hub_layout(model)
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {pipeline}",
        "license: unknown",
        "tags: [mlm]",
        "---",
        "",
        f"# {meta.get('name', 'A model trained with mlm')}",
        "",
        f"A {_STYLE[style]} {kind}. {_opens(layout or style, architecture)}",
        "",
        "## The model",
        "",
        *_table(rows),
        "",
        "## How it was trained",
        "",
        *(_table(facts) if facts else ["Not recorded."]),
        "",
        "## Limits",
        "",
        *_sparse_limit(model),
        "- Licence unknown: whoever publishes these weights states one, fitting the data they were trained on.",
        "- It repeats what is in its training text, errors, bias and private details included, and states falsehoods",
        "  fluently. Nothing here has tested it for a particular use.",
        f"- Texts longer than {model.seq_length} tokens are beyond what it was trained for.",
        "",
    ]
    return "\n".join(lines)


def restated(card: str, architecture: str, layout: str, dtype: str) -> str:
    """A card of ours for the same model in another form: the type of its weights and what opens it, as of now."""
    # Functions, so that nothing in the new words is taken for a reference to a group.
    card = re.sub(r"^\| weights \| [^|\n]+ \|$", lambda _: f"| weights | {dtype} |", card, flags=re.MULTILINE)
    return re.sub(_OPENS, lambda _: _opens(layout, architecture), card)


def _opens(layout: str, architecture: str) -> str:
    outside = "" if layout == "mlm" else f"as `{architecture}` in `transformers`, and "
    return f"Opens {outside}wherever `mlm` takes a MODEL of its kind."


def _sparse_limit(model: ModelSection) -> list[str]:
    """What whoever opens a sparse model elsewhere must know: the layout has no word for its pattern."""
    if not is_sparse(model):
        return []
    return [
        f"- Its attention is sparse (`{model.attention.pattern}`, window {model.attention.window}), which `mlm` reads",
        "  from `config.json`. Other programs attend to every token, which is another model: use `mlm`.",
    ]


def _exact_parameters(model: ModelSection, head_parameters: int | None) -> int:
    """Parameters as exported: without the padding rows of the vocabulary."""
    exact = model.model_copy(update={"make_vocab_size_divisible_by": 1})
    if head_parameters is None:
        return count_parameters(exact)
    return sum(layer.held(1) for layer in layer_counts(exact) if layer.name != "head") + head_parameters


def _table(rows: Mapping[str, Any]) -> list[str]:
    cell = {key: str(value).replace("|", "\\|").replace("\n", " ") for key, value in rows.items()}
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cell.items())]
