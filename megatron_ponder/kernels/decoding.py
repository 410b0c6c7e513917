"""Attention of single queries over keys in blocks of a pool, where a key carries a weight beside it: log w in fp32.

Products of narrow types are added up in fp32, since logits rounded to bf16 would lose what log w says. A GPU converts
nothing for that; a CPU converts no more of the keys and values at a time than its own cache holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Numbers that are converted to fp32 at a time.
_PART = 1 << 18


class StoredBlocks(NamedTuple):
    """One layer's keys and values of n blocks, of b slots each.

    Attributes:
        keys_nMbD: keys of M heads.
        values_nMbD: values.
        log_w_x1b: log weights of the keys in fp32 or better, x = n · M, as `for_heads` gives them for all layers.
    """

    keys_nMbD: Tensor
    values_nMbD: Tensor
    log_w_x1b: Tensor


def for_heads(log_w_nb: Tensor, heads: int) -> Tensor:
    """Log weights of keys for M heads, (n · M, 1, b)."""
    return log_w_nb.repeat_interleave(heads, 0).unsqueeze(1)


def attend_owned(q_RND: Tensor, blocks: StoredBlocks, owners_n: Tensor, scale: float) -> Tensor:
    """Attention of one query a sequence over the blocks that the sequence owns, all of which are read where they lie.

    Every block gives the sum of its exponentials and of its weighted values; a sequence adds up those of its blocks.

    Args:
        q_RND: queries of N heads; M divides N.
        blocks: with keys of weight 0 where nothing was written.
        owners_n: int64, which query each block belongs to.
        scale: factor on the logits.

    Returns:
        (R, N, D).
    """
    heads = blocks.keys_nMbD.shape[1]
    q_RMGD = (q_RND * scale).unflatten(1, (heads, -1))
    if len(q_RMGD) == 1:  # all blocks are of one sequence: sums over blocks, in half as many operations
        logits = _logits(q_RMGD.expand(len(owners_n), -1, -1, -1), blocks)
        p = logits.sub_(logits.amax((0, 3), keepdim=True)).exp_()
        y = _weighted(p, blocks.values_nMbD).sum(0, keepdim=True)
        return (y / p.sum((0, 3)).view(1, heads, -1, 1)).to(q_RND.dtype).flatten(1, 2)
    logits = _logits(q_RMGD[owners_n], blocks)
    block_top = logits.amax(-1)
    top = block_top.new_full(q_RMGD.shape[:3], -torch.inf)
    top.scatter_reduce_(0, owners_n.view(-1, 1, 1).expand_as(block_top), block_top, "amax")
    p = logits.sub_(top[owners_n].unsqueeze(-1)).exp_()
    total = torch.zeros_like(top).index_add_(0, owners_n, p.sum(-1))
    y = torch.zeros(*top.shape, q_RND.shape[-1], dtype=p.dtype, device=p.device)
    y.index_add_(0, owners_n, _weighted(p, blocks.values_nMbD))
    return (y / total.unsqueeze(-1)).to(q_RND.dtype).flatten(1, 2)


def _logits(q_nMGD: Tensor, blocks: StoredBlocks) -> Tensor:
    """Every block's query times its keys, plus log w; (n, M, G, b) in fp32 or better."""
    keys_nMDb = blocks.keys_nMbD.transpose(2, 3)
    if keys_nMDb.dtype != blocks.log_w_x1b.dtype:
        return _wide_product(q_nMGD, keys_nMDb).add_(blocks.log_w_x1b.unflatten(0, q_nMGD.shape[:2]))
    logits = torch.baddbmm(blocks.log_w_x1b, q_nMGD.flatten(0, 1), keys_nMDb.flatten(0, 1))
    return logits.unflatten(0, q_nMGD.shape[:2])


def _weighted(p_nMGb: Tensor, values_nMbD: Tensor) -> Tensor:
    """Every block's weighted sum of its values, (n, M, G, D) in fp32 or better."""
    if values_nMbD.dtype == p_nMGb.dtype:
        return p_nMGb @ values_nMbD
    return _wide_product(p_nMGb.to(values_nMbD.dtype), values_nMbD)


def _wide_product(a_nMGx: Tensor, b_nMxy: Tensor) -> Tensor:
    """a @ b of a narrow type, added up in fp32."""
    if b_nMxy.is_cuda:
        product = torch.bmm(a_nMGx.flatten(0, 1), b_nMxy.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, b_nMxy.shape[:2])
    blocks = max(1, _PART // b_nMxy[0].numel())
    if len(b_nMxy) <= blocks:
        return a_nMGx.float() @ b_nMxy.float()
    parts = zip(a_nMGx.split(blocks), b_nMxy.split(blocks), strict=True)
    return torch.cat([a.float() @ b.float() for a, b in parts])
