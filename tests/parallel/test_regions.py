"""Borders of sharded regions: what ranks get, and gradients, are those of plain tensors in one process."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.regions import all_tokens, enter, leave
from tests.distributed import run_distributed

BATCH, WIDTH = 2, 3
# Tokens and slots per token: multiples of the ranks or not, fewer tokens than ranks.
SIZES = [(4, 1), (4, 3), (5, 1), (5, 3), (1, 1), (1, 2), (6, 2), (7, 2)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(whole: Tensor, axis: Axis, tokens: int) -> Tensor:
    """What this rank holds in the residual stream: its tokens with all their slots, zeros after the last."""
    if not axis.sequence_parallel:
        return whole.clone()
    slots, share = whole.shape[1] // tokens, axis.share(tokens)
    padded = F.pad(whole, (0, 0, 0, (axis.size * share - tokens) * slots))
    return padded[:, axis.rank * share * slots :][:, : share * slots].clone()


def border(axis: Axis, tokens: int, slots: int) -> dict[str, Tensor]:
    """Every function once, with its gradient under a loss in which each rank weighs every number differently."""
    shape, rank, ranks = (BATCH, tokens * slots, WIDTH), axis.rank, range(axis.size)
    total = lambda seed: sum(random(*shape, seed=seed + other) for other in ranks)
    results, expected = {}, {}

    x = own(random(*shape, seed=0), axis, tokens).requires_grad_()
    inside = enter(x, axis, tokens)
    (inside * random(*shape, seed=10 + rank)).sum().backward()
    results |= {"enter": inside, "grad enter": x.grad}
    expected |= {"enter": random(*shape, seed=0), "grad enter": own(total(10), axis, tokens)}

    x = random(*shape, seed=20 + rank).requires_grad_()
    outside = leave(x, axis, tokens)
    (outside * own(random(*shape, seed=30), axis, tokens)).sum().backward()
    results |= {"leave": outside, "grad leave": x.grad}
    expected |= {"leave": own(total(20), axis, tokens), "grad leave": random(*shape, seed=30)}

    x = own(random(*shape, seed=40), axis, tokens).requires_grad_()
    repeated = all_tokens(x, axis, tokens)
    (repeated * random(*shape, seed=50)).sum().backward()  # the same on every rank, so not to be added up
    results |= {"all_tokens": repeated, "grad all_tokens": x.grad}
    expected |= {"all_tokens": random(*shape, seed=40), "grad all_tokens": own(random(*shape, seed=50), axis, tokens)}

    return {name: (value.detach(), expected[name]) for name, value in results.items()}


def adjoint(axis: Axis, tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    """<enter(x), y> and <x, leave(y)>, each summed over the ranks."""
    y = random(BATCH, tokens * slots, WIDTH, seed=axis.rank)
    x = own(random(BATCH, tokens * slots, WIDTH, seed=70), axis, tokens)
    return (enter(x, axis, tokens) * y).sum(), (x * leave(y, axis, tokens)).sum()


def all_sizes(mesh: Mesh) -> dict[tuple, tuple]:
    """With whole and split sequences in one start of the ranks."""
    axes = {split: replace(mesh.tensor, sequence_parallel=split) for split in (False, True)}
    return {
        (split, *size): (border(axis, *size), adjoint(axis, *size)) for split, axis in axes.items() for size in SIZES
    }


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_borders_equal_plain_tensors(ranks):
    everyone = run_distributed(all_sizes, ranks, tensor=ranks)
    for case in everyone[0]:
        for rank, results in enumerate(everyone):
            for name, (got, expected) in results[case][0].items():
                assert got.shape == expected.shape, (name, case, rank)
                torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13, msg=f"{name}, {case}, rank {rank}")
        entered, left = (torch.stack(side) for side in zip(*(results[case][1] for results in everyone), strict=True))
        # whole: every rank holds x, so each counts the sum that `leave` makes; split: the ranks' shares add up
        torch.testing.assert_close(entered.sum(), left.sum() if case[0] else left[0], rtol=1e-12, atol=1e-12)


def test_one_process_has_no_borders():
    x = random(BATCH, 6, WIDTH, seed=0)
    for passed in (enter(x, Axis(), 3), leave(x, Axis(), 3), all_tokens(x, Axis(), 3)):
        assert passed is x
