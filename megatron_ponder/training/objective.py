"""The training loss of a micro-batch, as a module, because that is what DeepSpeed wraps."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Pruning
from megatron_ponder.parallel.loss import vocab_parallel_cross_entropy
from megatron_ponder.parallel.regions import enter


class Tally(NamedTuple):
    """Sums over the tokens of micro-batches, which may be added over micro-batches and ranks.

    Attributes:
        cross_entropy: nats.
        penalty: Σ_{k ≥ 1} w_k, without its weight λ.
        entropy: of the distribution s over steps, in nats.
        steps: (K + 1,), tokens by executed additional steps K̂.
        weights: (K + 1,), s_k.
        own_losses: (K + 1,), nats of what h_{t,k} by itself predicts, before it is mixed with other steps.
        first_squared: square of the first of these.
        steps_first: K̂ times the first of these.

    The last three are zero unless they were asked for; `penalty`, `entropy` and `weights` are without a router.
    """

    cross_entropy: float
    penalty: float
    entropy: float
    steps: list[int]
    weights: list[float]
    own_losses: list[float]
    first_squared: float
    steps_first: float

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return sum(self.steps)

    @property
    def mean_steps(self) -> float:
        """Average executed additional steps per token."""
        return sum(k * count for k, count in enumerate(self.steps)) / self.tokens

    @property
    def mean_loss(self) -> float:
        """Cross-entropy in nats per token."""
        return self.cross_entropy / self.tokens

    @property
    def steps_follow_loss(self) -> float | None:
        """Pearson's correlation over tokens of K̂ with the loss of what h_{t,0} predicts; None if one never varies."""
        mean_first = self.own_losses[0] / self.tokens
        variance_first = self.first_squared / self.tokens - mean_first**2
        variance_steps = sum(k**2 * count for k, count in enumerate(self.steps)) / self.tokens - self.mean_steps**2
        if min(variance_first, variance_steps) < 1e-9:
            return None
        covariance = self.steps_first / self.tokens - self.mean_steps * mean_first
        return covariance / math.sqrt(variance_first * variance_steps)

    @staticmethod
    def width(steps: int) -> int:
        """How many sums there are for K."""
        return 5 + 3 * (steps + 1)

    @staticmethod
    def of(sums: Tensor) -> "Tally":
        """From sums (width,) that `Objective` returns, added over whatever they should cover."""
        values = sums.tolist()
        options = (len(values) - 5) // 3
        steps, weights, own_losses = (values[start : start + options] for start in range(3, len(values) - 2, options))
        return Tally(*values[:3], [round(count) for count in steps], weights, own_losses, *values[-2:])


class Objective(nn.Module):
    """Cross-entropy of the next token plus λ times the weight of additional steps.

    Attributes:
        model: the language model.
    """

    def __init__(self, model: PonderLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        refinements: int,
        pruning: Pruning,
        penalty_weight: float = 0.0,
        each_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Evaluate one micro-batch.

        Args:
            tokens: int64 (B, L + 1).
            refinements: R.
            pruning: soft in training, or hard from `ponder.prune_start` on.
            penalty_weight: λ.
            each_step: as in `measure`.

        Returns:
            As `measure`.
        """
        result = self.model.jacobi(tokens[:, :-1], refinements, pruning, self.model.ponder_config.gradient_passes)
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
