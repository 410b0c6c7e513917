"""Confidence exit: a token's latent steps end at the first slot whose prediction of the next token is sure enough.

It is a rule of inference for `fixed`, beside the router's, and needs no training: the slots after that one are neither
run nor seen by later tokens, and its hidden state is the output.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import PonderConfig

Measure = Literal["entropy", "margin"]


@dataclass(frozen=True)
class Exit:
    """When a prediction is sure enough.

    Attributes:
        measure: `entropy`, which has to be below the threshold; or `margin` of the likeliest token's probability over
            that of the next one, which has to reach it.
        threshold: of the entropy, in nats: with 0 every step runs, with inf none. Of the margin: with 0 no step runs,
            above 1 every one.
    """

    measure: Measure
    threshold: float

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure) or not self.threshold >= 0:
            raise UserError(
                f"{self.measure}:{self.threshold} is no confidence exit; choose entropy:X, by which a token stops when "
                "its prediction has fewer than X nats, or margin:X, when the likeliest token leads by X at least"
            )

    def __str__(self) -> str:
        return f"{self.measure}:{self.threshold:g}"

    @classmethod
    def read(cls, text: str) -> "Exit":
        """The exit that `entropy:0.5` or `margin:0.9` says.

        Raises:
            UserError: the text is neither.
        """
        measure, _, number = text.partition(":")
        try:
            threshold = float(number)
        except ValueError:
            threshold = math.nan  # which is refused
        return cls(measure, threshold)

    def confident(self, logits_nV: Tensor) -> Tensor:
        """Whether predictions are sure enough, bool (n,); what is not a number never is."""
        p_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32)).softmax(-1)
        if self.measure == "entropy":
            return torch.special.entr(p_nV).sum(-1) < self.threshold
        first_n, second_n = p_nV.topk(2).values.unbind(-1)
        return first_n - second_n >= self.threshold

    def check(self, ponder: PonderConfig) -> None:
        """Refuse a model whose tokens cannot stop by it.

        Raises:
            UserError: they cannot.
        """
        if not can_exit(ponder):
            what = "whose latents no later token sees" if ponder.mode == "fixed" else f"of mode {ponder.mode}"
            raise UserError(f"a confidence exit is for a model of mode fixed, not for one {what}; leave it out")


def can_exit(ponder: PonderConfig) -> bool:
    """Whether the tokens of a model can stop by a confidence exit: those of `fixed` whose latents later tokens see.

    A router decides for those of `adaptive`; in the other modes later tokens would miss what the output is made of.
    """
    return ponder.mode == "fixed" and not ponder.own_latents
