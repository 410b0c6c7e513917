"""The two ends of a model, between which its blocks lie: where tokens enter, and where tokens are predicted.

The first pipeline rank has the front, the last one the back.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from megatron_ponder.parallel.candidates import likeliest
from megatron_ponder.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ShardedModule


class Front(NamedTuple):
    """Where tokens enter.

    Attributes:
        embedding: E.
        scale: c, factor on all that is learned of inputs.
        learned: what the mode learns besides, by its name in the model.
    """

    embedding: VocabParallelEmbedding
    scale: float
    learned: Mapping[str, ShardedModule]

    def embed(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """e = c · E[x] in the residual stream: (...) ids → (..., H); of (..., n) ids with weights the sum over n."""
        return self.embedding(tokens, weights) * self.scale


class Back(NamedTuple):
    """Where tokens are predicted.

    Attributes:
        head: hidden states (..., H) on all tensor ranks → logits of this rank's part of the vocabulary.
        axis: the tensor ranks.
        vocab_size: V.
    """

    head: ColumnParallelLinear
    axis: Axis
    vocab_size: int

    def likeliest(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest logits and their ids, (..., n) each, from hidden states (..., H) on all tensor ranks."""
        return likeliest(self.head(hidden), count, self.axis, self.vocab_size)
