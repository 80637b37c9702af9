"""Rotary positions, plain and scaled, as transformers' ``rope_parameters`` and back."""

from __future__ import annotations

from typing import Any

from mlm_cli.checkpoint.key_map import ConfigReader
from mlm_cli.config.schema import ModelSection, RotaryScalingSection
from mlm_cli.config.shapes import head_dim
from mlm_cli.errors import CheckpointError
from mlm_cli.models.rotary import attention_factor, ntk_base

_READABLE = ("default", "linear", "dynamic", "yarn", "llama3")


def read_rope(config: ConfigReader) -> dict[str, Any]:
    """``seq_length``, ``rotary_base``, ``rotary_scaling`` of a ``config.json``, where transformers 4 or 5 writes them.

    Raises:
        CheckpointError: another kind of scaling, or one that lacks a number.
    """
    # transformers 5 too takes the older key where both are there: somebody has added it to what it had written.
    rope = config.get("rope_scaling", dict, None) or config.get("rope_parameters", dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _READABLE or rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("truncate", True) is not True:
        raise CheckpointError(
            f"{config.where}: rotary positions of type `{kind}` are not supported in this form",
            hint=f"known types: {', '.join(_READABLE)}, over whole heads",
        )
    length = config.get("max_position_embeddings", int, 2048)
    base = _number(config, rope, "rope_theta", config.get("rope_theta", (int, float), 10000.0))
    if kind == "default":
        return {"seq_length": length, "rotary_base": base} | _own_ntk(config, base)
    # transformers takes the trained length of `dynamic` from max_position_embeddings, whatever else is said.
    trained = length if kind == "dynamic" else _number(config, rope, "original_max_position_embeddings", length)
    factor = _number(config, rope, "factor", length / trained if kind == "yarn" else None)
    scaling: dict[str, Any] = {"type": kind, "factor": factor, "original_seq_length": int(trained)}
    if kind == "yarn":
        scaling |= {key: _number(config, rope, key, rope_default) for key, rope_default in _YARN.items()}
        scaling["attention_factor"] = _attention_factor(config, rope, factor)
    if kind == "llama3":
        scaling |= {key: _number(config, rope, key, None) for key in _LLAMA3}
    own = config.get("mlm", dict, {}).get("seq_length")
    seq_length = own if kind == "dynamic" and isinstance(own, int) and own >= length else length
    return {"seq_length": seq_length, "rotary_base": base, "rotary_scaling": scaling}


_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
_LLAMA3 = ("low_freq_factor", "high_freq_factor")


def _number(config: ConfigReader, rope: dict[str, Any], key: str, default: float | None) -> float:
    value = rope.get(key)
    value = default if value is None else value
    if value is None:
        kind = rope.get("rope_type", rope.get("type"))
        raise CheckpointError(f"{config.where}: rotary positions of type `{kind}` need `{key}`, which is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{config.where}: `{key}` cannot be {value!r}")
    return float(value)


def _attention_factor(config: ConfigReader, rope: dict[str, Any], factor: float) -> float | None:
    """As given, or from the two ``mscale`` of DeepSeek's form; None: YaRN's own."""
    if rope.get("attention_factor") is not None:
        return _number(config, rope, "attention_factor", None)
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return None
    plain = attention_factor(RotaryScalingSection(type="yarn", factor=max(factor, 1.0), original_seq_length=1)) - 1.0
    over, under = (1.0 + _number(config, rope, key, None) * plain for key in ("mscale", "mscale_all_dim"))
    return over / under


def _own_ntk(config: ConfigReader, base: float) -> dict[str, Any]:
    """A fixed longer base was written as what it is to transformers, a base; ours are the two numbers it came from."""
    own = config.get("mlm", dict, {})
    scaling, original = own.get("rotary_scaling"), own.get("rotary_base")
    if not isinstance(scaling, dict) or scaling.get("type") != "ntk" or not isinstance(original, int | float):
        return {}
    heads = max(config.get("num_attention_heads", int), 1)
    dim = config.get("head_dim", int, config.get("hidden_size", int) // heads)
    try:
        same = abs(ntk_base(dim, original, float(scaling.get("factor", 0))) / base - 1) < 1e-9
    except (TypeError, ValueError):
        same = False
    return {"rotary_base": float(original), "rotary_scaling": scaling} if same else {}


def write_rope(model: ModelSection) -> dict[str, Any]:
    """``config.json`` entries for the positions of a model section."""
    scaling, base = model.rotary_scaling, model.rotary_base
    if scaling is None or scaling.type == "ntk":
        base = base if scaling is None else ntk_base(head_dim(model), base, scaling.factor)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        return {"max_position_embeddings": model.seq_length, "rope_theta": base, "rope_parameters": rope}
    rope = {"rope_type": scaling.type, "rope_theta": base, "factor": scaling.factor}
    rope["original_max_position_embeddings"] = scaling.original_seq_length
    if scaling.type == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope["attention_factor"] = attention_factor(scaling)
    if scaling.type == "llama3":
        rope |= {key: getattr(scaling, key) for key in _LLAMA3}
    length = scaling.original_seq_length if scaling.type == "dynamic" else model.seq_length
    old = {key: value for key, value in rope.items() if key != "rope_theta"}  # read by transformers 4
    return {"max_position_embeddings": length, "rope_theta": base, "rope_parameters": rope, "rope_scaling": old}
