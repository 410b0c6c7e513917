"""Linear layers and embedding, split over the tensor ranks."""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import leave
from megatron_ponder.parallel.sharding import Initializer, ParameterSpec, ShardedModule, constant


class ParallelLinear(ShardedModule):
    """What both kinds of linear layer compute on each rank by itself."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + bias with this rank's part of W."""
        return F.linear(x, self.weight, bias)


class ColumnParallelLinear(ParallelLinear):
    """y = x Wᵀ + b with the output features split: (..., in) → (..., out / ranks).

    Layers that read the same x share one `regions.enter`, which is therefore their caller's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axis: Axis,
        initialize: Initializer,
        bias: bool = False,
        multiple: int = 0,
    ) -> None:
        """Declare the parameters; `multiple` pads this rank's output features, as in `ParameterSpec`."""
        super().__init__(axis)
        spec = ParameterSpec((out_features, in_features), initialize, shard_dim=0, multiple=multiple, matrix=True)
        self.declare("weight", spec)
        if bias:
            self.declare("bias", ParameterSpec((out_features,), constant(0.0), shard_dim=0))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's output features (..., out / ranks) of x (..., in), which is the same on every rank."""
        return self.product(x, self.bias)


class RowParallelLinear(ParallelLinear):
    """y = x Wᵀ + b with the input features split: (..., in / ranks) → (..., out), summed over the ranks."""

    def __init__(
        self, in_features: int, out_features: int, axis: Axis, initialize: Initializer, bias: bool = False
    ) -> None:
        super().__init__(axis)
        self.declare("weight", ParameterSpec((out_features, in_features), initialize, shard_dim=1, matrix=True))
        if bias:
            self.declare("bias", ParameterSpec((out_features,), constant(0.0)))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, tokens: int) -> Tensor:
        """Sum over the ranks, which leaves the sharded region.

        Args:
            x: (B, slots, in / ranks), this rank's features.
            tokens: L, that the slots belong to.

        Returns:
            (B, slots, out) in the residual stream.
        """
        if self.axis.size == 1:
            return self.product(x, self.bias)
        y = leave(self.product(x, None), self.axis, tokens)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(ShardedModule):
    """Rows of the table split over the ranks: ids (B, L) → vectors (B, L, hidden)."""

    def __init__(
        self, vocab_size: int, hidden_size: int, axis: Axis, initialize: Initializer, multiple: int = 0
    ) -> None:
        """Declare the table; `multiple` pads this rank's rows, as in `ParameterSpec`."""
        super().__init__(axis)
        spec = ParameterSpec((vocab_size, hidden_size), initialize, shard_dim=0, multiple=multiple)
        self.declare("weight", spec)

    def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Look up, or mix, rows of the table.

        Args:
            ids: int64 (B, L), or any shape without sequence parallelism; with weights (B, L, n).
            weights: of the rows in a sum over n, the same shape and on every rank the same; their gradient is that of
                this rank's rows.

        Returns:
            (B, L, hidden) in the residual stream.
        """
        if self.axis.size == 1:
            return self._rows(ids, weights)
        rows = self.weight.shape[0]
        local = ids - rows * self.axis.rank
        elsewhere = (local < 0) | (local >= rows)
        local = local.masked_fill(elsewhere, 0)
        if weights is None:
            return leave(self._rows(local).masked_fill(elsewhere.unsqueeze(-1), 0), self.axis, ids.shape[-1])
        return leave(self._rows(local, weights.masked_fill(elsewhere, 0)), self.axis, ids.shape[-2])

    def _rows(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return F.embedding(ids, self.weight)
        weights = weights.to(self.weight.dtype).flatten(0, -2)
        mixed = F.embedding_bag(ids.flatten(0, -2), self.weight, per_sample_weights=weights, mode="sum")
        return mixed.unflatten(0, ids.shape[:-1])
