"""The next tokens of several sequences, with their log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.sampling import Chooser, choose


@dataclass(frozen=True)
class Prediction:
    """What comes next in a sequence.

    Attributes:
        token: the id that was chosen.
        log_probability: of it under the model itself, before penalty, temperature and the like.
        top: the likeliest ids with their log-probabilities, where they were asked for.
    """

    token: int
    log_probability: float
    top: list[tuple[int, float]] = field(default_factory=list)


def pieces_of(model: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """Ids that may be read and chosen: the model's vocabulary may be larger than the tokenizer's."""
    return model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size)


@torch.inference_mode()
def predict(logits_BV: Tensor, choosers: Sequence[Chooser], top: Sequence[int]) -> list[Prediction | None]:
    """Choose the next token of each sequence.

    Args:
        logits_BV: of the ids that may be chosen; changed in place where there is a penalty.
        choosers: of the sequences.
        top: how many of the likeliest ids each wants to see.

    Returns:
        None for a sequence whose logits are not finite, or differ by what is not, which has no next token.
    """
    log_p_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).log_softmax(-1)
    finite = log_p_BV.isfinite().all(-1).tolist()
    tokens = choose(logits_BV, choosers)
    columns = torch.tensor([token or 0 for token in tokens], device=logits_BV.device).unsqueeze(1)
    values = log_p_BV.gather(1, columns).squeeze(1).tolist()
    predictions = []
    for known, token, value, log_p_V, count in zip(finite, tokens, values, log_p_BV, top, strict=True):
        if token is None or not known:
            predictions.append(None)
            continue
        best = log_p_V.topk(min(count, len(log_p_V)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        predictions.append(Prediction(token, value, list(pairs)))
    return predictions
