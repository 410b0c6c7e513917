"""Attention of some slots of a sequence over keys that lie in any order, of which every query sees its own."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.attention import FOLDED_CHANNELS, folded_channels


class VisibleKeys(NamedTuple):
    """Which of S keys each of T queries sees, and what they weigh; the same for all layers.

    Attributes:
        mask_TS: what is added to the logits, in the type of the keys.
        log_w_1S: log weights that are not in the mask; None for none.
    """

    mask_TS: Tensor
    log_w_1S: Tensor | None

    @classmethod
    def of(cls, seen_TS: Tensor, log_w_S: Tensor | None, like: Tensor) -> "VisibleKeys":
        """Make the mask for keys of the type of `like`; log weights have theirs, in fp32 or better."""
        zero = like.new_zeros(())
        if log_w_S is not None and log_w_S.dtype != like.dtype:  # in a mask they would be rounded
            return cls(torch.where(seen_TS, zero, -torch.inf), log_w_S.unsqueeze(0))
        return cls(torch.where(seen_TS, zero if log_w_S is None else log_w_S, -torch.inf), None)


def attend_seen(q_TND: Tensor, k_MSD: Tensor, v_MSD: Tensor, scale: float, seen: VisibleKeys) -> Tensor:
    """Attention of queries over the keys that they see.

    Args:
        q_TND: queries of N heads; M divides N.
        k_MSD, v_MSD: keys and values, finite where nobody sees them too.
        scale: factor on the logits; 1/√D where weights are not in the mask.
        seen: which are seen; at least one by every query.

    Returns:
        (T, N, D).
    """
    q_NTD, head_size, grouped = q_TND.transpose(0, 1), q_TND.shape[-1], q_TND.shape[1] != len(k_MSD)
    if seen.log_w_1S is not None:
        of_q, of_k = folded_channels(seen.log_w_1S, head_size, k_MSD)
        q_NTD, k_MSD = (torch.cat([x, c.expand(*x.shape[:2], -1)], -1) for x, c in ((q_NTD, of_q), (k_MSD, of_k)))
        v_MSD = F.pad(v_MSD, (0, FOLDED_CHANNELS))
    inputs = (x.unsqueeze(0) for x in (q_NTD, k_MSD, v_MSD))
    y_1NTD = F.scaled_dot_product_attention(*inputs, attn_mask=seen.mask_TS, scale=scale, enable_gqa=grouped)
    return y_1NTD[0, ..., :head_size].transpose(0, 1)
