"""Choosing the next token from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ponder.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 for all.
        top_p: choose among the fewest likeliest tokens that have this probability together.
        seed: of the random numbers of one sequence.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature and top_k must not be negative, and top_p must lie above 0 and at most at 1")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one sequence, from logits over the vocabulary."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V.float() / sampling.temperature).softmax(-1).sort(descending=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=generator)])
