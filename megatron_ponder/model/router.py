"""The router: how much of each latent step a token gets, as a softmax over steps and its reversed tails."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import InferenceConfig, ModelConfig, PonderConfig
from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.model.exits import Exit
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ParameterSpec, ShardedModule, constant, normal

RuleKind = Literal["soft", "hard", "all", "none"]


class Routing(NamedTuple):
    """What the router decided for every token.

    Attributes:
        log_s: (..., K + 1), log of the distribution s over the number of latent steps.
        log_w: (..., K + 1), log of w_k = Σ_{j ≥ k} s_j; the weight of step k as a key. Decreasing, 0 at k = 0.
        executed: int64 (...), K̂ = max{k : w_k ≥ τ}, the steps that run at inference.
    """

    log_s: Tensor
    log_w: Tensor
    executed: Tensor

    def at_most(self, steps: Tensor) -> "Routing":
        """The same with no more latent steps of a token than so many, int64 (...)."""
        return self._replace(executed=torch.minimum(self.executed, steps))


@dataclass(frozen=True)
class Rule:
    """How a routing is applied.

    Attributes:
        kind: `soft`, every step is there, with its weight; `hard`, steps beyond K̂ are not; `all`, every token takes K
            steps, as in `fixed` mode, and the router learns nothing; `none`, no token takes any, so that one pass over
            the tokens is all there is, in every mode.
        share: of `all`, w of every latent step: the output is so much of the last one and the rest of the first slot.
        exit: of `hard` without a router, what ends a token's steps; all of them run unless given.
        threshold: τ.
        bias: α, added k times to the logit of step k.
        executed: int64 (B, L), K̂ of every token in place of what τ gives, for comparison with other choices.
    """

    kind: RuleKind
    threshold: float
    bias: float = 0.0
    executed: Tensor | None = None
    share: float = 1.0
    exit: Exit | None = None

    @property
    def latents(self) -> bool:
        """Whether there are latent steps at all."""
        return self.kind != "none"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold {self.threshold} is not a weight; choose it between 0 (every step runs) and 1")


def rule_of(
    own: InferenceConfig,
    kind: RuleKind,
    threshold: float | None = None,
    bias: float | None = None,
    exit: Exit | None = None,
) -> Rule:
    """A rule with the configured τ and α unless others are given."""
    threshold, bias = own.threshold if threshold is None else threshold, own.router_bias if bias is None else bias
    return Rule(kind, threshold, bias, exit=exit)


class _Replicated(ShardedModule):
    """A small linear layer that every rank holds whole and computes in fp32 or better."""

    def __init__(self, in_features: int, out_features: int, axis: Axis, std: float) -> None:
        super().__init__(axis)
        self.declare("weight", ParameterSpec((out_features, in_features), normal(std) if std else constant(0.0)))
        self.declare("bias", ParameterSpec((out_features,), constant(0.0)))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide))


class Router(nn.Module):
    """Logits g over 0..K latent steps from the hidden state of a token's first slot, or from its embedding."""

    def __init__(self, model: ModelConfig, ponder: PonderConfig, axis: Axis) -> None:
        super().__init__()
        width, options = ponder.router_hidden_size, ponder.latent_steps + 1
        self.hidden = _Replicated(model.hidden_size, width, axis, model.init_std) if width else None
        self.output = _Replicated(width or model.hidden_size, options, axis, 0.0)
        self.output.specs["bias"] = ParameterSpec((options,), _favour_last(ponder.router_initial_bias))

    def forward(self, h_BLH: Tensor) -> Tensor:
        """Logits (B, L, K + 1), in fp32 or better, of h_BLH: h_{t,0} or e_t."""
        return self.output(h_BLH if self.hidden is None else F.gelu(self.hidden(h_BLH)))


def _favour_last(bias: float):
    def fill(tensor: Tensor, _: torch.Generator) -> None:
        tensor.zero_()
        tensor[-1] = bias

    return fill


def route(logits: Tensor, rule: Rule) -> Routing:
    """The routing that logits (..., K + 1) stand for.

    log w is a reversed logcumsumexp: it keeps its value and gradient where w underflows, unlike log(clamp(w)).
    """
    if rule.kind in ("all", "none"):  # gradients are 0, and not what rounding leaves, which Adam would make large
        certain = torch.full_like(logits, DEAD)
        certain[..., -1 if rule.kind == "all" else 0] = 0
        if rule.share < 1:
            certain[..., 0], certain[..., -1] = math.log1p(-rule.share), math.log(rule.share)
        logits = 0 * logits + certain
    if rule.bias:
        logits = logits + rule.bias * torch.arange(logits.shape[-1], device=logits.device)
    tails = logits.flip(-1).logcumsumexp(-1).flip(-1)
    log_total = tails[..., :1]
    log_w = tails - log_total
    chosen = executed_steps(log_w, rule.threshold) if rule.executed is None else rule.executed
    return Routing(logits - log_total, log_w, chosen)


def given_steps(executed: Tensor, steps: int, dtype: torch.dtype) -> Routing:
    """The routing by which tokens take the steps given, each of weight 1 as a key, and the last one is the output.

    Args:
        executed: int64 (...), K̂.
        steps: K.
        dtype: of the weights.
    """
    last = torch.arange(steps + 1, device=executed.device) == executed.unsqueeze(-1)
    log_s = torch.full(last.shape, DEAD, dtype=dtype, device=executed.device).masked_fill(last, 0)
    return Routing(log_s, torch.zeros_like(log_s), executed)


def executed_steps(log_w: Tensor, threshold: float) -> Tensor:
    """K̂ = max{k : w_k ≥ τ}; w decreases with k, so that it is a count.

    w_0 = 1 is left out of it, so that K̂ is 0 and no index below that even where weights are not numbers.
    """
    w = log_w[..., 1:].detach().exp()
    return (w >= threshold).sum(-1)


def key_log_weights(routing: Routing, rule: Rule) -> Tensor:
    """log w as attention sees it, (..., K + 1): under the hard rule, steps beyond K̂ are dead."""
    if rule.kind != "hard":
        return routing.log_w
    step = torch.arange(routing.log_w.shape[-1], device=routing.log_w.device)
    return routing.log_w.masked_fill(step > routing.executed.unsqueeze(-1), DEAD)


def executed_before(log_w_BT: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
    """Latent steps of every token that are not dead as keys, int64 (B, L): those that a pruned pass ran.

    Args:
        log_w_BT: log weights with which its slots entered; None in the first pass, which has no latent ones.
        shape: B and L.
        device: of the result.
    """
    if log_w_BT is None:
        return torch.zeros(tuple(shape), dtype=torch.long, device=device)
    return (log_w_BT.unflatten(1, (shape[1], -1)) != DEAD).sum(-1) - 1


def fusion_weights(routing: Routing, rule: Rule) -> Tensor:
    """Weights of h_{t,0} .. h_{t,K} in the output, (..., K + 1), which sum to 1.

    Soft: s. Hard: s for steps before K̂, and w at K̂, so that the last executed step takes the remaining mass.
    """
    if rule.kind != "hard":
        return routing.log_s.exp()
    step = torch.arange(routing.log_s.shape[-1], device=routing.log_s.device)
    last = routing.executed.unsqueeze(-1)
    weights = torch.where(step < last, routing.log_s.exp(), routing.log_w.exp())
    return weights.masked_fill(step > last, 0)
