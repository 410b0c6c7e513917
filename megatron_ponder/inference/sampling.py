"""Choosing the next tokens of several sequences from their logits, each by its own rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ponder.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen. The options apply in the order in which they stand here.

    Attributes:
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that have occurred.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 for all.
        top_p: choose among the fewest likeliest tokens that have this probability together.
        min_p: choose among tokens with at least this share of the likeliest one's probability.
        seed: of the sequence's random numbers, so that its tokens do not depend on the others of its batch.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0):
            raise UserError("temperature and top_k must not be negative; use 0 for the likeliest token and for all")
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise UserError("top_p must lie above 0 and at most at 1, and min_p from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError("repetition_penalty must be positive; 1 changes nothing")
        if not 0 <= self.seed < 1 << 63:
            raise UserError("seed must be a number from 0 to 2^63 - 1")

    @property
    def restricts(self) -> bool:
        """Whether it chooses among some tokens only."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


class Chooser:
    """Chooses the tokens of one sequence: its rules, its random numbers and what has occurred in it."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._occurred = set(prompt) if sampling.repetition_penalty != 1 else None

    def penalize(self, logits_V: Tensor) -> None:
        """Apply the repetition penalty in place."""
        if self._occurred:
            ids = torch.tensor(sorted(self._occurred), device=logits_V.device)
            penalty, of_those = self.sampling.repetition_penalty, logits_V[ids]
            logits_V[ids] = torch.where(of_those > 0, of_those / penalty, of_those * penalty)

    def draw(self) -> float:
        """The next random number, in [0, 1)."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def add(self, token: int) -> None:
        """Note that a token has occurred."""
        if self._occurred is not None:
            self._occurred.add(token)


@torch.inference_mode()
def choose(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each sequence.

    Args:
        logits_BV: of the next token; changed in place where there is a penalty.
        choosers: of the sequences; the chosen tokens are added to them.
    """
    for logits_V, chooser in zip(logits_BV, choosers, strict=True):
        chooser.penalize(logits_V)
    chosen = logits_BV.argmax(-1).tolist()
    # Two ways of drawing, by the sequence's own rules alone: whoever else is in the batch must not change a result.
    for restricts in (False, True):
        rows = [
            row
            for row, chooser in enumerate(choosers)
            if chooser.sampling.temperature > 0 and chooser.sampling.restricts == restricts
        ]
        if rows:
            of_rows = [choosers[row] for row in rows]
            for row, token in zip(rows, _draw(logits_BV[rows], of_rows, restricts), strict=True):
                chosen[row] = token
    for token, chooser in zip(chosen, choosers, strict=True):
        chooser.add(token)
    return chosen


def _draw(logits_BV: Tensor, choosers: Sequence[Chooser], restricts: bool) -> list[int]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)

    rules = [chooser.sampling for chooser in choosers]
    wide = logits_BV.double()
    # From the largest on, so that a temperature near 0 gives no infinity.
    p = ((wide - wide.amax(-1, keepdim=True)) / column([rule.temperature for rule in rules])).softmax(-1)
    ids = None
    if restricts:
        p, ids = p.sort(descending=True)
        before = p.cumsum(-1) - p
        rank = torch.arange(p.shape[1], device=p.device)
        excluded = rank >= column([rule.top_k or p.shape[1] for rule in rules])
        remaining = p.masked_fill(excluded, 0).sum(-1, keepdim=True)
        excluded |= before >= column([rule.top_p for rule in rules]) * remaining
        excluded |= p < column([rule.min_p for rule in rules]) * p[:, :1]
        p = p.masked_fill(excluded, 0)
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    drawn = column([chooser.draw() for chooser in choosers]) * total
    # The first token whose cumulative probability exceeds the number drawn: there is one, and its own is not 0.
    at = torch.searchsorted(cumulative, drawn.minimum(total.nextafter(torch.zeros_like(total))), right=True)
    return (at if ids is None else ids.gather(1, at)).squeeze(1).tolist()
