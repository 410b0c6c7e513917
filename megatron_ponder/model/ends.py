"""The two ends of a model, between which its blocks lie: where tokens enter, and where tokens are predicted.

The first pipeline rank has the front, the last one the back.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.kernels.chunked_candidates import chunked_likeliest
from megatron_ponder.kernels.cross_entropy import chunk_rows, chunked_cross_entropy, vocab_parallel_cross_entropy
from megatron_ponder.parallel.candidates import likeliest
from megatron_ponder.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ParameterSpec, ShardedModule, normal


class LatentScale(ShardedModule):
    """Factor on hidden states that enter again as latents: a number, or learned.

    What is learned is its logarithm, so that an optimiser whose steps have one size changes it by a share of itself.

    Attributes:
        learned: whether it is.
    """

    def __init__(self, ponder: PonderConfig, axis: Axis) -> None:
        super().__init__(axis)
        self.learned, self._number = ponder.latent_scale == "learned", ponder.latent_scale
        if self.learned:
            initial = ponder.initial_latent_scale
            self.declare("log", ParameterSpec((1,), lambda tensor, _: tensor.fill_(math.log(initial))))

    def forward(self, hidden: Tensor) -> Tensor:
        """z = scale · h, in the shape and type of h; h itself where the scale is 1."""
        if self.learned:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return hidden * self.log.to(wide).exp().to(hidden.dtype)
        return hidden if self._number == 1 else hidden * self._number

    def learned_so_far(self) -> float:
        """The factor that has been learned, as latents are multiplied by it; the host waits for it."""
        return float(self.log.detach().float().exp())


class Front(NamedTuple):
    """Where tokens enter, and where hidden states enter again.

    Attributes:
        embedding: E.
        scale: c, factor on all that is learned of inputs.
        latent_scale: makes latents of hidden states.
        learned: what the mode learns besides, by its name in the model.
    """

    embedding: VocabParallelEmbedding
    scale: float
    latent_scale: LatentScale
    learned: Mapping[str, ShardedModule]

    def embed(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """e = c · E[x] in the residual stream: (...) ids → (..., H); of (..., n) ids with weights the sum over n."""
        return self.embedding(tokens, weights) * self.scale


class Head(ColumnParallelLinear):
    """Hidden states (..., H) on all tensor ranks → logits of this rank's part of the vocabulary, or losses."""

    def __init__(self, config: ModelConfig, axis: Axis, multiple: int) -> None:
        """Declare the weight; `multiple` pads this rank's part of the vocabulary."""
        super().__init__(config.hidden_size, config.vocab_size, axis, normal(config.init_std), multiple=multiple)
        self.specs["weight"] = replace(self.specs["weight"], matrix=False)  # a row for each token, as of an embedding
        self.vocab_size = config.vocab_size

    def forward(
        self, x: Tensor, labels: Tensor | None = None, count: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict; losses are a result of this module, because ZeRO 3 has its weight here only while it runs.

        Args:
            x: hidden states (..., H).
            labels: int64 (...), what they should predict; None for logits.
            count: of the likeliest tokens, if they are wanted.

        Returns:
            Logits (..., V / ranks). With labels the sum of their losses in nats, with its gradient, and the losses
            (...), without. With a count the largest logits and their ids, as `likeliest` finds them. In both cases only
            a chunk is there at a time of logits that are large.
        """
        in_chunks = x[..., 0].numel() > chunk_rows(self.weight.shape[0], self.weight.dtype)
        if count is not None and in_chunks:
            return chunked_likeliest(x, self.weight, count, self.axis, self.vocab_size)
        if count is not None:
            return likeliest(super().forward(x), count, self.axis, self.vocab_size)
        if labels is None:
            return super().forward(x)
        if in_chunks:
            return chunked_cross_entropy(x, self.weight, labels, self.axis, self.vocab_size)
        losses = vocab_parallel_cross_entropy(super().forward(x), labels, self.axis, self.vocab_size, overwrite=True)
        return losses.sum(), losses.detach()


class Back(NamedTuple):
    """Where tokens are predicted.

    Attributes:
        head: that predicts.
        axis: the tensor ranks.
        vocab_size: V.
    """

    head: Head
    axis: Axis
    vocab_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) from hidden states (..., H), both on all tensor ranks."""
        own = self.head(hidden)
        if self.axis.size > 1:
            parts = [torch.empty_like(own) for _ in range(self.axis.size)]
            dist.all_gather(parts, own.contiguous(), group=self.axis.group)
            own = torch.cat(parts, -1)
        return own[..., : self.vocab_size]

    def likeliest(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest logits and their ids, (..., n) each, from hidden states (..., H) on all tensor ranks."""
        return self.head(hidden, count=count)
