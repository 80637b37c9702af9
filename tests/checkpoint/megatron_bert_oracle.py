"""What BERT has beside GPT in Megatron-LM's classic layout; shares no code with `mlm_cli`.

Written after the shapes and names in NVIDIA/Megatron-LM's ``megatron/model/bert_model.py`` (``BertLMHead.forward``,
``bert_extended_attention_mask``), ``language_model.py`` (``Pooler``), and the table of names in transformers'
``convert_megatron_bert_checkpoint.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def facts(model: Any) -> dict[str, Any]:
    """Sizes and weights of a `transformers` MegatronBert; as ``megatron_oracle_files.facts``."""
    config, state = model.config, {name: value.detach() for name, value in model.state_dict().items()}
    pair = lambda name: (state[name + ".weight"], state[name + ".bias"])  # noqa: E731
    layers = []
    for i in range(config.num_hidden_layers):
        p = f"bert.encoder.layer.{i}."
        layers.append({
            "ln1": pair(p + "attention.ln"), "ln2": pair(p + "ln"), "q": pair(p + "attention.self.query"),
            "k": pair(p + "attention.self.key"), "v": pair(p + "attention.self.value"),
            "o": pair(p + "attention.output.dense"), "up": [pair(p + "intermediate.dense")],
            "down": pair(p + "output.dense"),
        })  # fmt: skip
    binary = "cls.seq_relationship.weight" in state
    types = state["bert.embeddings.token_type_embeddings.weight"]
    return {
        "words": state["bert.embeddings.word_embeddings.weight"],
        "positions": state["bert.embeddings.position_embeddings.weight"],
        "types": types if binary or types.any() else None,  # `pretrain_bert.py`: no binary head, no token types
        "layers": layers, "final": pair("bert.encoder.ln"), "head": None,
        "transform": pair("cls.predictions.transform.dense"), "norm": pair("cls.predictions.transform.LayerNorm"),
        "bias": state["cls.predictions.bias"],
        "pooler": pair("bert.pooler.dense") if binary else None,
        "binary": pair("cls.seq_relationship") if binary else None,
        "heads": config.num_attention_heads, "groups": config.num_attention_heads, "ffn": config.intermediate_size,
        "length": config.max_position_embeddings, "eps": config.layer_norm_eps,
        "size": config.hidden_size // config.num_attention_heads,
    }  # fmt: skip


def put_heads(found: dict[str, Any], about: dict[str, Any], bias: Tensor, norm: str) -> None:
    """The last stage's part; ``bias`` is one rank's, of its words."""
    head: OrderedDict[str, Tensor] = OrderedDict(bias=bias)
    for name, (weight, shift) in (("dense", about["transform"]), (norm, about["norm"])):
        head |= {f"{name}.weight": weight.clone(), f"{name}.bias": shift.clone()}
    found["lm_head"] = head
    if about["binary"] is not None:
        weight, shift = about["pooler"]
        found["language_model"]["pooler"] = OrderedDict({"dense.weight": weight.clone(), "dense.bias": shift.clone()})
        found["binary_head"] = OrderedDict(weight=about["binary"][0].clone(), bias=about["binary"][1].clone())


def heads(x: Tensor, ranks: list[dict[str, Any]], words: list[Tensor], args: Any) -> tuple[Tensor, Tensor | None]:
    """``x [b, s, h]`` -> logits of the words ``[b, s, padded vocabulary]``, and of the binary head ``[b, 2]``."""
    head = ranks[0]["lm_head"]
    norm = "norm" if "norm.weight" in head else "layernorm"
    # the fused kernel of the layers has no part in this
    inner = F.linear(x, head["dense.weight"], head["dense.bias"])
    inner = F.gelu(inner, approximate="tanh" if args.openai_gelu else "none")
    inner = F.layer_norm(inner, x.shape[-1:], head[f"{norm}.weight"], head[f"{norm}.bias"], args.norm_epsilon)
    parts = [inner @ weight.t() + rank["lm_head"]["bias"] for weight, rank in zip(words, ranks, strict=True)]
    binary = None
    if "binary_head" in ranks[0]:
        pooler, two = ranks[0]["language_model"]["pooler"], ranks[0]["binary_head"]
        pooled = torch.tanh(F.linear(x[:, 0], pooler["dense.weight"], pooler["dense.bias"]))
        binary = F.linear(pooled, two["weight"], two["bias"])
    return torch.cat(parts, -1), binary


def attention_hidden(lengths: Tensor, length: int) -> Tensor:
    """``lengths [b]`` -> ``[b, 1, s, s]``: a padded token sees nothing and is not seen."""
    real = torch.arange(length) < lengths[:, None]
    return ~(real[:, None, :, None] & real[:, None, None, :])
