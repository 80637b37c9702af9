"""Attention over runs of keys against its definition in float64, and the runs against masks of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import intervals
from mlm_cli.ops.sparse_pattern import SparsePattern
from tests.ops.oracle import assert_close, kernels  # noqa: F401


def definition(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    nothing = ~visible.any(-1, keepdim=True)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible & ~nothing, -torch.inf)
    return torch.softmax(scores, -1).masked_fill(nothing, 0) @ value


def random_runs(rows: int, queries: int, keys: int, longest: int) -> tuple[Tensor, Tensor]:
    """Neither end moves back; some runs are empty, some reach beyond the keys."""
    begin = torch.randint(-5, keys, (rows, queries)).sort(1).values
    length = torch.randint(0, longest, (rows, queries))
    return begin, (begin + length).cummax(1).values


def mask(begin: Tensor, end: Tensor, keys: int) -> Tensor:
    place = torch.arange(keys)
    return ((place >= begin[..., None]) & (place < end[..., None]))[:, None]


def check(shape: tuple[int, ...], groups: int, keys: int, runs: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    b, d = shape[0], shape[3]
    query, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    key, value = (torch.randn(b, groups, keys, d, dtype=torch.float64) for _ in range(2))
    exact = [x.to(dtype).double().requires_grad_() for x in (query, key, value)]
    wanted = definition(*exact, mask(*runs, keys), 0.3)
    wanted.backward(grad.to(dtype).double())
    mine = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = ops.interval_attention(*mine, *runs, 0.3)
    found.backward(grad.to(dtype))
    for a, b_ in zip([found, *(x.grad for x in mine)], [wanted, *(x.grad for x in exact)], strict=True):
        assert_close(a.detach(), b_.detach(), slack=200.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dim", [16, 48, 80, 112, 128])
def test_equals_the_definition(dim: int, groups: int, dtype: torch.dtype) -> None:
    for queries, keys, rows, longest in ((1, 1, 1, 3), (77, 300, 2, 40), (131, 67, 1, 70), (70, 500, 2, 1)):
        check((2, 4, queries, dim), groups, keys, random_runs(rows, queries, keys, longest), dtype)


@pytest.mark.parametrize("overlap", ["none", "neighbours", "all"])
def test_the_definition_of_long_sequences_cut_into_items(overlap: str) -> None:
    """Segments of 1,024 queries whose keys overlap with no other's, the next one's, or all: one phase, two, three."""
    place = torch.arange(2100)[None]
    runs = {
        "none": (place // 1024 * 1024, place // 1024 * 1024 + 1000),
        "neighbours": (place - 300, place + 1),
        "all": (place * 0, place + 1),
    }[overlap]
    check((1, 2, 2100, 16), 1, 2100, runs, torch.float32)


def test_nothing_to_do() -> None:
    none = torch.zeros(1, 0, dtype=torch.int64)
    empty = torch.randn(2, 4, 0, 16, requires_grad=True)
    key = torch.randn(2, 4, 5, 16, requires_grad=True)
    ops.interval_attention(empty, key, key, none, none, 1.0).sum().backward()
    assert key.grad is not None and not key.grad.any()
    begin = torch.zeros(1, 3, dtype=torch.int64)
    assert ops.interval_attention(torch.randn(0, 4, 3, 16), key[:0], key[:0], begin, begin, 1.0).shape == (0, 4, 3, 16)
    blind = ops.interval_attention(torch.randn(2, 4, 3, 16), key[:, :, :0], key[:, :, :0], begin, begin + 7, 1.0)
    assert not blind.any()


def test_strided_input_as_a_layer_has_it() -> None:
    """Heads side by side in one tensor, as the projection of query, key and value gives them; a strided width."""
    qkv = torch.randn(2, 90, 8, 32)
    query, key, value = (x.transpose(1, 2) for x in qkv.split([4, 2, 2], 2))
    runs = ops.runs_of_keys(90, 90, causal=True)
    assert runs is not None
    packed = ops.interval_attention(query.contiguous(), key.contiguous(), value.contiguous(), *runs, 0.2)
    assert torch.equal(ops.interval_attention(query, key, value, *runs, 0.2), packed)
    wide = torch.randn(2, 4, 90, 64)[..., ::2]
    assert torch.equal(
        ops.interval_attention(wide, key, value, *runs, 0.2),
        ops.interval_attention(wide.contiguous(), key, value, *runs, 0.2),
    )


def test_gradcheck() -> None:
    inputs = [torch.randn(1, n, 5, 16, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    begin, end = torch.tensor([[0, 0, 1, 2, 2]]), torch.tensor([[1, 2, 2, 2, 5]])
    assert torch.autograd.gradcheck(lambda *x: ops.interval_attention(*x, begin, end, 0.4), inputs)


def test_gradients_as_a_layer_gives_them() -> None:
    """Expanded from one number, and heads between tokens."""
    inputs = [torch.randn(2, n, 70, 16, requires_grad=True) for n in (4, 2, 2)]
    runs = ops.runs_of_keys(70, 70, causal=True)
    assert runs is not None
    out = ops.interval_attention(*inputs, *runs, 0.2)
    grad = torch.randn(2, 70, 4, 16).transpose(1, 2)
    for given in (torch.ones(()).expand_as(out), grad):
        found = torch.autograd.grad(out, inputs, given, retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(out, inputs, given.contiguous(), retain_graph=True), strict=True):
            assert torch.equal(a, b)


def test_where_it_pays() -> None:
    query, key, few = torch.randn(2, 4, 64, 16), torch.randn(2, 2, 64, 16), torch.randn(2, 1, 64, 16)
    runs = ops.runs_of_keys(64, 64, causal=True)
    assert runs is not None and ops.pays_over_dense(query, key, runs)
    assert not ops.pays_over_dense(query, few, runs)
    long = torch.empty(1, 4, 5000, 16)
    for documents, pays in ((torch.zeros(1, 5000).long(), False), (torch.arange(5000)[None] // 2000, True)):
        assert ops.pays_over_dense(long, long, ops.runs_of_keys(5000, 5000, causal=True, segments=documents)) is pays


def test_extremes() -> None:
    query = torch.full((1, 1, 64, 16), 100.0)
    key = torch.zeros(1, 1, 64, 16)
    key[..., 0] = torch.arange(64.0)
    value = torch.randn(1, 1, 64, 16)
    begin, end = ops.runs_of_keys(64, 64, causal=True)  # type: ignore[misc]
    assert_close(ops.interval_attention(query, key, value, begin, end, 1.0), value.double())  # the last key takes all
    value[0, 0, 40] = torch.nan
    found = ops.interval_attention(query * 0, key, value, begin, end, 1.0)
    assert found[:, :, 40:].isnan().all()  # nothing hides it from those that see it
    blind = ops.interval_attention(query, key, value, begin, torch.where(begin + 50 < end, end, begin), 1.0)
    assert not blind[:, :, :50].any()  # whoever sees nothing has zeros, whatever its neighbours see


def test_what_does_not_fit_is_named() -> None:
    query, key = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    begin = torch.arange(6)[None]
    for arguments, complaint in (
        ((query, key[:1], key[:1], begin, begin), "`key` must have the samples"),
        ((query, key[:, :1].expand(2, 3, 6, 16), key[:, :1].expand(2, 3, 6, 16), begin, begin), "a divisor of its 4"),
        ((query, key, key[:, :, :3], begin, begin), "`value` must have the shape of `key`"),
        ((query, key.double(), key.double(), begin, begin), "`key` must be float32"),
        ((query, key, key, begin[:, :4], begin), "`begin` must be int64"),
        ((query, key, key, begin, begin.int()), "`end` must be int64"),
        ((query, key, key, begin.flip(1), begin), "must not move back"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            ops.interval_attention(*arguments, 1.0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 8, 500])
@pytest.mark.parametrize("extra", ["nothing", "documents", "padding", "both"])
def test_runs_are_the_masks(causal: bool, window: int | None, extra: str) -> None:
    pattern = None if window is None else SparsePattern("local", window=window)
    segments = torch.randint(0, 4, (3, 50)).sort(1).values if extra in ("documents", "both") else None
    seen = (torch.arange(50) < torch.tensor([[50], [20], [1]])) & (torch.arange(50) >= torch.tensor([[3], [0], [0]]))
    visible = seen[:, None, None] if extra in ("padding", "both") else None
    for offset, queries in ((0, 50), (9, 30)):
        keys = 50
        runs = ops.runs_of_keys(
            queries, keys, causal=causal, offset=offset, pattern=pattern, visible=visible, segments=segments
        )
        assert runs is not None
        query, key = torch.arange(offset, offset + queries)[:, None], torch.arange(keys)
        wanted = torch.ones(3, 1, queries, keys, dtype=torch.bool)
        if causal:
            wanted &= key <= query
        if pattern is not None:
            wanted &= pattern.visible(query, key, causal=causal)
        if segments is not None:
            mine = segments[:, offset : offset + queries]
            wanted &= (mine[:, :, None] == segments[:, None])[:, None]
        if visible is not None:
            wanted &= visible
        assert torch.equal(mask(*runs, keys).expand_as(wanted), wanted)
        for end in runs:  # what the kernel asks for
            assert (end.clamp(0, keys).diff(dim=1) >= 0).all()


def test_what_is_not_one_run() -> None:
    assert ops.runs_of_keys(8, 8, causal=True, pattern=SparsePattern("longformer")) is None
    assert ops.runs_of_keys(4, 4, causal=True, segments=torch.tensor([[0, 1, 0, 0]])) is None
    hole = torch.tensor([True, False, True, True])[None, None, None]
    assert ops.runs_of_keys(4, 4, causal=True, visible=hole) is None
    assert ops.runs_of_keys(4, 4, causal=True, visible=torch.ones(1, 1, 4, 4, dtype=torch.bool)) is None


def test_the_reference_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_has_kernel", lambda query: False)
    check((2, 4, 77, 16), 2, 100, random_runs(2, 77, 100, 30), torch.float32)


def test_sixteen_bit_queries_are_left_to_torch() -> None:
    query = torch.randn(1, 1, 64, 16)
    assert ops.serves_intervals(query) and ops.serves_intervals(query.double())
    assert not ops.serves_intervals(query.bfloat16())
    assert not ops.serves_intervals(query[..., :8]) and not ops.serves_intervals(query[:, :, :63])
