"""The training loss of a micro-batch, as a module, because that is what DeepSpeed wraps."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_ponder.model.ponder import PonderLM
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
        """From the sums that `Objective` returns, added over whatever they should cover."""
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
            The sum over tokens of cross-entropy and λ Σ_{k ≥ 1} w_k, with its gradient, in nats; and the detached sums
            of a `Tally`, fp64 (K + 3,).
        """
        model, ponder = self.model, self.model.ponder_config
        result = model.jacobi(tokens[:, :-1], refinements, pruning, ponder.gradient_passes)
        labels = tokens[:, 1:]
        logits = model.head(result.output_BLH)
        loss = vocab_parallel_cross_entropy(logits, labels, model.head.axis, overwrite=True).sum()
        sums = torch.zeros(ponder.steps + 3, dtype=torch.float64, device=tokens.device)
        sums[0] = loss.detach()
        if result.routing is None:
            sums[-1] = labels.numel()
            return loss, sums
        penalty = result.routing.log_w[..., 1:].exp().sum()
        sums[1] = penalty.detach()
        sums[2:] = torch.bincount(result.routing.executed.flatten(), minlength=ponder.steps + 1)
        return loss + penalty_weight * penalty, sums
