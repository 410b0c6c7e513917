"""Packing keeps every bit, and a ring of pipeline ranks that is gone round several times equals one process."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_ponder.parallel.edges import build_edges
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.pipeline import _Stage, build_schedule, pack, packed_size, run_step, unpack
from tests.distributed import run_distributed

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
SHAPES = [((2, 3, 4), (2, 3)), ((1, 3, 3), (1, 3)), ((1, 1, 1), (1, 1)), ((2, 5, 2, 3), (2, 5, 3))]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.uint8)


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of which some are not finite, denormal, or beyond the narrower type's precision."""
    x = random(*shape, dtype=dtype, seed=seed)
    tiny = torch.finfo(dtype).smallest_normal / 8
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, tiny, -1e30, 1 + 2**-20], dtype=dtype)
    flat = x.view(-1)
    flat[: len(special)] = special[: flat.numel()]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x_shape", "log_w_shape"), SHAPES)
def test_packing_keeps_every_bit_both_ways(dtype, x_shape, log_w_shape):
    x = random(*x_shape, dtype=dtype).requires_grad_()
    log_w = awkward(log_w_shape, wide(dtype), seed=1).requires_grad_()
    packed = pack(x, log_w)
    assert packed.dtype == dtype
    assert packed.shape == (packed_size(x_shape, log_w_shape, dtype),)
    got = unpack(packed, x_shape, log_w_shape)
    for part, original in zip(got, (x, log_w), strict=True):
        assert part.dtype == original.dtype
        assert torch.equal(bits(part), bits(original))
    gradients = random(*x_shape, dtype=dtype, seed=2), awkward(log_w_shape, wide(dtype), seed=3)
    torch.autograd.backward(got, gradients)
    for original, gradient in zip((x, log_w), gradients, strict=True):
        assert torch.equal(bits(original.grad), bits(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_contiguous_is_packed_in_its_own_order(dtype):
    x, log_w = random(4, 3, 2, dtype=dtype).transpose(0, 1), random(5, 4, dtype=wide(dtype)).t()[:, 1:]
    got = unpack(pack(x, log_w), x.shape, log_w.shape)
    assert torch.equal(got[0], x)
    assert torch.equal(got[1], log_w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_log_weights_only_activations_travel(dtype):
    x = random(2, 3, 4, dtype=dtype).requires_grad_()
    packed = pack(x, None)
    assert packed.shape == (packed_size((2, 3, 4), None, dtype),) == (24,)
    got, nothing = unpack(packed, (2, 3, 4), None)
    assert nothing is None
    got.backward(random(2, 3, 4, dtype=dtype, seed=1))
    assert torch.equal(x.grad, random(2, 3, 4, dtype=dtype, seed=1))


def test_what_a_stage_gives_that_computes_nothing_is_a_number():
    stage = SimpleNamespace(_given_up=lambda: True, _output=torch.empty(4), device=torch.device("cpu"), is_first=False)
    received = torch.full((3,), torch.nan, requires_grad=True)
    output = _Stage.forward_maybe_with_nosync(stage, received)
    assert output.tolist() == [0, 0, 0, 0]
    output.sum().backward()
    assert received.grad.tolist() == [0, 0, 0]


def test_log_weights_count_twice_in_half_the_bits():
    assert packed_size((2, 3), (5,), torch.bfloat16) == 6 + 10
    assert packed_size((2, 3), (5,), torch.float32) == packed_size((2, 3), (5,), torch.float64) == 6 + 5


ROUNDS, SIZE, WIDTHS = 3, 2, (3, 5, 4)  # of what travels within each round


class Part(nn.Module):
    """The weights of one rank: a matrix that all its rounds share."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(max(WIDTHS), max(WIDTHS), seed=rank) / 2)


class Stage(nn.Module):
    """One round of one rank; the last of all returns its loss, for which it needs what every rank is told."""

    def __init__(self, part: Part, index: int, ranks: int) -> None:
        super().__init__()
        self.part, self.index, self.ranks = part, index, ranks

    def forward(self, received: Tensor, tokens: Tensor) -> Tensor:
        count, last = len(tokens), ROUNDS * self.ranks - 1
        width = WIDTHS[self.index // self.ranks]
        x = tokens[:, : WIDTHS[0]] if self.index == 0 else received.view(count, -1)
        y = torch.tanh(x @ self.part.weight[: x.shape[1], :width]) + tokens[:, :width]
        return torch.stack([(y * tokens[:, :width]).sum()]) if self.index == last else pack(y, None)


def data(micro_batches: int, step: int) -> Tensor:
    return random(SIZE * micro_batches, max(WIDTHS), seed=100 + step)


def ring(axis: Axis, kind: str, micro_batches: int) -> dict:
    """Two steps on one schedule: losses, gradients, and what the schedule still holds after each."""
    part = Part(axis.rank)
    stages = [Stage(part, index, axis.size) for index in range(axis.rank, ROUNDS * axis.size, axis.size)]
    losses = []

    def loss(output: Tensor, _: Tensor) -> Tensor:
        losses.append(output.item())
        return output.sum()

    sizes = [SIZE * width for width in WIDTHS for _ in range(axis.size)][:-1]
    schedule = build_schedule(
        rounds=stages,
        carried=sizes,
        first_input=torch.empty(SIZE, max(WIDTHS)).double(),
        last_output=torch.empty(1).double(),
        dtype=torch.float64,
        micro_batches=micro_batches,
        axis=axis,
        edges=build_edges(axis),
        device=torch.device("cpu"),
        kind=kind,
        loss_function=loss,
    )
    gradients, held = [], 0
    for step in range(2):
        part.zero_grad()
        tokens = data(micro_batches, step)
        last = {"target": tokens} if axis.rank == axis.size - 1 else {}
        run_step(schedule, *([tokens] if axis.rank == 0 else []), tokens=tokens, **last)
        gradients.append(part.weight.grad.clone())
        held += sum(
            getattr(info, "buffer", None) is not None
            for stage in schedule._stages
            for received in (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
            for info in received
        )
    return {"losses": sum(losses), "gradients": gradients, "held": held}


def alone(ranks: int, micro_batches: int) -> tuple[float, list[list[Tensor]]]:
    """Sum of losses, and gradients by step and rank."""
    parts, total, gradients = [Part(rank) for rank in range(ranks)], 0.0, []
    for step in range(2):
        for tokens in data(micro_batches, step).split(SIZE):
            x = tokens
            for index in range(ROUNDS * ranks):
                x = Stage(parts[index % ranks], index, ranks)(x, tokens)
            x.sum().backward()
            total += x.item()
        gradients.append([part.weight.grad.clone() for part in parts])
        for part in parts:
            part.zero_grad()
    return total, gradients


def rings(mesh: Mesh, cases: list[tuple]) -> dict[tuple, dict | str]:
    """Results of every case, or why it was refused."""
    results = {}
    for case in cases:
        try:
            results[case] = ring(mesh.pipeline, *case)
        except ValueError as error:
            results[case] = str(error)
    return results


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_ring_gone_round_three_times_equals_one_process(ranks):
    runs = {"1f1b": (1, 2, 3, 4, 8), "zero_bubble": (1, 2, 4, 8)}
    cases = [(kind, count) for kind, counts in runs.items() for count in counts]
    uneven = ("1f1b", 2 * ranks + 1)
    everyone = run_distributed(rings, ranks, [*cases, uneven], pipeline=ranks)
    assert all("multiple of the number of rounds (2)" in results[uneven] for results in everyone)
    for case in cases:
        loss, gradients = alone(ranks, case[1])
        assert everyone[-1][case]["losses"] == pytest.approx(loss, rel=1e-12)
        for rank, results in enumerate(everyone):
            assert results[case]["held"] == 0, case
            for got, expected in zip(results[case]["gradients"], gradients, strict=True):
                assert expected[rank].norm() > 0.1
                torch.testing.assert_close(got, expected[rank], rtol=1e-12, atol=1e-12, msg=f"{case}, rank {rank}")
