"""The training loss of a micro-batch, as a module, because that is what DeepSpeed wraps."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Pruning
from megatron_ponder.parallel.loss import vocab_parallel_cross_entropy


class Tally(NamedTuple):
    """Sums over the tokens of micro-batches, which may be added over micro-batches and ranks.

    Attributes:
        cross_entropy: nats.
        penalty: Σ_{k ≥ 1} w_k, without its weight λ.
        steps: (K + 1,), tokens by executed additional steps K̂.
    """

    cross_entropy: float
    penalty: float
    steps: list[int]

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

    @staticmethod
    def of(sums: Tensor) -> "Tally":
        """From sums (K + 3,) that `Objective` returns, added over whatever they should cover."""
        cross_entropy, penalty, *steps = sums.tolist()
        return Tally(cross_entropy, penalty, [round(count) for count in steps])


class Objective(nn.Module):
    """Cross-entropy of the next token plus λ times the weight of additional steps.

    Attributes:
        model: the language model.
    """

    def __init__(self, model: PonderLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, refinements: int, pruning: Pruning, penalty_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Evaluate one micro-batch.

        Args:
            tokens: int64 (B, L + 1).
            refinements: R.
            pruning: soft in training.
            penalty_weight: λ.

        Returns:
            As `measure`.
        """
        result = self.model.jacobi(tokens[:, :-1], refinements, pruning, self.model.ponder_config.gradient_passes)
        return self.measure(result, tokens, penalty_weight)

    def measure(self, result: PonderOutput, tokens: Tensor, penalty_weight: float) -> tuple[Tensor, Tensor]:
        """The loss of a model's output.

        Args:
            result: the output for the first L tokens.
            tokens: int64 (B, L + 1).
            penalty_weight: λ.

        Returns:
            The sum over tokens of cross-entropy and λ Σ_{k ≥ 1} w_k, with its gradient, in nats; and for each sequence
            the detached sums of a `Tally`, fp64 (B, K + 3). A loss that is not finite has gradients that are not
            numbers, even where the mathematics gives finite ones, so that the gradient norm alone tells of both.
        """
        model, labels = self.model, tokens[:, 1:]
        logits = model.head(result.output_BLH)
        losses_BL = vocab_parallel_cross_entropy(
            logits, labels, model.axis, model.model_config.vocab_size, overwrite=True
        )
        loss = losses_BL.sum()
        sums = torch.zeros(len(tokens), model.ponder_config.steps + 3, dtype=torch.float64, device=tokens.device)
        sums[:, 0] = losses_BL.detach().sum(1, dtype=torch.float64)
        if result.routing is None:
            sums[:, -1] = labels.shape[1]
            return _telling(loss), sums
        penalties_BL = result.routing.log_w[..., 1:].exp().sum(-1)
        sums[:, 1] = penalties_BL.detach().sum(1, dtype=torch.float64)
        sums[:, 2:] = F.one_hot(result.routing.executed, model.ponder_config.steps + 1).sum(1)
        return _telling(loss + penalty_weight * penalties_BL.sum()), sums


def _telling(loss: Tensor) -> Tensor:
    """The same loss and gradients; where it is not finite, gradients that are not numbers."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
