"""How widely initial weights are spread: a standard deviation for each kind of matrix."""

from __future__ import annotations

from dataclasses import dataclass

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, head_dim


@dataclass(frozen=True)
class InitialStd:
    """Standard deviations of initial weights.

    Attributes:
        word, head: of the word embedding, and of an output layer that is not tied to it.
        query, key: of query projections, and of those of keys and values.
        up, attention_out, down: of what enters the feed-forward layer, and of what leaves both to the residual sum.
        relative: of the table of relative positions.
    """

    word: float
    query: float
    key: float
    attention_out: float
    up: float
    down: float
    head: float
    relative: float


def initial_std(model: ModelSection) -> InitialStd:
    """The deviations of a family.

    GPT and BERT: one, ``init_std``, and for what writes to the residual sum, which grows with the depth of a pre-norm
    model, ``1 / sqrt(2 * layers)`` of it (Radford et al. 2019, section 2.3).

    T5: the square root of what is summed over, so that sums have variance 1 (mesh-tensorflow's
    ``transformer/attention.py`` and T5X's ``layers.py``); queries also make up for scores that are not divided by the
    square root of the head size. The table of positions is drawn as in transformers' ``T5PreTrainedModel``.
    """
    if model.family == "t5":
        wide, dim = model.hidden_size**-0.5, head_dim(model)
        return InitialStd(
            word=1.0,
            query=wide * dim**-0.5,
            key=wide,
            attention_out=(model.num_attention_heads * dim) ** -0.5,
            up=wide,
            down=ffn_hidden_size(model) ** -0.5,
            head=wide,
            relative=wide,
        )
    std = model.init_std
    out = std / (2 * model.num_layers) ** 0.5 if model.norm_order == "pre" else std
    return InitialStd(std, std, std, out, std, out, std, std)
