"""Stage `attention` of `gpu.py`: every kernel, forward and backward, beside forms that the package does not have."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_bench import Bench, Case, Numbers, failure
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.kernels.attention import Call, attend, choose

SLOTS, CHECKED = 16_384, 512  # of a batch that is timed; of the one row that is compared with fp64
CHANNELS = 1024  # of all heads
FORWARD_AND_BACKWARD = 3.5  # times the forward pass


class Inputs(NamedTuple):
    """q, k, v (B, T, N, D) and fp32 log w (B, T), all of which get gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_w: Tensor

    @staticmethod
    def drawn(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> "Inputs":
        """At random, with weights of keys down to e^-8."""
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device}
        q, k, v = (torch.randn(shape, **options).to(dtype).requires_grad_() for _ in range(3))
        return Inputs(q, k, v, (torch.rand(shape[:2], **options) * -8).requires_grad_())

    def in_double(self) -> "Inputs":
        """The same numbers in fp64."""
        return Inputs(*(part.detach().double().requires_grad_() for part in self))


Form = Callable[[Inputs], Tensor]


def unweighted(given: Inputs) -> Tensor:
    """PyTorch's kernel, for which all keys weigh 1: what weights may cost is measured from here."""
    heads_first = (part.transpose(1, 2) for part in given[:3])
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def flex(given: Inputs) -> Tensor:
    """FlexAttention, compiled, with log w added to the score."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = given.q.shape[1]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=given.q.device)
    heads_first = (part.transpose(1, 2) for part in given[:3])
    log_w = given.log_w
    compiled = torch.compile(flex_attention, dynamic=False)
    out = compiled(*heads_first, score_mod=lambda s, b, h, q, k: s + log_w[b, k], block_mask=mask)
    return out.transpose(1, 2)


def explicit(given: Inputs) -> Tensor:
    """The definition, with all T × T logits."""
    logits = torch.einsum("btnd,bsnd->bnts", given.q, given.k) * given.q.shape[-1] ** -0.5
    logits = logits + given.log_w[:, None, None]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return torch.einsum("bnts,bsnd->btnd", logits.masked_fill(hidden, float("-inf")).softmax(-1), given.v)


def by_kernel(name: AttentionKernel, given: Inputs) -> Tensor:
    """The package's entry, made to take a kernel."""
    return attend(given.q, given.k, given.v, given.q.shape[-1] ** -0.5, given.log_w, kernel=name)


def kernels(device: torch.device, dtype: torch.dtype) -> list[AttentionKernel]:
    """Names of those that compute such a call."""
    call = Call(device.type, dtype)
    named = [name for name in get_args(AttentionKernel) if name != "auto"]
    return [name for name in named if failure(partial(choose, call, name)) is None]


def forms(given: Inputs, tiny: bool) -> dict[str, Form]:
    """All that is compared, by name: the table of kernels as it is, and the forms above."""
    named = {name: partial(by_kernel, name) for name in kernels(given.q.device, given.q.dtype)}
    return named | {"torch, weights of 1": unweighted} | ({} if tiny else {"FlexAttention": flex})


def attention_cases(tiny: bool) -> dict[str, Case]:
    """Cases by name."""
    sizes = [(16, 32)] if tiny else [(size, length) for size in (64, 128) for length in (2048, 8192)]
    return {f"head size {size}, {length:,} slots": partial(measure, size, length) for size, length in sizes}


def measure(head_size: int, length: int, bench: Bench) -> dict[str, Numbers]:
    """Milliseconds, TFLOP/s and share of the peak of every form; and its error, relative to fp64."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    heads, batch = (2, 1) if bench.tiny else (CHANNELS // head_size, SLOTS // length)
    given = Inputs.drawn((batch, length, heads, head_size), bench.device, dtype)
    small = Inputs.drawn((1, min(length, CHECKED), heads, head_size), bench.device, dtype)
    compared = forms(given, bench.tiny)
    forward = bench.in_turn({name: partial(run_forward, form, given) for name, form in compared.items()})
    both = bench.in_turn({name: partial(run_both, form, given) for name, form in compared.items()})
    flops = 2.0 * batch * heads * length * length * head_size
    result = {}
    for name, form in compared.items():
        numbers = dict(both[name])
        if "ms" in numbers and "ms" in forward[name]:
            rate = FORWARD_AND_BACKWARD * flops / (1e9 * numbers["ms"])
            numbers |= {"forward ms": forward[name]["ms"], "TFLOP/s": rate}
            numbers |= {"of the peak": rate * 1e12 / bench.gpu.bf16} if bench.gpu and bench.gpu.bf16 else {}
        if form is not unweighted:
            numbers |= errors(form, small)
        result[name] = numbers
    return result


def run_forward(form: Form, given: Inputs) -> None:
    """Without gradients."""
    with torch.no_grad():
        form(given)


def run_both(form: Form, given: Inputs) -> list[Tensor]:
    """Forward and backward.

    Returns:
        The output, and gradients of all inputs that have one.
    """
    out = form(given)
    used = given[:3] if form is unweighted else given
    return [out.detach(), *torch.autograd.grad(out, used, torch.ones_like(out))]


def errors(form: Form, given: Inputs) -> Numbers:
    """Norms of the errors of the output and of the gradients of q and log w, as shares of the norms of these."""
    found: list[Tensor] = []
    if message := failure(lambda: found.extend(run_both(form, given))):
        return {"error": message}
    expected = run_both(explicit, given.in_double())
    shares = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    return {"off": shares[0], "dq off": shares[1], "d log w off": shares[4]}
