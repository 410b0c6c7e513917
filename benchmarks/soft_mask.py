"""The soft mask as one more channel, against plain causal attention: time, and what is kept for the backward pass.

    python benchmarks/soft_mask.py [--rounds 15] [--threads 2]

Forward and backward of rotation and attention, 4 heads of 64 channels, batch 4. The forms take turns; ratios are
medians over rounds. `explicit` adds log w to a T × T mask, which nothing but the tests does.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.attention import attend
from megatron_ponder.kernels.rotary import Rotation, rotate
from megatron_ponder.model.rope import rotation
from megatron_ponder.parallel.cpu_settings import prepare_cpu

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import in_turn, ratio

BATCH, HEADS, SIZE = 4, 4, 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Rotation]


def inputs(length: int) -> Inputs:
    """q, k, v (B, T, heads, size), log w (B, T) and angles."""
    q, k, v = (torch.randn(BATCH, length, HEADS, SIZE, requires_grad=True) for _ in range(3))
    log_w = torch.randn(BATCH, length).abs().neg().requires_grad_()
    model = ModelConfig(head_size=SIZE, rotary_fraction=1.0)
    return q, k, v, log_w, rotation(torch.arange(length).unsqueeze(0), model, torch.float32)


def plain(q: Tensor, k: Tensor, v: Tensor, _: Tensor, angles: Rotation) -> Tensor:
    """Causal attention without weights."""
    return attend(q, k, v, SIZE**-0.5, angles=angles)


def folded(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, angles: Rotation) -> Tensor:
    """log w in the keys' further channels, as the model has it."""
    return attend(q, k, v, SIZE**-0.5, log_w, angles=angles)


def value_side(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, angles: Rotation) -> Tensor:
    """w on the side of the values."""
    return attend(q, k, v, SIZE**-0.5, log_w, angles=angles, kernel="value_side")


def explicit(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, angles: Rotation) -> Tensor:
    """log w added to a causal mask."""
    length = q.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1) + log_w[:, None, None, :]
    heads_first = (x.transpose(1, 2) for x in (rotate(q, angles), rotate(k, angles), v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


FORMS = {"plain": plain, "folded": folded, "value side": value_side, "explicit": explicit}


def kept_bytes(form, arguments: Inputs) -> int:
    """Memory that autograd keeps for the backward pass, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = form(*arguments)
    size = sum(storages.values())
    del result
    return size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_cpu()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"batch {BATCH}, {HEADS} heads of {SIZE}, fp32, {arguments.threads} threads")
    for heading in ("length T", "plain [ms]", *(f"{name} / plain" for name in FORMS if name != "plain")):
        table.add_column(heading, justify="right")
    for heading in ("folded keeps more [MB]", "explicit keeps more [MB]"):
        table.add_column(heading, justify="right")
    for length in (256, 512, 1024, 2048):
        given = inputs(length)
        steps = {name: lambda form=form, given=given: form(*given).sum().backward() for name, form in FORMS.items()}
        times = in_turn(steps, arguments.rounds)
        kept = {name: kept_bytes(form, given) / 1e6 for name, form in FORMS.items()}
        table.add_row(
            str(length),
            f"{1e3 * statistics.median(times['plain']):.1f}",
            *(f"{ratio(times[name], times['plain']):.2f}" for name in FORMS if name != "plain"),
            f"{kept['folded'] - kept['plain']:.1f}",
            f"{kept['explicit'] - kept['plain']:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
