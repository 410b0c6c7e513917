"""Choosing the next tokens of several sequences from their logits, each by its own rules."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ponder.config.declarations import check_ranges, number_field

SEEDS = 1 << 63


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen. The options apply in the order in which they stand here.

    Their ranges keep finite logits finite, and some token likely enough to be chosen.

    Attributes:
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that have occurred.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; 0 for all.
        top_p: choose among the fewest likeliest tokens that have this probability together.
        min_p: choose among tokens with at least this share of the likeliest one's probability.
        seed: of the sequence's random numbers, so that its tokens do not depend on the others of its batch.
    """

    repetition_penalty: float = number_field(1.0, 0.01, 100)
    temperature: float = number_field(0.0, 1e-6, 100, or_zero=True)
    top_k: int = number_field(0, 0, 10**9)
    top_p: float = number_field(1.0, 1e-6, 1)
    min_p: float = number_field(0.0, 0, 1)
    seed: int = number_field(0, 0, SEEDS - 1)

    def __post_init__(self) -> None:
        check_ranges(self)

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
def choose(logits_BV: Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """The next token of each sequence; None where logits are not finite, which name none.

    Args:
        logits_BV: of the next token; changed in place where there is a penalty.
        choosers: of the sequences; the chosen tokens are added to them.
    """
    for logits_V, chooser in zip(logits_BV, choosers, strict=True):
        chooser.penalize(logits_V)
    finite = logits_BV.isfinite().all(-1).tolist()
    chosen = [token if known else None for token, known in zip(logits_BV.argmax(-1).tolist(), finite, strict=True)]
    # Two ways of drawing, by the sequence's own rules alone: whoever else is in the batch must not change a result.
    for restricts in (False, True):
        rows = [
            row
            for row, chooser in enumerate(choosers)
            if finite[row] and chooser.sampling.temperature > 0 and chooser.sampling.restricts == restricts
        ]
        if rows:
            of_rows = [choosers[row] for row in rows]
            for row, token in zip(rows, _draw(logits_BV[rows], of_rows, restricts), strict=True):
                chosen[row] = token
    for token, chooser in zip(chosen, choosers, strict=True):
        if token is not None:
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
