"""The training loss of a micro-batch, as a module, because that is what DeepSpeed wraps."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.regions import enter


class Objective(nn.Module):
    """Cross-entropy of the next token plus λ times the weight of additional steps.

    Attributes:
        model: the language model.
        gradient_passes: gradients flow through the last so many passes only; None for all.
    """

    def __init__(self, model: PonderLM, gradient_passes: int | None = None) -> None:
        super().__init__()
        self.model, self.gradient_passes = model, gradient_passes

    def forward(
        self,
        tokens: Tensor,
        refinements: int,
        rule: Rule,
        penalty_weight: float = 0.0,
        each_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate one micro-batch.

        Args:
            tokens: int64 (B, L + 1).
            refinements: R.
            rule: how a routing is applied.
            penalty_weight: λ.
            each_step: as in `measure`.

        Returns:
            As `measure`.
        """
        result = self.model.jacobi(tokens[:, :-1], refinements, rule, self.gradient_passes)
        return self.measure(result, tokens, penalty_weight, each_step)

    def measure(
        self, result: PonderOutput, tokens: Tensor, penalty_weight: float, each_step: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of a model's output.

        Args:
            result: the output for the first L tokens.
            tokens: int64 (B, L + 1).
            penalty_weight: λ.
            each_step: measure also what every step of a routed model predicts by itself, without gradients; that takes
                K + 1 more products with the head.

        Returns:
            The sum over tokens of cross-entropy and λ Σ_{k ≥ 1} w_k, with its gradient, in nats; and for each sequence
            the detached sums of a `Tally`, fp64 (B, `Tally.width`). A loss that is not finite has gradients that are
            not numbers, even where the mathematics gives finite ones, so that the gradient norm alone tells of both.
        """
        losses_BL = self._losses(result.output_BLH, tokens)
        loss, options = losses_BL.sum(), self.model.ponder_config.steps + 1
        sums = torch.zeros(len(tokens), Tally.width(options - 1), dtype=torch.float64, device=tokens.device)
        sums[:, 0] = losses_BL.detach().sum(1, dtype=torch.float64)
        if result.routing is None:
            sums[:, 2 + options] = losses_BL.shape[1]
            return _telling(loss), sums
        penalties_BL = result.routing.log_w[..., 1:].exp().sum(-1)
        with torch.no_grad():
            sums[:, 1] = penalties_BL.sum(1, dtype=torch.float64)
            log_s, executed_BL = result.routing.log_s, result.routing.executed
            s = log_s.exp()
            sums[:, 2] = -torch.where(s > 0, s * log_s, 0).sum((1, 2), dtype=torch.float64)
            sums[:, 3:-2] = torch.cat(
                [
                    F.one_hot(executed_BL, options).sum(1),
                    s.sum(1, dtype=torch.float64),
                    self._own_losses(result, tokens, sums, executed_BL) if each_step else s.new_zeros(len(s), options),
                ],
                1,
            )
        return _telling(loss + penalty_weight * penalties_BL.sum()), sums

    def _losses(self, read_BLH: Tensor, tokens: Tensor) -> Tensor:
        """(B, L) nats of what the head predicts from hidden states on all tensor ranks."""
        model = self.model
        return vocab_parallel_cross_entropy(
            model.head(read_BLH), tokens[:, 1:], model.axis, model.model_config.vocab_size, overwrite=True
        )

    def _own_losses(self, result: PonderOutput, tokens: Tensor, sums: Tensor, executed_BL: Tensor) -> Tensor:
        """(B, K + 1) nats of what every step predicts by itself; the last two sums are filled in."""
        own_losses = []
        for h_BLH in result.hidden_BLSH.unbind(2):
            losses_BL = self._losses(enter(h_BLH, self.model.axis, tokens.shape[1] - 1), tokens).double()
            if not own_losses:
                sums[:, -2] = losses_BL.square().sum(1)
                sums[:, -1] = (losses_BL * executed_BL).sum(1)
            own_losses.append(losses_BL.sum(1))
        return torch.stack(own_losses, 1)


def _telling(loss: Tensor) -> Tensor:
    """The same loss and gradients; where it is not finite, gradients that are not numbers."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
