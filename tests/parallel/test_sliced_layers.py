"""Sliced layers against plain torch layers with the same weights, forward and backward, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_cli.errors import UsageError
from mlm_cli.parallel.context import Group, ParallelContext
from mlm_cli.parallel.cross_entropy import vocab_parallel_cross_entropy
from mlm_cli.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from mlm_cli.parallel.linear_cross_entropy import token_losses, vocab_parallel_linear_cross_entropy
from mlm_cli.parallel.mappings import gather_from_group, scatter_to_group
from mlm_cli.parallel.mpu import Mpu
from mlm_cli.parallel.random import RandomStreams
from mlm_cli.parallel.shard import gather_full, shard_of, slice_full

H, INNER, VOCAB, PADDED, TOKENS = 16, 32, 130, 256, 48  # at 4 ranks the last slice of the vocabulary is all padding


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def fill(param: nn.Parameter, full: Tensor, group: Group) -> None:
    with torch.no_grad():
        param.copy_(slice_full(full, shard_of(param), group.rank, group.size))


def whole_grad(param: nn.Parameter, group: Group) -> Tensor:
    assert param.grad is not None
    return gather_full(param.grad, shard_of(param), group)


def check_feed_forward(group: Group) -> dict[str, float]:
    """Column then row, with blocks, against two torch linear layers."""
    torch.manual_seed(1)
    first, second = nn.Linear(H, INNER), nn.Linear(INNER // 2, H)
    x = torch.randn(3, 5, H)
    up = ColumnParallelLinear(H, INNER, group, blocks=(INNER // 2, INNER // 2))
    down = RowParallelLinear(INNER // 2, H, group)
    pairs = [(up.weight, first.weight), (up.bias, first.bias), (down.weight, second.weight), (down.bias, second.bias)]
    for mine, plain in pairs:
        fill(mine, plain.detach(), group)
    mine_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    def gated(y: Tensor) -> Tensor:
        gate, value = y.chunk(2, -1)
        return torch.sigmoid(gate) * value

    mine_y, plain_y = down(gated(up(mine_x))), second(gated(first(plain_x)))
    mine_y.square().sum().backward()
    plain_y.square().sum().backward()
    found = {"forward": distance(mine_y, plain_y), "grad x": distance(mine_x.grad, plain_x.grad)}
    for i, (mine, plain) in enumerate(pairs):
        found[f"grad {i}"] = distance(whole_grad(mine, group), plain.grad)
    return found


def check_embedding(group: Group) -> dict[str, float]:
    torch.manual_seed(2)
    plain = nn.Embedding(PADDED, H)
    tokens = torch.randint(0, VOCAB, (4, 9))
    mine = VocabParallelEmbedding(VOCAB, PADDED, H, group)
    fill(mine.weight, plain.weight.detach(), group)
    mine(tokens).square().sum().backward()
    plain(tokens).square().sum().backward()
    return {
        "forward": distance(mine(tokens), plain(tokens)),
        "grad": distance(whole_grad(mine.weight, group), plain.weight.grad),
    }


def check_losses(group: Group) -> dict[str, float]:
    """Both cross entropies against torch in float64 over the unpadded vocabulary."""
    torch.manual_seed(3)
    hidden, full = torch.randn(TOKENS, H), torch.randn(PADDED, H)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    mask = (torch.rand(TOKENS) > 0.3).float()
    exact_h, exact_w = hidden.double().requires_grad_(), full.double().requires_grad_()
    each = F.cross_entropy(exact_h @ exact_w[:VOCAB].t(), labels, reduction="none")
    (each * mask).sum().div(mask.sum()).backward()

    rows = PADDED // group.size
    local = full[group.rank * rows : (group.rank + 1) * rows]
    found = {"each": distance(token_losses(hidden, local, labels, group, VOCAB), each.detach())}
    mine_h, mine_w = hidden.clone().requires_grad_(), local.clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(mine_h, mine_w, labels, mask, group, VOCAB, scale=1 / mask.sum())
    (loss * 3.0).backward()
    found["fused"] = distance(loss, (each * mask).sum() / mask.sum())
    found["fused grad h"] = distance(mine_h.grad / 3, exact_h.grad)
    found["fused grad w"] = distance(torch.cat(group.all_gather(mine_w.grad)) / 3, exact_w.grad)

    logits = (hidden @ local.t()).requires_grad_()
    plain = vocab_parallel_cross_entropy(logits, labels, group, VOCAB)
    (plain * mask).sum().backward()
    exact_l = (hidden.double() @ full.double().t()).requires_grad_()
    (F.cross_entropy(exact_l[:, :VOCAB], labels, reduction="none") * mask).sum().backward()
    found["plain"] = distance(plain, each.detach())
    found["plain grad"] = distance(torch.cat(group.all_gather(logits.grad), -1), exact_l.grad)
    return found


def check_mappings(group: Group) -> dict[str, float]:
    x = torch.arange(8.0).requires_grad_()
    again = gather_from_group(scatter_to_group(x, group), group)
    (again * torch.arange(8.0)).sum().backward()
    return {"there and back": distance(again, x.detach()), "grad": distance(x.grad, torch.arange(8.0))}


def check_streams(parallel: ParallelContext) -> dict[str, Any]:
    """What each rank draws outside and inside sliced regions; a restored state repeats it."""
    streams = RandomStreams(parallel, seed=5)
    state = streams.get_state()

    def draw() -> tuple[list[float], list[float], list[float]]:
        outside = torch.rand(4)
        with streams.sliced():
            inside = torch.rand(4)
        return outside.tolist(), inside.tolist(), torch.rand(4).tolist()

    first = draw()
    streams.set_state(state)
    return {"draws": first, "repeats": draw() == first}


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=world_size)
    group = parallel.tensor
    assert (group.rank, group.size, parallel.data.size) == (rank, world_size, 1)
    return {
        "errors": {
            name: check(group)
            for name, check in (
                ("feed forward", check_feed_forward),
                ("embedding", check_embedding),
                ("losses", check_losses),
                ("mappings", check_mappings),
            )
        },
        "streams": check_streams(parallel),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sliced_layers_equal_plain_ones(size: int, run_ranks: Callable[..., list[Any]]) -> None:
    answers = run_ranks(on_rank, size)
    for answer in answers:
        for name, errors in answer["errors"].items():
            assert max(errors.values()) < 1e-5, (name, errors)
        assert answer["streams"]["repeats"]
    outside = [answer["streams"]["draws"][0] for answer in answers]
    inside = [tuple(answer["streams"]["draws"][1]) for answer in answers]
    assert all(draw == outside[0] for draw in outside), "dropout outside sliced regions must agree"
    assert len(set(inside)) == size, "dropout inside sliced regions must differ"
    assert all(answer["streams"]["draws"][2] == answers[0]["streams"]["draws"][2] for answer in answers)


def layout(rank: int, world_size: int) -> dict[str, Any]:
    parallel = ParallelContext.create(tensor=2)
    mpu = Mpu(parallel)
    total = parallel.data.all_reduce_(torch.tensor([float(rank)])).item()
    try:
        ParallelContext.create(tensor=3)
        refused = ""
    except UsageError as error:
        refused = error.message
    return {
        "tensor": parallel.tensor.ranks,
        "data": parallel.data.ranks,
        "pipeline": parallel.pipeline.ranks,
        "sum over data": total,
        "mpu": (
            mpu.get_model_parallel_rank(),
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_data_parallel_rank(),
            mpu.get_data_parallel_world_size(),
        ),
        "handles": mpu.get_pipeline_model_parallel_group() is not None,
        "refused": refused,
    }


def test_ranks_are_laid_out_tensor_fastest(run_ranks: Callable[..., list[Any]]) -> None:
    answers = run_ranks(layout, 4)
    assert [a["tensor"] for a in answers] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [a["data"] for a in answers] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [a["pipeline"] for a in answers] == [(0,), (1,), (2,), (3,)]
    assert [a["sum over data"] for a in answers] == [2.0, 4.0, 2.0, 4.0]
    assert [a["mpu"] for a in answers] == [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]
    assert all(a["handles"] for a in answers), "DeepSpeed reads a missing group as the whole world"
    assert "4 ranks" in answers[0]["refused"]
