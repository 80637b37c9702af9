"""The README.md that travels with a model: what it is, what made it, and what is not known about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, hub_layout, is_sparse, num_decoder_layers, num_query_groups
from mlm_cli.models.count import count_parameters

_STYLE = {
    "gpt2": "GPT-2 style",
    "llama": "Llama style",
    "bert": "BERT",
    "megatron-bert": "Megatron-LM BERT",
    "t5": "T5",
    "mlm": "mixture-of-experts",
}
_KIND = {"gpt": "causal language model", "bert": "masked language model", "t5": "encoder-decoder"}
_PIPELINE = {"gpt": "text-generation", "bert": "fill-mask", "t5": "text2text-generation"}


def model_card(model: ModelSection, architecture: str, dtype: str, meta: Mapping[str, Any]) -> str:
    """Markdown with the Hub's front matter.

    Args:
        architecture: transformers' class name.
        dtype: of the weights.
        meta: training facts, shown as they are; ``name`` becomes the title.
    """
    classifier = "Classification" in architecture
    rows = {
        "layers": f"{model.num_layers} + {num_decoder_layers(model)}" if model.family == "t5" else model.num_layers,
        "hidden size": model.hidden_size,
        "feed-forward size": ffn_hidden_size(model),
        "attention heads": model.num_attention_heads,
        "key/value heads": num_query_groups(model),
        "longest context": f"{model.seq_length} tokens",
        "vocabulary": f"{model.vocab_size} tokens",
        "positions, norm, activation": f"{model.position}, {model.norm}, {model.activation}",
        "parameters": f"{_exact_parameters(model):,}",
        "weights": dtype,
    }
    facts = {key: value for key, value in meta.items() if key != "name" and value is not None}
    kind = "text classifier" if classifier else _KIND[model.family]
    layout = hub_layout(model)
    outside = "" if layout == "mlm" else f"as `{architecture}` in `transformers`, and "
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if classifier else _PIPELINE[model.family]}",
        "license: unknown",
        "tags: [mlm]",
        "---",
        "",
        f"# {meta.get('name', 'A model trained with mlm')}",
        "",
        f"A {_STYLE[layout]} {kind}. Opens {outside}wherever `mlm` takes a MODEL of its kind.",
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


def _sparse_limit(model: ModelSection) -> list[str]:
    """What whoever opens a sparse model elsewhere must know: the layout has no word for its pattern."""
    if not is_sparse(model):
        return []
    return [
        f"- Its attention is sparse (`{model.attention.pattern}`, window {model.attention.window}), which `mlm` reads",
        "  from `config.json`. Other programs attend to every token, which is another model: use `mlm`.",
    ]


def _exact_parameters(model: ModelSection) -> int:
    """Parameters as exported: without the padding rows of the vocabulary."""
    return count_parameters(model.model_copy(update={"make_vocab_size_divisible_by": 1}))


def _table(rows: Mapping[str, Any]) -> list[str]:
    cell = {key: str(value).replace("|", "\\|").replace("\n", " ") for key, value in rows.items()}
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cell.items())]
