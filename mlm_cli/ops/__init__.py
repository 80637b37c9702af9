"""Fused operators behind plain functions: a compiled kernel where one was built, else the plain-torch reference.

Every function here has the same meaning, autograd included, on either backend; ``status()`` says which runs and why.
``MLM_OPS=reference`` forces the references.
"""

from __future__ import annotations

from mlm_cli.ops import registry

registry.load()  # before the modules below, which look at what was loaded

# ruff: noqa: E402
from mlm_cli.ops.activation import bias_gelu, bias_gelu_erf, swiglu
from mlm_cli.ops.collective import serves_shared_memory, shared_all_gather_, shared_all_reduce_
from mlm_cli.ops.cross_entropy import cross_entropy_grad_, cross_entropy_stats
from mlm_cli.ops.decode import DecodeStep, serves_decode_step
from mlm_cli.ops.flex import flex_sparse_attention, serves_flex
from mlm_cli.ops.int8 import dequantize_rows, quantize_rows
from mlm_cli.ops.intervals import FEWEST_QUERIES, interval_attention, pays_over_dense, runs_of_keys, serves_intervals
from mlm_cli.ops.norm import layer_norm, residual_norm, rms_norm
from mlm_cli.ops.optimizer import adamw_
from mlm_cli.ops.registry import status
from mlm_cli.ops.softmax import scaled_causal_softmax, scaled_masked_softmax, softmax_gradient
from mlm_cli.ops.sparse_attention import sparse_attention
from mlm_cli.ops.sparse_pattern import SparsePattern

__all__ = [
    "FEWEST_QUERIES",
    "DecodeStep",
    "SparsePattern",
    "adamw_",
    "bias_gelu",
    "bias_gelu_erf",
    "cross_entropy_grad_",
    "cross_entropy_stats",
    "dequantize_rows",
    "flex_sparse_attention",
    "interval_attention",
    "layer_norm",
    "pays_over_dense",
    "quantize_rows",
    "residual_norm",
    "rms_norm",
    "runs_of_keys",
    "scaled_causal_softmax",
    "scaled_masked_softmax",
    "serves_decode_step",
    "serves_flex",
    "serves_intervals",
    "serves_shared_memory",
    "shared_all_gather_",
    "shared_all_reduce_",
    "softmax_gradient",
    "sparse_attention",
    "status",
    "swiglu",
]
