"""Sparse attention against dense attention in float64 under the same mask; the patterns against their definitions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_cli import ops
from mlm_cli.ops import flex, sparse_layout
from mlm_cli.ops.sparse_layout import layout_of
from mlm_cli.ops.sparse_pattern import PATTERNS, SparsePattern, random_blocks

SMALL: dict[str, Any] = {"block": 8, "window": 16, "global_tokens": 5, "random": 2, "length": 101}
REACH = 9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_layout, "CHUNK_QUERIES", 16)
    layout_of.cache_clear()


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The definition; a row that sees nothing is zero."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        places = torch.arange(query.shape[2])
        scores = scores + bias[:, (places[None] - places[:, None]).clamp(-REACH, REACH) + REACH]
    nothing = ~visible.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(~visible, -torch.inf).masked_fill(nothing, 0), -1)
    return probs.masked_fill(nothing, 0) @ value


def masks(extra: str, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """What is asked for beside the pattern, as arguments and as a mask ``[2, 1, s, s]``."""
    draw = torch.Generator().manual_seed(length)
    if extra == "documents":
        segments = torch.randint(0, 3, (2, length), generator=draw).sort(1).values
        return {"segments": segments}, (segments[:, :, None] == segments[:, None])[:, None]
    if extra == "padding":
        lengths = torch.tensor([length, max(1, length // 2)])
        visible = (torch.arange(length) < lengths[:, None])[:, None, None]
        return {"visible": visible}, visible.expand(2, 1, length, length)
    if extra == "empty rows":
        visible = torch.rand(2, 1, length, length, generator=draw) < 0.2
        visible[:, :, ::3] = False
        return {"visible": visible}, visible
    return {}, torch.ones(2, 1, length, length, dtype=torch.bool)


def close(mine: Tensor, exact: Tensor, tolerance: float) -> bool:
    return bool((mine.double() - exact).abs().max() <= tolerance * (1 + exact.abs().max()))


@pytest.mark.parametrize("extra", ["nothing", "documents", "padding", "empty rows", "bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("kind", PATTERNS)
def test_equals_dense_attention_under_the_same_mask(kind: str, causal: bool, extra: str) -> None:
    pattern = SparsePattern(kind, **SMALL)
    for length, groups in ((1, 4), (64, 2), (101, 1), (37, 4)):
        draw = torch.Generator().manual_seed(length)
        shapes = ((2, 4, length, 16), (2, groups, length, 16), (2, groups, length, 16), (2, 4, length, 16))
        query, key, value, grad = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes)
        arguments, visible = masks(extra, length)
        places = torch.arange(length)
        visible = visible & pattern.visible(places[:, None], places[None], causal=causal)
        bias = torch.randn(4, 2 * REACH + 1, dtype=torch.float64, generator=draw) if extra == "bias" else None
        exact = [x.clone().requires_grad_() for x in (query, key, value, *([bias] if bias is not None else []))]
        wanted = dense(*exact[:3], visible, exact[3] if bias is not None else None, 0.3)
        wanted.backward(grad)

        mine = [x.detach().float().requires_grad_() for x in exact]
        if bias is not None:
            arguments["distance_bias"] = mine[3]
        found = ops.sparse_attention(*mine[:3], pattern, causal=causal, scale=0.3, **arguments)
        found.backward(grad.float())
        assert close(found, wanted, 1e-5)
        for a, b in zip(mine, exact, strict=True):
            assert close(a.grad, b.grad, 1e-5)


@pytest.mark.parametrize("kind", PATTERNS)
def test_bfloat16_is_as_close_as_its_rounding(kind: str) -> None:
    pattern, places = SparsePattern(kind, **SMALL), torch.arange(101)
    query, key, value, grad = (torch.randn(1, 4, 101, 16).bfloat16() for _ in range(4))
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    wanted = dense(*exact, pattern.visible(places[:, None], places[None], causal=True), None, 0.25)
    wanted.backward(grad.double())
    mine = [x.clone().requires_grad_() for x in (query, key, value)]
    found = ops.sparse_attention(*mine, pattern, causal=True)
    found.backward(grad)
    assert found.dtype == torch.bfloat16
    for a, b in zip([found, *(x.grad for x in mine)], [wanted, *(x.grad for x in exact)], strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_part_of_a_sequence_sees_what_the_whole_pass_sees(kind: str) -> None:
    pattern = SparsePattern(kind, **SMALL)
    query, key, value = (torch.randn(2, 4, 90, 8) for _ in range(3))
    whole = ops.sparse_attention(query, key, value, pattern, causal=True)
    for first, last in ((0, 33), (33, 41), (41, 90)):
        part = ops.sparse_attention(
            query[:, :, first:last], key[:, :, :last], value[:, :, :last], pattern, causal=True, offset=first
        )
        torch.testing.assert_close(part, whole[:, :, first:last], rtol=1e-5, atol=1e-6)


def defined(pattern: SparsePattern, i: int, j: int, causal: bool) -> bool:
    """The patterns in the words of their papers, one pair at a time; without the random blocks."""
    if causal and j > i:
        return False
    window, first = pattern.window, pattern.global_tokens
    if pattern.kind == "fixed":
        return i // window == j // window or j % window in range(window - first, window)
    near = i - j < window if causal else abs(i - j) <= window / 2
    if pattern.kind == "strided":
        return near or (i // pattern.block - j // pattern.block) % (window // pattern.block) == 0
    if pattern.kind in ("longformer", "bigbird"):
        return near or j < first or (i < first and not causal)
    return near


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_are_what_their_papers_say(kind: str, causal: bool) -> None:
    pattern, n = SparsePattern(kind, **{**SMALL, "random": 0}), 70
    places = torch.arange(n)
    seen = pattern.visible(places[:, None], places[None], causal=causal).numpy()
    for i, j in itertools.product(range(n), range(n)):
        assert seen[i, j] == defined(pattern, i, j, causal), (i, j)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("window", [16, 24, 8])
def test_the_block_mask_is_where_any_pair_is_seen(kind: str, causal: bool, window: int) -> None:
    pattern, blocks = SparsePattern(kind, **{**SMALL, "window": window, "length": 96}), 12
    places = torch.arange(blocks * 8)
    pairs = pattern.visible(places[:, None], places[None], causal=causal).numpy()
    expected = pairs.reshape(blocks, 8, blocks, 8).any((1, 3))
    assert np.array_equal(pattern.block_mask(blocks, blocks, causal=causal), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_random_blocks(causal: bool) -> None:
    """As many as asked for where there are, outside of window and global tokens, the same for any length."""
    pattern = SparsePattern("bigbird", block=4, window=16, global_tokens=8, random=3, length=800, seed=5)
    table = random_blocks(pattern, 200, causal)
    assert np.array_equal(random_blocks(pattern, 77, causal), table[:77, :77])
    without = SparsePattern("longformer", block=4, window=16, global_tokens=8).block_mask(200, 200, causal=causal)
    if not causal:
        without = without | (np.arange(200)[:, None] < 0)
        assert (table[2:].sum(1) == 3).all()
        assert not (table & without)[2:].any()
    else:
        assert (table[12:].sum(1) == 3).all() and not np.triu(table).any()
        assert not (table & without).any()
    used = table[2:].sum(0)[2:]
    assert used.max() < 25  # nobody's favourite
    other = random_blocks(SparsePattern("bigbird", 4, 16, 8, 3, 800, seed=6), 200, causal)
    assert (other & table).sum() < 0.2 * table.sum()


@pytest.mark.parametrize("kind", ["local", "longformer", "bigbird"])
@pytest.mark.parametrize("causal", [True, False])
def test_cost_is_linear(kind: str, causal: bool) -> None:
    """Scores that are computed: twice the tokens, twice as many."""

    def scores(length: int) -> int:
        pattern = SparsePattern(kind, block=16, window=64, global_tokens=16, random=2, length=length)
        chunks = layout_of(pattern, length, length, causal, 0, torch.device("cpu")).chunks
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
        return sum((chunk.stop - chunk.start) * chunk.positions.numel() for chunk in chunks)

    assert scores(4096) <= 2.05 * scores(2048) <= 4.3 * scores(1024)
    assert scores(4096) < 4096 * 300


@pytest.mark.parametrize("extra", ["nothing", "documents", "padding"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", PATTERNS)
def test_flex_attention_is_given_the_same_mask(kind: str, causal: bool, extra: str) -> None:
    """FlexAttention uncompiled, on the CPU: every pair by its mask function. Its blocks: where any pair is seen."""
    from torch.nn.attention.flex_attention import flex_attention

    pattern, length = SparsePattern(kind, **{**SMALL, "length": 300}), 300
    query, key, value = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    arguments, _ = masks(extra, length)
    mine = ops.sparse_attention(query, key, value, pattern, causal=causal, **arguments)
    theirs = ops.flex_sparse_attention(query, key, value, pattern, causal=causal, attend=flex_attention, **arguments)
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)
    places = torch.arange(length)
    pairs = pattern.visible(places[:, None], places[None], causal=causal)
    padded = torch.zeros(384, 384, dtype=torch.bool)
    padded[:length, :length] = pairs
    blocks = flex.flex_block_mask(pattern, length, causal, query.device)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), padded.view(3, 128, 3, 128).any(3).any(1))


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key = torch.zeros(1, 4, 8, 16), torch.zeros(1, 3, 8, 16)
    with pytest.raises(ValueError, match="does not fit"):
        ops.sparse_attention(query, key, key, SparsePattern("local"), causal=True)
    with pytest.raises(ValueError, match="need 12 keys, there are 8"):
        ops.sparse_attention(query, query, query, SparsePattern("local"), causal=True, offset=4)
    with pytest.raises(ValueError, match="whole blocks"):
        SparsePattern("strided", block=64, window=100)
    with pytest.raises(ValueError, match="not a sparse pattern"):
        SparsePattern("axial")


def test_the_block_mask_of_a_pass_is_made_once() -> None:
    """All layers ask with the same tensors; other ones, or the same ones changed, are another question."""
    pattern, device = ops.SparsePattern("local", block=16, window=64), torch.device("cpu")
    segments = torch.zeros(1, 256, dtype=torch.long)

    def ask(documents: torch.Tensor | None) -> Any:
        return flex._recent_block_mask(pattern, 256, True, device, None, documents)

    first = ask(segments)
    assert ask(segments) is first
    segments[0, 128:] = 1
    second = ask(segments)
    assert second is not first and ask(segments) is second
    assert ask(segments.clone()) is not second
    assert ask(None) is ask(None)
    with torch.inference_mode():
        one = torch.zeros(1, 256, dtype=torch.long)
        assert ask(one) is ask(one)
        flex._flex_blocks.cache_clear()
        assert not ask(None).kv_indices.is_inference()  # may serve training next
