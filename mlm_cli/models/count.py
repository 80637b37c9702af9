"""Exact parameter counts and the arithmetic of a training step, from the model section alone; imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import (
    attended_keys,
    decoder_seq_length,
    ffn_hidden_size,
    has_experts,
    head_dim,
    is_gated,
    num_decoder_layers,
    num_query_groups,
    padded_vocab_size,
)

FLOPS_FORMULA = "Narayanan et al. 2021, eq. 3, without recomputation"
MASKED_SHARE = 0.15  # of BERT's tokens go through the output layer


@dataclass(frozen=True)
class LayerCount:
    """What one entry of a family's layer list holds.

    Attributes:
        name: as in its ``LayerSpec``.
        sliced: parameters that are cut over the tensor ranks, by part (embedding, attention, mlp, norm, head).
        whole: parameters that every tensor rank holds in full, by part.
        cost: share of the work, to balance stages: matrix parameters, for T5's decoder times its share of tokens; a
            lookup and a norm cost nothing.
        tied: name of an earlier entry -> cut parameters counted there that this one uses too; a stage without that
            entry holds a copy of them.
    """

    name: str
    sliced: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    cost: int = 0
    tied: dict[str, int] = field(default_factory=dict)

    def held(self, tensor: int) -> int:
        """Parameters of one of ``tensor`` ranks, without tied ones."""
        return self.sliced.total() // tensor + self.whole.total()


def layer_counts(model: ModelSection) -> list[LayerCount]:
    """One entry for each of the family's layer list, in its order."""
    if model.family == "bert":
        return _bert_counts(model)
    if model.family == "t5":
        return _t5_counts(model)
    return _gpt_counts(model)


def norm_parameters(model: ModelSection) -> int:
    """Of one norm: RMS norm has no bias."""
    return 2 * model.hidden_size if model.norm == "layernorm" else model.hidden_size


def _block_count(model: ModelSection, number: int) -> LayerCount:
    """One transformer layer; biases of row-sliced products are held in full, and so is the router of experts."""
    h, f, bias = model.hidden_size, ffn_hidden_size(model), int(model.bias)
    query = model.num_attention_heads * head_dim(model)
    qkv = query + 2 * num_query_groups(model) * head_dim(model)
    up = 2 * f if is_gated(model) else f
    attention, mlp = (h + bias) * qkv + query * h, (h + bias) * up + f * h
    whole = Counter(attention=bias * h, mlp=bias * h, norm=2 * norm_parameters(model))
    name, cost = f"layers.{number}", attention + mlp
    if has_experts(model, number):
        assert model.experts is not None
        cost = attention + model.experts.top_k * mlp  # work, not size
        mlp = model.experts.num_experts * (mlp + bias * h)
        whole["mlp"] = model.experts.num_experts * h
    return LayerCount(name, Counter(attention=attention, mlp=mlp), whole, cost)


def _gpt_counts(model: ModelSection) -> list[LayerCount]:
    vocabulary = padded_vocab_size(model) * model.hidden_size
    positions = model.seq_length * model.hidden_size if model.position == "learned" else 0
    head = _tied_head(model, cost=vocabulary)
    return [
        LayerCount("embedding", Counter(embedding=vocabulary), Counter(embedding=positions)),
        *(_block_count(model, i) for i in range(model.num_layers)),
        LayerCount("final_norm", whole=Counter(norm=norm_parameters(model))),
        head,
    ]


def _tied_head(model: ModelSection, *, cost: int) -> LayerCount:
    """An output layer of nothing but rows of the vocabulary, its own or the embedding's."""
    vocabulary, tied = padded_vocab_size(model) * model.hidden_size, model.tie_embeddings
    return LayerCount(
        "head", Counter(head=0 if tied else vocabulary), cost=cost, tied={"embedding": vocabulary} if tied else {}
    )


def _t5_counts(model: ModelSection) -> list[LayerCount]:
    """A decoder layer has attention and a norm more than one of the encoder; tables count with the first layers."""
    h, norm, query = model.hidden_size, norm_parameters(model), model.num_attention_heads * head_dim(model)
    vocabulary, table = padded_vocab_size(model) * h, model.relative_buckets * model.num_attention_heads
    share = decoder_seq_length(model) / model.seq_length

    def layer(stack: str, i: int) -> LayerCount:
        plain = _block_count(model, i)
        sliced, whole, cost = plain.sliced.copy(), plain.whole.copy(), plain.cost
        if stack == "decoder":
            sliced["attention"] += 4 * h * query
            whole["norm"] += norm
            cost = int(share * (cost + 2 * h * query)) + 2 * h * query  # keys and values are of the encoder's tokens
        if i == 0:
            sliced["attention"] += table
        return LayerCount(f"{stack}.{i}", sliced, whole, cost, {} if i == 0 else {f"{stack}.0": table})

    return [
        LayerCount("embedding", Counter(embedding=vocabulary)),
        *(layer("encoder", i) for i in range(model.num_layers)),
        LayerCount("encoder_norm", whole=Counter(norm=norm)),
        *(layer("decoder", i) for i in range(num_decoder_layers(model))),
        LayerCount("final_norm", whole=Counter(norm=norm)),
        _tied_head(model, cost=int(share * vocabulary)),
    ]


def _bert_counts(model: ModelSection) -> list[LayerCount]:
    """The head: transform and bias of the masked words' layer; pooler and two scores where there is a binary head."""
    h, padded, norm = model.hidden_size, padded_vocab_size(model), norm_parameters(model)
    post = model.norm_order == "post"
    positions = model.seq_length * h if model.position == "learned" else 0
    embedding = Counter(embedding=positions + model.num_token_types * h, norm=norm if post else 0)
    tied = model.tie_embeddings
    vocabulary = padded * h
    binary = h * h + h + 2 * h + 2 if model.binary_head != "none" else 0
    head = LayerCount(
        "head",
        Counter(head=padded + (0 if tied else vocabulary)),
        Counter(head=h * h + h + norm + binary),
        cost=int(MASKED_SHARE * (vocabulary + h * h)),
        tied={"embedding": vocabulary} if tied else {},
    )
    return [
        LayerCount("embedding", Counter(embedding=vocabulary), embedding),
        *(_block_count(model, i) for i in range(model.num_layers)),
        *([] if post else [LayerCount("final_norm", whole=Counter(norm=norm))]),
        head,
    ]


def parameter_parts(model: ModelSection) -> dict[str, int]:
    """Parameters by part: embedding, attention, mlp, norm, head. The vocabulary counts with its padding."""
    parts = Counter({"embedding": 0, "attention": 0, "mlp": 0, "norm": 0, "head": 0})
    for layer in layer_counts(model):
        parts.update(layer.sliced)
        parts.update(layer.whole)
    return dict(parts)


def count_parameters(model: ModelSection) -> int:
    """Parameters of the whole model, the padding of the vocabulary included; ``vocab_size`` must be set."""
    return sum(parameter_parts(model).values())


def flops_per_token(model: ModelSection, seq_length: int | None = None, *, masked_share: float = MASKED_SHARE) -> float:
    """Floating-point operations per trained token: forward and backward of the matrix products.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", eq. 3,
    without its recomputed forward (72 B s l h^2 (1 + s / 6h + V / 12lh) where it has 96 and 16), written out so that
    grouped heads and gated feed-forward layers count as what they are. Attention counts in full, not its causal half;
    where it is sparse, by the keys of its pattern.
    BERT's output layer counts for ``masked_share`` of the tokens, since only masked ones go through it; of experts,
    those that a token goes to, and the router. A token of T5 is one that the encoder or the decoder reads: the work of
    a sample over the tokens of both.
    """
    if model.family == "t5":
        return _t5_flops(model, seq_length or model.seq_length)
    h, f, s = model.hidden_size, ffn_hidden_size(model), seq_length or model.seq_length
    query = model.num_attention_heads * head_dim(model)
    weights = h * (query + 2 * num_query_groups(model) * head_dim(model)) + query * h
    mlp = h * f * (3 if is_gated(model) else 2)
    attention = 2 * attended_keys(model, s) * query  # scores and their product with the values
    head: float = padded_vocab_size(model) * h
    if model.family == "bert":
        head = masked_share * (head + h * h)
    total = model.num_layers * (weights + mlp + attention) + head
    if model.experts is not None:
        extra = (model.experts.top_k - 1) * mlp + model.experts.num_experts * h
        total += extra * sum(has_experts(model, layer) for layer in range(model.num_layers))
    return 6.0 * total


def _t5_flops(model: ModelSection, s_enc: int) -> float:
    """Per token read: keys and values across are made of the encoder's tokens, all else of a decoder layer of its own.

    The output layer sees the decoder's tokens alone.
    """
    h, s_dec = model.hidden_size, decoder_seq_length(model)
    query = model.num_attention_heads * head_dim(model)
    self_attention, pair = 4 * h * query, 2 * h * query  # a pair: two of query, key, value and output
    mlp = h * ffn_hidden_size(model) * (3 if is_gated(model) else 2)
    encoder = s_enc * (self_attention + mlp + 2 * s_enc * query)
    decoder = s_dec * (self_attention + mlp + 2 * s_dec * query + pair + 2 * s_enc * query) + s_enc * pair
    work = model.num_layers * encoder + num_decoder_layers(model) * decoder + s_dec * padded_vocab_size(model) * h
    return 6.0 * work / (s_enc + s_dec)
