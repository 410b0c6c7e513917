"""How large the gradient is that every pass gives the weights of the blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.training.objective import Objective


class Apart(nn.Module):
    """A module that computes each time with copies of its weights, whose gradients are therefore those of one call.

    Attributes:
        copies: of the weights, for every call.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self._whole = [whole]  # in a list, so that its parameters are not this module's
        self.copies: list[dict[str, Tensor]] = []

    def forward(self, *arguments, **keywords) -> Tensor:
        """What the module computes."""
        (whole,) = self._whole
        self.copies.append({name: p.detach().clone().requires_grad_() for name, p in whole.named_parameters()})
        return functional_call(whole, self.copies[-1], arguments, keywords)


def by_pass(model: PonderLM, batches: Sequence[Tensor], refinements: int, rule: Rule) -> tuple[float, list[float]]:
    """The loss, and norms of the gradient that each pass gives blocks and final norm.

    Args:
        model: whole.
        batches: int64 (B, L + 1) each.
        refinements: R.
        rule: how a routing is applied.

    Returns:
        Nats per token, and a norm for each pass, the first one first; gradients are means over tokens.
    """
    transformer, tokens = model.transformer, sum(batch[:, 1:].numel() for batch in batches)
    total, gradients = 0.0, []
    for batch in batches:
        model.transformer = apart = Apart(transformer)
        loss, _ = Objective(model)(batch, refinements, rule)
        total += loss.item()
        (loss / tokens).backward()
        own = [torch.cat([p.grad.flatten() for p in copy.values()]) for copy in apart.copies]
        gradients = [a + b for a, b in zip(gradients, own, strict=True)] if gradients else own
    model.transformer = transformer
    model.zero_grad()
    return total / tokens, [float(gradient.norm()) for gradient in gradients]
