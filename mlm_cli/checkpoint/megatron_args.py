"""The model section against the command line that Megatron-LM keeps in a checkpoint (``args``, a namespace).

Option names as in NVIDIA/Megatron-LM, ``megatron/training/arguments.py``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError

from mlm_cli.checkpoint.megatron_keys import TOKEN_TYPES
from mlm_cli.config.schema import ModelSection
from mlm_cli.config.shapes import ffn_hidden_size, head_dim, is_sparse, num_query_groups
from mlm_cli.errors import CheckpointError, UsageError

# Options that change what the model computes, and the value (or absence) under which it is what we compute.
_UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "num_experts": (None, "experts"),
    "squared_relu": (False, "squared ReLU"),
    "apply_layernorm_1p": (False, "norm weights stored minus one"),
    "apply_residual_connection_post_layernorm": (False, "residuals taken behind the norm"),
    "rotary_interleaved": (False, "rotary positions over neighbouring pairs"),
    "rotary_percent": (1.0, "rotary positions on a part of each head"),
    "rotary_seq_len_interpolation_factor": (None, "scaled rotary positions"),
    "use_rope_scaling": (False, "scaled rotary positions"),
    "qk_layernorm": (False, "norms on queries and keys"),
    "multi_latent_attention": (False, "latent attention"),
    "sliding_window": (None, "attention in a window"),
}


class ArgsReader:
    """Typed access to the namespace; a missing or ill-typed option is a ``CheckpointError`` naming it."""

    def __init__(self, args: Namespace, where: str) -> None:
        self.values, self.where = vars(args), where

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is ...:
                raise CheckpointError(f"{self.where}: args.{name} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise CheckpointError(f"{self.where}: args.{name} cannot be {value!r}")
        return value


def settings_of(args: Namespace, where: str) -> dict[str, Any]:
    """Settings of the model section (``vocab_size`` apart) that ``args`` describe, whatever the family.

    Raises:
        CheckpointError: an option that is missing, or asks for what we do not compute.
    """
    options = ArgsReader(args, where)
    for name, (usual, what) in _UNSUPPORTED.items():
        value = options.values.get(name)
        if value is not None and value != usual:
            raise CheckpointError(f"{where}: args.{name} is {value!r}: {what} are not supported in this layout")
    heads = options.get("num_attention_heads", int)
    grouped = options.get("group_query_attention", bool, False)
    swiglu = options.get("swiglu", bool, False)
    norm = options.get("normalization", str, "LayerNorm")
    if norm not in ("LayerNorm", "RMSNorm"):
        raise CheckpointError(f"{where}: args.normalization is {norm!r}, neither LayerNorm nor RMSNorm")
    eps = options.get("layernorm_epsilon", (int, float), 1e-5)
    return {
        "num_layers": options.get("num_layers", int),
        "hidden_size": options.get("hidden_size", int),
        "num_attention_heads": heads,
        # without grouping Megatron's num_query_groups means nothing (its default is 1)
        "num_query_groups": options.get("num_query_groups", int) if grouped else heads,
        "head_dim": options.get("kv_channels", int, None),
        "ffn_hidden_size": options.get("ffn_hidden_size", int, 4 * options.get("hidden_size", int)),
        "seq_length": options.get("max_position_embeddings", int, None) or options.get("seq_length", int),
        "make_vocab_size_divisible_by": options.get("make_vocab_size_divisible_by", int, 128),
        "position": _position(options),
        "rotary_base": float(options.get("rotary_base", (int, float), 10000.0)),
        "norm": norm.lower(),
        "norm_eps": options.get("norm_epsilon", (int, float), eps),
        "activation": "swiglu" if swiglu else _gelu(options),
        "bias": options.get("add_bias_linear", bool, not options.get("disable_bias_linear", bool, False))
        or options.get("add_qkv_bias", bool, False),
        "tie_embeddings": not options.get("untie_embeddings_and_output_weights", bool, False),
        "init_std": options.get("init_method_std", (int, float), 0.02),
        "hidden_dropout": float(options.get("hidden_dropout", (int, float), 0.0)),
        "attention_dropout": float(options.get("attention_dropout", (int, float), 0.0)),
    }


def _position(options: ArgsReader) -> str:
    kind = options.get("position_embedding_type", str, None)
    if kind is None:
        rotary = options.get("use_rotary_position_embeddings", bool, False)
        kind = "rope" if rotary or not options.get("add_position_embedding", bool, True) else "learned_absolute"
    known = {"learned_absolute": "learned", "rope": "rotary"}
    if kind not in known:
        raise CheckpointError(f"{options.where}: args.position_embedding_type is {kind!r}, not {' or '.join(known)}")
    return known[kind]


def _gelu(options: ArgsReader) -> str:
    """The fused kernel and ``openai_gelu`` are the tanh form; without either it is torch's exact one."""
    if options.get("onnx_safe", bool, False):
        return "gelu_erf"
    tanh = options.get("openai_gelu", bool, False) or options.get("bias_gelu_fusion", bool, True)
    return "gelu" if tanh else "gelu_erf"


# What Megatron-LM's BERT may be asked for and neither it nor transformers' MegatronBert has a use for.
_OF_BERT: dict[str, tuple[Any, ...]] = {
    "position": ("learned",),
    "norm": ("layernorm",),
    "activation": ("gelu", "gelu_erf"),
    "bias": (True,),
    "tie_embeddings": (True,),
}


def bert_settings(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], args: Namespace | None, where: str
) -> dict[str, Any]:
    """``settings`` with what makes them those of a BERT: token types and binary head.

    Megatron's BERT has both or neither (``pretrain_bert.py``). Its second sentence is the true one or stands first, so
    its binary head tells the order, unless ``mlm`` noted otherwise.

    Args:
        shapes: canonical name -> shape of one rank's tensor.

    Raises:
        CheckpointError: an option that no BERT of ours has.
    """
    for key, allowed in _OF_BERT.items():
        if key in settings and settings[key] not in allowed:
            raise CheckpointError(
                f"{where}: its args ask for model.{key}: {settings[key]}; a BERT is read with "
                f"{' or '.join(map(str, allowed))} alone"
            )
    options = ArgsReader(args or Namespace(), where)
    binary = options.get("bert_binary_head", bool, any(name.startswith("binary_head.") for name in shapes))
    noted = options.get("mlm_binary_head", str, "sentence_order")
    types = shapes.get(TOKEN_TYPES) or (2,)
    return {
        **settings,
        "family": "bert",
        "num_token_types": types[0],
        "binary_head": noted if binary else "none",
    }


def has_two_gelus(args: Namespace | None) -> bool:
    """Whether a BERT of these args has the tanh form of GELU in its layers and the exact one in its head.

    So it is by default: the fused kernel is the tanh form, and ``BertLMHead`` knows nothing of it.
    """
    if args is None:
        return True
    options = ArgsReader(args, "")
    return _gelu(options) == "gelu" and not options.get("openai_gelu", bool, False)


def build_section(settings: Mapping[str, Any], given: Mapping[str, Any], where: str) -> ModelSection:
    """The model section of ``settings``, those the user gave by hand first.

    Raises:
        CheckpointError: values that make no model.
    """
    merged = {key: value for key, value in {**settings, **given}.items() if value is not None}
    if merged.get("head_dim") is None and merged["hidden_size"] % merged["num_attention_heads"]:
        raise CheckpointError(
            f"{where}: {merged['num_attention_heads']} heads do not divide the hidden size {merged['hidden_size']}"
        )
    try:
        return ModelSection(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None


# Settings that the layout has a place for, with the values it can express (None: any), and those that do not change
# what a model computes once it is trained. Any other setting must be at its default.
_ANY = dict.fromkeys(
    (
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size"),
        *("seq_length", "vocab_size", "make_vocab_size_divisible_by", "norm_eps"),
        *("init_std", "hidden_dropout", "attention_dropout"),
    ),
    None,
)
_EXPRESSED: dict[str, dict[str, tuple[Any, ...] | None]] = {
    "gpt": {
        **_ANY,
        "family": ("gpt",),
        "position": ("learned", "rotary"),
        "rotary_base": None,
        "norm": ("layernorm", "rmsnorm"),
        "norm_order": ("pre",),
        "activation": ("gelu", "gelu_erf", "swiglu"),
        "bias": None,
        "tie_embeddings": None,
    },
    "bert": {
        **_ANY,
        **_OF_BERT,
        "family": ("bert",),
        "rotary_base": None,  # of no use to learned positions
        "norm_order": ("pre",),
        "num_token_types": None,
        "binary_head": None,
    },
}
_WORDS = {
    "experts": "a mixture of experts",
    "rotary_scaling": "scaled rotary positions",
    "attention": "sparse attention",
}


def refuse_inexpressible(model: ModelSection) -> None:
    """Raise unless Megatron's classic layout can hold this model and mean the same by it.

    Raises:
        UsageError: naming the first setting that it has no place for.
    """
    expressed = _EXPRESSED.get(model.family, {})
    for name, about in ModelSection.model_fields.items():
        value, allowed = getattr(model, name), expressed.get(name)
        if name == "attention" and not is_sparse(model):
            continue  # which code computes it, not what
        fits = name in expressed and (allowed is None or value in allowed)
        if not fits and (name in expressed or value != about.get_default(call_default_factory=True)):
            what = f"{_WORDS[name]} (model.{name}: {value})" if name in _WORDS else f"model.{name}: {value}"
            raise UsageError(
                f"Megatron's classic layout cannot express this model: it has no place for {what}",
                hint="`--to mlm` keeps it" + ("" if name in ("experts", "attention") else ", `--to hf` may"),
            )
    if model.binary_head != "none" and model.num_token_types != 2:
        raise UsageError(
            "Megatron's classic layout cannot express this model: a BERT with a binary head has 2 token types there, "
            f"not model.num_token_types: {model.num_token_types}",
            hint="`--to mlm` and `--to hf` keep them",
        )


def arguments_of(model: ModelSection, *, tensor: int, pipeline: int, dtype: torch.dtype, iteration: int) -> Namespace:
    """The namespace that goes with a model: what Megatron-LM checks on loading, and what describes the architecture."""
    assert model.vocab_size is not None
    step = model.make_vocab_size_divisible_by * tensor
    rotary, swiglu = model.position == "rotary", model.activation == "swiglu"
    # The fused kernel adds the bias on the way: without biases the tanh form goes by its other name. So it does in a
    # BERT, whose head has the tanh form under no other.
    fused = model.activation == "gelu" and model.bias and model.family == "gpt"
    groups = num_query_groups(model)
    return Namespace(
        num_layers=model.num_layers,
        encoder_num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        kv_channels=head_dim(model),
        group_query_attention=groups != model.num_attention_heads,
        num_query_groups=groups if groups != model.num_attention_heads else 1,
        seq_length=model.seq_length,
        encoder_seq_length=model.seq_length,
        max_position_embeddings=model.seq_length,
        position_embedding_type="rope" if rotary else "learned_absolute",
        add_position_embedding=not rotary,
        use_rotary_position_embeddings=rotary,
        rotary_base=model.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None,
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        norm_epsilon=model.norm_eps,
        layernorm_epsilon=model.norm_eps,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        swiglu=swiglu,
        squared_relu=False,
        onnx_safe=False,
        bias_gelu_fusion=fused,
        openai_gelu=model.activation == "gelu" and not fused,
        bias_swiglu_fusion=False,
        add_bias_linear=model.bias,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_std,
        num_experts=None,
        padded_vocab_size=-(-model.vocab_size // step) * step,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        mlm_vocab_size=model.vocab_size,  # Megatron keeps only the padded size
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=None,
        vocab_file=None,
        tensor_model_parallel_size=tensor,
        model_parallel_size=tensor,  # its name before version 3
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=None,
        data_parallel_random_init=False,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        bert_binary_head=model.family != "bert" or model.binary_head != "none",  # its default, of no use to a GPT
        mlm_binary_head=model.binary_head if model.binary_head != "none" else None,
        iteration=iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def command_line(args: Namespace) -> list[str]:
    """The options that Megatron-LM must be started with for this model: it does not take all of them from the file."""
    sizes = {
        "--num-layers": args.num_layers,
        "--hidden-size": args.hidden_size,
        "--ffn-hidden-size": args.ffn_hidden_size,
        "--num-attention-heads": args.num_attention_heads,
        "--kv-channels": args.kv_channels,
        "--seq-length": args.seq_length,
        "--max-position-embeddings": args.max_position_embeddings,
        "--position-embedding-type": args.position_embedding_type,
        "--normalization": args.normalization,
        "--norm-epsilon": args.norm_epsilon,
        "--make-vocab-size-divisible-by": args.make_vocab_size_divisible_by,
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
    }
    if args.group_query_attention:
        sizes["--num-query-groups"] = args.num_query_groups
    if args.position_embedding_type == "rope":
        sizes["--rotary-base"] = int(args.rotary_base)
    switches = {
        "--group-query-attention": args.group_query_attention,
        "--swiglu": args.swiglu,
        "--openai-gelu": args.openai_gelu,
        "--no-bias-gelu-fusion": not args.bias_gelu_fusion,
        "--disable-bias-linear": not args.add_bias_linear,
        "--untie-embeddings-and-output-weights": args.untie_embeddings_and_output_weights,
        "--bert-no-binary-head": not args.bert_binary_head,
        "--fp16": args.fp16,
        "--bf16": args.bf16,
    }
    words = [word for name, value in sizes.items() for word in (name, str(value))]
    return [*words, *(name for name, wanted in switches.items() if wanted), "--use-legacy-models"]
