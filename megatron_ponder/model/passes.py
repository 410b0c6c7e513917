"""The algorithm: one training forward is a fixed chain of passes of the same transformer.

Growth pass i = 0..K-1 runs i + 1 slots a token and gives every token one latent more; R refinement passes run all K + 1
slots and replace all latents at once (Jacobi iteration of z_{t,k} = scale · h_{t,k-1}); the final pass gives the hidden
states for the output. In `adaptive` mode every pass also routes from its own h_{t,0}, and the next pass uses that
log w. Under the hard rule the next pass has min(K̂, n + 1) latent steps of a token that had n in this one; `packed.py`
runs no other.

This file alone says so; plain training, pipelines and evaluation run it as the passes of `modes/pondering.py`. Their
fixed point is `fixed_point.py`. Where no other token sees latents, a whole model runs every slot once (`slotwise.py`).
What other modes do otherwise is said beside it.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PassState(NamedTuple):
    """What one pass hands to the next.

    Attributes:
        latents: (B, L, n, H), h_{t,0} .. h_{t,n-1}, and times the latent scale z_{t,1} .. z_{t,n}; None before the
            first pass.
        log_w: (B, L, n + 1), log weights of the next pass's slots as keys; None where every weight is 1.
    """

    latents: Tensor | None = None
    log_w: Tensor | None = None


def pass_slots(max_steps: int, refinements: int) -> tuple[int, ...]:
    """Slots per token of every pass: 1, 2, .., K, then R + 1 times K + 1. Without steps there is one pass."""
    if max_steps == 0:
        return (1,)
    return (*range(1, max_steps + 1), *[max_steps + 1] * (refinements + 1))


def kept_slots(index: int, plan: tuple[int, ...], fused: bool) -> slice:
    """The slots of pass `index` whose hidden states anybody reads; the last block need not finish the others.

    The next pass reads as many as it has latents, and the output reads all slots if it fuses them, else the last.
    """
    if index + 1 < len(plan):
        return slice(0, plan[index + 1] - 1)
    return slice(0, plan[index]) if fused else slice(plan[index] - 1, plan[index])


def enter_pass(embedded_BLH: Tensor, state: PassState) -> tuple[Tensor, Tensor | None]:
    """The interleaved sequence e_1, z_{1,1} .. z_{1,n}, e_2, .. (B, L (n + 1), H) and its log w (B, L (n + 1))."""
    slots_BLSH = embedded_BLH.unsqueeze(2)
    if state.latents is not None:
        slots_BLSH = torch.cat([slots_BLSH, state.latents], 2)
    log_w = None if state.log_w is None else state.log_w.flatten(1, 2)
    return slots_BLSH.flatten(1, 2), log_w


def leave_pass(h_BLSH: Tensor, log_w_BLK: Tensor | None, next_slots: int) -> PassState:
    """Hand over to a pass of `next_slots` slots a token the h_{t,j} that its z_{t,j+1} are made of.

    Args:
        h_BLSH: hidden states of the slots that this pass kept, the first of each token among them.
        log_w_BLK: log weights of all K + 1 steps that this pass's routing gives; None where there is no router.
        next_slots: at most one more than this pass had.
    """
    log_w = None if log_w_BLK is None else log_w_BLK[:, :, :next_slots]
    return PassState(h_BLSH[:, :, : next_slots - 1], log_w)
