"""What context ranks exchange around attention: all slots of some heads for some slots of all heads, and back."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_ponder.parallel.context import SlotShares, all_slots, own_tokens, take_heads, take_slots, whole_rows
from megatron_ponder.parallel.mesh import Mesh
from tests.distributed import run_distributed

RANKS, ROWS, HEADS, SIZE = 2, 2, 4, 3
COUNTS = {"equal": ((2, 2), (2, 2)), "unequal": ((1, 3), (4, 2))}  # slots of every row on every rank


def slots_of(counts: tuple[tuple[int, ...], ...], heads: int) -> list[list[Tensor]]:
    """(slots, heads, size) by rank and row."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(count, heads, SIZE, generator=generator) for count in of_rank] for of_rank in counts]


def there_and_back(mesh: Mesh) -> dict[tuple[str, int] | str, tuple[Tensor, ...]]:
    """What a rank has of all rows one behind the other, by kind of shares; and gradients of its own slots."""
    found = {}
    for (name, counts), heads in product(COUNTS.items(), (HEADS, 1)):
        own = torch.cat(slots_of(counts, heads)[mesh.context.rank]).unsqueeze(0).requires_grad_()
        first = torch.tensor([sum(sum(of) for of in counts[:i]) + sum(counts[i][:b]) for b in (0, 1) for i in (0, 1)])
        lengths = torch.tensor([counts[i][b] for b in (0, 1) for i in (0, 1)])
        places = torch.arange(lengths.sum()) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        order = first.repeat_interleave(lengths) + places
        shares = SlotShares(mesh.context, tuple(map(sum, counts)), order, order.argsort())
        whole = take_heads(own, shares)
        back = take_slots(whole, shares)
        weights = all_slots(own[..., 0, 0], shares)
        whole.square().sum().backward()
        found[name, heads] = whole.detach(), back.detach(), weights.detach(), own.grad
    rows = torch.arange(6).view(2, 3) + 10 * mesh.context.rank
    found["tokens"] = whole_rows(rows, mesh.context), own_tokens(whole_rows(rows, mesh.context), mesh.context)
    return found


@pytest.fixture(scope="module")
def ranks():
    """Everything, by rank."""
    return run_distributed(there_and_back, RANKS, context=RANKS)


@pytest.mark.parametrize("heads", [HEADS, 1])
def test_heads_and_slots_change_ranks_and_come_back(ranks, heads):
    for name, counts in COUNTS.items():
        parts = slots_of(counts, heads)
        rows = torch.cat([torch.cat([parts[rank][row] for rank in range(RANKS)]) for row in range(ROWS)])
        for rank, found in enumerate(ranks):
            whole, back, weights, gradient = found[name, heads]
            own = torch.cat(parts[rank]).unsqueeze(0)
            shared = rows if heads == 1 else rows.chunk(RANKS, 1)[rank]
            torch.testing.assert_close(whole.squeeze(0), shared, rtol=0, atol=0)
            torch.testing.assert_close(back, own.expand(-1, -1, max(heads, RANKS), -1), rtol=0, atol=0)
            torch.testing.assert_close(weights.squeeze(0), rows[:, 0, 0], rtol=0, atol=0)
            torch.testing.assert_close(gradient, 2 * own * (RANKS if heads == 1 else 1))


def test_shares_of_rows_are_gathered_and_taken(ranks):
    every = torch.cat([torch.arange(6).view(2, 3) + 10 * rank for rank in range(RANKS)], 1)
    for rank, found in enumerate(ranks):
        whole, own = found["tokens"]
        assert torch.equal(whole, every)
        assert torch.equal(own, every.chunk(RANKS, 1)[rank])
