"""When the prediction of a slot is sure enough for its token to stop there, in PonderLM of mode `fixed`.

`config.ponder_confidence_exit` says so: `entropy:X`, below X nats, or `margin:X`, where the likeliest next token leads
by a probability of X at least.

This file and the others named *_ponderlm.py are copied into every exported model, so they need only torch and
transformers.
"""

import torch
from torch import Tensor

MEASURES = ("entropy", "margin")


def read_exit(text: str) -> tuple[str, float]:
    """Measure and threshold.

    Raises:
        ValueError: if the text is no exit.
    """
    measure, _, number = text.partition(":")
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if measure not in MEASURES or not threshold >= 0:
        raise ValueError(f"ponder_confidence_exit is {text}; it must be entropy:X or margin:X, with X from 0 up")
    return measure, threshold


def check_exit(exit: str | None, mode: str, visibility: str) -> None:
    """Refuse what is no exit, or is one of another mode than `fixed`, or of latents that no later token sees.

    Raises:
        ValueError: if it is.
    """
    if exit is not None:
        read_exit(exit)
        if mode != "fixed" or visibility != "all":
            other = mode if mode != "fixed" else f"ponder_latent_visibility {visibility}"
            raise ValueError(f"ponder_confidence_exit is for ponder_mode fixed, not for {other}; set it to None")


def stopped(logits_RV: Tensor, executed_R: Tensor, step: int, exit: str) -> Tensor:
    """K̂ as it is known after a step, int64 (R,).

    Args:
        logits_RV: of what the step predicts; of rows that stopped before it, anything.
        executed_R: K̂ as it was known before, K of a row that had not stopped.
        step: that has run.
        exit: as configured.
    """
    measure, threshold = read_exit(exit)
    p_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).softmax(-1)
    if measure == "entropy":
        sure_R = torch.special.entr(p_RV).sum(-1) < threshold
    else:
        first_R, second_R = p_RV.topk(2).values.unbind(-1)
        sure_R = first_R - second_R >= threshold
    return torch.where(sure_R & (executed_R > step), step, executed_R)
