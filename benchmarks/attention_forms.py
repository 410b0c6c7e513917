"""Every form of attention with key weights, forward and backward: milliseconds, and what share of the peak that is.

    python benchmarks/attention_forms.py [--lengths 2048 8192] [--head-sizes 64 128] [--peak-tflops 989]

Forms that this machine cannot run are left out. `flex` is PyTorch's FlexAttention, compiled, to which log w is given as
a change of the logits; it is no kernel of the package. The peak is of the operations that plain causal attention
needs, 2.5 times as many backward as forward, whatever a form computes besides.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.kernels.attention import Call, attend, choose

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import seconds

HEADS, BATCH = 16, 1
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def forms(device: str, dtype: torch.dtype, head_size: int) -> dict[str, Form]:
    """What this machine can run, by name."""
    found: dict[str, Form] = {}
    for name in get_args(AttentionKernel)[1:]:
        try:
            choose(Call(device, dtype, head_size=head_size), name)
        except UserError:
            continue
        found[name] = lambda q, k, v, log_w, name=name: attend(q, k, v, head_size**-0.5, log_w, kernel=name)
    if device == "cuda":
        found["flex"] = _flex()
    return found


def _flex() -> Form:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), {}

    def form(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor) -> Tensor:
        length = q.shape[1]
        if length not in masks:
            causal = lambda batch, head, query, key: query >= key
            masks[length] = create_block_mask(causal, None, None, length, length, device=q.device.type)
        weigh = lambda score, batch, head, query, key: score + log_w[batch, key]
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads_first, score_mod=weigh, block_mask=masks[length]).transpose(1, 2)

    return form


def milliseconds(action: Callable[[], object], device: str, rounds: int) -> float:
    """The shortest of so many rounds, after one that warms up."""

    def once() -> None:
        action()
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    return 1e3 * min(seconds(once) for _ in range(rounds))


def measure(
    device: str, dtype: torch.dtype, length: int, head_size: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Milliseconds forward, and forward and backward, of every form."""
    q, k, v = (torch.randn(BATCH, length, HEADS, head_size, device=device, dtype=dtype) for _ in range(3))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    log_w = torch.randn(BATCH, length, device=device).abs().neg().requires_grad_()
    times = {}
    for name, form in forms(device, dtype, head_size).items():
        with torch.no_grad():
            forward = milliseconds(lambda form=form: form(*inputs, log_w), device, rounds)
        both = milliseconds(lambda form=form: form(*inputs, log_w).sum().backward(), device, rounds)
        times[name] = forward, both
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    table = Table(title=f"attention with key weights, {HEADS} heads, {device}, {dtype}")
    for heading in ("head", "length T", "form", "forward [ms]", "of the peak", "and backward [ms]", "of the peak"):
        table.add_column(heading, justify="right")
    for head_size in arguments.head_sizes:
        for length in arguments.lengths:
            operations = BATCH * HEADS * 2 * head_size * length * (length + 1)
            for name, times in measure(device, dtype, length, head_size, arguments.rounds).items():
                cells = [str(head_size), str(length), name]
                for taken, factor in zip(times, (1, 3.5), strict=True):
                    share = factor * operations / (taken * 1e-3 * arguments.peak_tflops * 1e12)
                    cells += [f"{taken:.3f}", f"{share:.1%}"]
                table.add_row(*cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
