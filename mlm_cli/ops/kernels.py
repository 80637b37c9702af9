"""Fake-tensor and autograd rules of the compiled operators. Imported only once their library is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlm_cli.ops.autograd import differentiable

_ops = torch.ops.mlm
_fake = torch.library.register_fake
Maybe = Tensor | None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dense(x: Tensor) -> Tensor:
    """The kernels return packed rows whatever the strides of their input."""
    return x.new_empty(x.shape)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


# --- norms


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=_wide(x))


@_fake("mlm::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Maybe, eps: float) -> tuple[Tensor, ...]:
    return _dense(x), _statistic(x), _statistic(x)


@_fake("mlm::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _dense(x), _statistic(x)


@_fake("mlm::norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Maybe, mean: Maybe, rstd: Tensor) -> tuple[Tensor, ...]:
    return _dense(x), _dense(weight), _nothing(weight) if bias is None else _dense(bias)


@_fake("mlm::residual_norm")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, norm_bias: Maybe, bias: Maybe, seed: Maybe, eps: float, dropout: float,
    rms: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _dense(x), _dense(x), _nothing(_statistic(x)) if rms else _statistic(x), _statistic(x)


@_fake("mlm::residual_norm_backward")
def _(
    grad: Tensor, grad_total: Maybe, total: Tensor, weight: Tensor, norm_bias: Maybe, bias: Maybe, mean: Tensor,
    rstd: Tensor, seed: Maybe, dropout: float, rms: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        _dense(total),
        _dense(total) if dropout > 0 else _nothing(total),
        _dense(weight),
        _nothing(weight) if norm_bias is None or rms else _dense(norm_bias),
        _nothing(weight) if bias is None else _dense(bias),
    )


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1], output[2])


def _layer_norm_backward(ctx: Any, grad: Maybe, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if grad is None:
        return None, None, None, None
    dx, dweight, dbias = _ops.norm_backward.default(grad, x, weight, bias, mean, rstd)
    return dx, dweight, None if bias is None else dbias, None


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_norm_backward(ctx: Any, grad: Maybe, *_: Any) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    if grad is None:
        return None, None, None
    dx, dweight, _nothing = _ops.norm_backward.default(grad, x, weight, None, None, rstd)
    return dx, dweight, None


def _residual_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _x, _residual, weight, norm_bias, bias, seed, _eps, dropout, rms = inputs
    _normed, total, mean, rstd = output
    ctx.save_for_backward(total, weight, norm_bias, bias, mean, rstd, seed)
    ctx.dropout, ctx.rms = dropout, rms


def _residual_norm_backward(ctx: Any, grad: Maybe, grad_total: Maybe, *_: Any) -> tuple[Any, ...]:
    total, weight, norm_bias, bias, mean, rstd, seed = ctx.saved_tensors
    if grad is None:
        if grad_total is None:
            return (None,) * 9
        grad = torch.zeros_like(total)
    dtotal, dbranch, dweight, dnorm_bias, dbias = _ops.residual_norm_backward.default(
        grad, grad_total, total, weight, norm_bias, bias, mean, rstd, seed, ctx.dropout, ctx.rms
    )
    return (
        dbranch if ctx.dropout > 0 else dtotal,
        dtotal,
        dweight,
        None if norm_bias is None or ctx.rms else dnorm_bias,
        None if bias is None else dbias,
        *(None,) * 4,
    )


layer_norm = differentiable(_ops.layer_norm.default, 1, _layer_norm_setup, _layer_norm_backward)
rms_norm = differentiable(_ops.rms_norm.default, 1, _rms_norm_setup, _rms_norm_backward)
residual_norm = differentiable(_ops.residual_norm.default, 2, _residual_norm_setup, _residual_norm_backward)


# --- softmax


@_fake("mlm::masked_softmax")
def _(scores: Tensor, mask: Maybe, seed: Maybe, scale: float, dropout: float) -> tuple[Tensor, Tensor]:
    return _dense(scores), _dense(scores) if dropout > 0 else _nothing(scores)


@_fake("mlm::causal_softmax")
def _(scores: Tensor, seed: Maybe, scale: float, offset: int, window: int, dropout: float) -> tuple[Tensor, Tensor]:
    return _dense(scores), _dense(scores) if dropout > 0 else _nothing(scores)


@_fake("mlm::softmax_backward")
def _(
    grad: Tensor, probs: Tensor, seed: Maybe, scale: float, dropout: float, causal: bool, offset: int, window: int
) -> Tensor:
    return _dense(probs)


softmax_backward = _ops.softmax_backward.default


def _masked_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _scores, _mask, seed, scale, dropout = inputs
    ctx.save_for_backward(output[1] if dropout > 0 else output[0], seed)
    ctx.rest = (scale, dropout, False, 0, 0)


def _causal_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _scores, seed, scale, offset, window, dropout = inputs
    ctx.save_for_backward(output[1] if dropout > 0 else output[0], seed)
    ctx.rest = (scale, dropout, True, offset, window)


def _softmax_gradient(ctx: Any, grad: Maybe) -> Maybe:
    probs, seed = ctx.saved_tensors
    return None if grad is None else softmax_backward(grad, probs, seed, *ctx.rest)


def _masked_backward(ctx: Any, grad: Maybe, *_: Any) -> tuple[Any, ...]:
    return _softmax_gradient(ctx, grad), None, None, None, None


def _causal_backward(ctx: Any, grad: Maybe, *_: Any) -> tuple[Any, ...]:
    return _softmax_gradient(ctx, grad), None, None, None, None, None


masked_softmax = differentiable(_ops.masked_softmax.default, 1, _masked_setup, _masked_backward)
causal_softmax = differentiable(_ops.causal_softmax.default, 1, _causal_setup, _causal_backward)


# --- attention over runs of keys


@_fake("mlm::interval_attention")
def _(query: Tensor, key: Tensor, value: Tensor, begin: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _dense(query), query.new_empty(query.shape[:3])


@_fake("mlm::interval_attention_backward")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, begin: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _dense(query), _dense(key), _dense(value)


def _interval_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, key, value, begin, end, scale = inputs
    ctx.save_for_backward(query, key, value, output[1], begin, end)
    ctx.scale = scale


def _interval_backward(ctx: Any, grad: Maybe, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    return *_ops.interval_attention_backward.default(grad, *ctx.saved_tensors, ctx.scale), None, None, None


interval_attention = differentiable(_ops.interval_attention.default, 1, _interval_setup, _interval_backward)


# --- activations


@_fake("mlm::bias_gelu")
def _(x: Tensor, bias: Maybe) -> Tensor:
    return _dense(x)


@_fake("mlm::bias_gelu_backward")
def _(grad: Tensor, x: Tensor, bias: Maybe) -> tuple[Tensor, Tensor]:
    return _dense(x), _nothing(x) if bias is None else _dense(bias)


@_fake("mlm::swiglu")
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_fake("mlm::swiglu_backward")
def _(grad: Tensor, x: Tensor) -> Tensor:
    return _dense(x)


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, grad: Maybe) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    if grad is None:
        return None, None
    dx, dbias = _ops.bias_gelu_backward.default(grad, x, bias)
    return dx, None if bias is None else dbias


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _swiglu_backward(ctx: Any, grad: Maybe) -> Maybe:
    return None if grad is None else _ops.swiglu_backward.default(grad, *ctx.saved_tensors)


bias_gelu = differentiable(_ops.bias_gelu.default, 1, _gelu_setup, _gelu_backward)
swiglu = differentiable(_ops.swiglu.default, 1, _swiglu_setup, _swiglu_backward)


# --- loss and optimizer: in place or without gradient


@_fake("mlm::cross_entropy_stats")
def _(logits: Tensor, labels: Tensor, vocab_start: int, num_valid: int) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total, target = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    return maximum, total, target


@_fake("mlm::cross_entropy_grad_")
def _(logits: Tensor, labels: Tensor, lse: Tensor, scale: Tensor, vocab_start: int, num_valid: int) -> None:
    return None


@_fake("mlm::adamw_")
def _(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, model_copy: Maybe, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float,
) -> None:  # fmt: skip
    return None


cross_entropy_stats = _ops.cross_entropy_stats.default
cross_entropy_grad_ = _ops.cross_entropy_grad_.default
adamw_ = _ops.adamw_.default


# --- decoding


@_fake("mlm::decode_plan")
def _(weights: list[Tensor], *_: Any) -> Tensor:
    raise NotImplementedError("a decoding plan holds addresses: tensors without memory have none")
