"""The training loss of a micro-batch, as a module, because that is what DeepSpeed wraps."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ponder.estimates.flops import own_pairs, work_of_passes
from megatron_ponder.model.packed import packable, packed_jacobi
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Routing, Rule
from megatron_ponder.model.spans import span
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.context import whole_rows
from megatron_ponder.parallel.regions import enter

# λ, the weight of every latent step of a token; or a weight for each number of them, by which s_0 … s_K count.
PenaltyWeights = float | Sequence[float]


class Objective(nn.Module):
    """Cross-entropy of the next token plus λ times the weight of latent steps.

    Attributes:
        model: the language model.
        gradient_passes: gradients flow through the last so many passes only; None for all.
        packed: slots that are pruned are not run, in place of being masked.
    """

    def __init__(self, model: PonderLM, gradient_passes: int | None = None, packed: bool = False) -> None:
        super().__init__()
        self.model, self.gradient_passes, self.packed = model, gradient_passes, packed

    def forward(
        self,
        tokens: Tensor,
        refinements: int | None,
        rule: Rule,
        penalty: PenaltyWeights = 0.0,
        each_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate one micro-batch.

        Args:
            tokens: int64 (B, L + 1).
            refinements: R; None for `exact`, without gradients.
            rule: how a routing is applied.
            penalty, each_step: as in `measure`.

        Returns:
            As `measure`.
        """
        if refinements is None:
            return self.measure(self.model.exact(tokens[:, :-1], rule), tokens, penalty)
        evaluate = partial(packed_jacobi, self.model) if self.packs(rule, each_step) else self.model.jacobi
        result = evaluate(tokens[:, :-1], refinements, rule, self.gradient_passes)
        return self.measure(result, tokens, penalty, each_step)

    def packs(self, rule: Rule, each_step: bool = False) -> bool:
        """Whether slots that the rule prunes are not run; `each_step` asks for the states of all."""
        return self.packed and packable(self.model, rule) and not each_step

    def measure(
        self, result: PonderOutput, tokens: Tensor, penalty: PenaltyWeights, each_step: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of a model's output.

        Args:
            result: the output for the first L tokens.
            tokens: int64 (B, L + 1).
            penalty: λ, or λ c_0 … λ c_K.
            each_step: measure also what every step of a routed model predicts by itself, without gradients; that takes
                K + 1 more products with the head.

        Returns:
            The sum over tokens of cross-entropy and λ Σ_{k ≥ 1} w_k, which is λ Σ_k k s_k, or λ Σ_k c_k s_k, with its
            gradient, in nats; and for each sequence the detached sums of a `Tally`, packed. A loss that is not finite
            has gradients that are not numbers, even where the mathematics gives finite ones, so that the gradient norm
            alone tells of both.
        """
        steps, labels_BL = self.model.ponder_config.steps, tokens[:, 1:]
        with span("loss"):
            loss, losses_BL = self.model.head(result.output_BLH, labels_BL)
        executed_BL = torch.full_like(labels_BL, result.steps)
        sums = {"cross_entropy": losses_BL.sum(1, dtype=torch.float64)} | self._work(result)
        if result.routing is not None:
            penalties_BL, executed_BL = result.routing.log_w[..., 1:].exp().sum(-1), result.routing.executed
            if isinstance(penalty, (int, float)):
                loss = loss + penalty * penalties_BL.sum()
            else:
                loss = loss + weighed(result.routing, penalty).sum()
            sums |= {"penalty": penalties_BL.detach().sum(1, dtype=torch.float64)} | _spread(result.routing)
            if each_step:
                sums |= self._own_losses(result, labels_BL)
        sums["steps"] = counted(executed_BL, steps)
        return _telling(loss), Tally.pack(steps, sums)

    def _work(self, result: PonderOutput) -> dict[str, Tensor]:
        """What the passes ran of each sequence; of this rank's share, each slot with all that it may see.

        Where every slot is run once, those that run a step see as many tokens as all do in the mean.
        """
        times, context = work_of_passes(result.passes, self.gradient_passes), self.model.context
        slots_PB = result.slots_PB.to(result.output_BLH.device, torch.float64)
        pairs_PB = slots_PB * (slots_PB + 1) / 2
        if result.once:
            tokens = result.output_BLH.shape[1]
            step_P1 = torch.arange(result.passes, device=slots_PB.device).unsqueeze(1)
            pairs_PB = own_pairs(slots_PB, tokens, context.rank * tokens + step_P1)
        elif context.size > 1:
            earlier_PB = whole_rows(slots_PB.unsqueeze(-1), context)[..., : context.rank].sum(-1)
            pairs_PB = pairs_PB + slots_PB * earlier_PB
        work = {"slot_work": slots_PB, "pair_work": pairs_PB}
        return {"slots": slots_PB.sum(0)} | {
            name: sum(n * each for n, each in zip(times, of_passes, strict=True)) for name, of_passes in work.items()
        }

    @torch.no_grad()
    def _own_losses(self, result: PonderOutput, labels_BL: Tensor) -> dict[str, Tensor]:
        """Sums of what every step predicts by itself, of each sequence."""
        axis, count = self.model.axis, labels_BL.shape[1]
        own_losses = []
        for h_BLH in result.hidden_BLSH.unbind(2):
            losses_BL = self.model.head(enter(h_BLH, axis, count), labels_BL)[1].double()
            if not own_losses:
                first_BL = losses_BL
            own_losses.append(losses_BL.sum(1))
        return {
            "own_losses": torch.stack(own_losses, 1),
            "first_squared": first_BL.square().sum(1),
            "steps_first": (first_BL * result.routing.executed).sum(1),
        }


def weighed(routing: Routing, weights: Sequence[float]) -> Tensor:
    """Σ_k weight_k s_k of every token, (B, L)."""
    return sum(weight * s_k for weight, s_k in zip(weights, routing.log_s.exp().unbind(-1), strict=True))


def counted(executed_BL: Tensor, steps: int) -> Tensor:
    """Tokens of each sequence by executed latent steps, int64 (B, K + 1).

    By comparison, and not as an index: one out of range ends a CUDA context, and a check of the range waits for the
    device in every micro-batch.
    """
    return (executed_BL.unsqueeze(-1) == torch.arange(steps + 1, device=executed_BL.device)).sum(1)


@torch.no_grad()
def _spread(routing: Routing) -> dict[str, Tensor]:
    """Sums of how a router spreads its tokens over steps, of each sequence."""
    s = routing.log_s.exp()
    return {
        "entropy": -torch.where(s > 0, s * routing.log_s, 0).sum((1, 2), dtype=torch.float64),
        "weights": s.sum(1, dtype=torch.float64),
    }


def _telling(loss: Tensor) -> Tensor:
    """The same loss and gradients; where it is not finite, gradients that are not numbers."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
