"""One rank's part of the model, built on the `meta` device: sizes of its parameters, and of what its layers put out.

Nothing about the shape of a layer is said here; it is asked of the layer.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import nn

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.model.block import Block
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart
from megatron_ponder.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import ShardedModule, declarations


class ParameterSize(NamedTuple):
    """What one tensor rank holds of a parameter.

    Attributes:
        dims: its dimensions.
        count: numbers, padding of the vocabulary included.
        replicated: every tensor rank holds all of it.
        of_heads, matrix: as its layer declares.
        shape: of the whole.
    """

    dims: int
    count: int
    replicated: bool
    of_heads: bool
    matrix: bool
    shape: tuple[int, ...]


class Product(NamedTuple):
    """A product of slots with a weight on one tensor rank, (slots × inner) (inner × columns)."""

    inner: int
    columns: int

    @property
    def weights(self) -> int:
        """Numbers of the weight."""
        return self.inner * self.columns


@dataclass(frozen=True)
class BlockSizes:
    """One block on one tensor rank; widths are numbers of a slot.

    Attributes:
        parameters: all of them, norms and biases too.
        hidden: H.
        query, key: of all its queries, and of all its keys, which are as many values.
        query_heads, key_heads: in how many heads.
        normed_heads: of these, whose queries or keys are normed.
        rotated: channels of all queries and keys that are rotated.
        before: products up to queries, keys and values, for which every slot is wanted.
        after: the others, of the slots whose result somebody reads.
        biased_before, biased_after: width of the outputs of these that have a bias.
        expanded: of what the feed-forward layer's first products put out, and it keeps for its backward pass.
        activated: of what its last product reads.
        residual: of all outputs in the residual stream of layers with weights.
        norm_statistics, norm_workspace: as a norm declares them.
        shares_input: attention and feed-forward read the same tensor.
    """

    parameters: int
    hidden: int
    query: int
    key: int
    query_heads: int
    key_heads: int
    normed_heads: int
    rotated: int
    before: tuple[Product, ...]
    after: tuple[Product, ...]
    biased_before: int
    biased_after: int
    expanded: int
    activated: int
    residual: int
    norm_statistics: int
    norm_workspace: int
    shares_input: bool

    @property
    def sharded(self) -> int:
        """Width of all outputs inside sharded regions of layers with weights."""
        return self.query + 2 * self.key + self.normed + self.expanded

    @property
    def normed(self) -> int:
        """Width of the queries and keys that are normed."""
        return self.normed_heads * (self.query // self.query_heads)


@dataclass(frozen=True)
class PartSizes:
    """All that one tensor rank of a place in the pipeline holds.

    Attributes:
        parameters: each of them.
        block: each of its blocks, which are alike.
        router: products of the router; none where there is none.
        columns: tokens of this rank's part of the vocabulary, padding included; 0 where there is no head.
        table: parameters of the embedding or the head, of one of them.
    """

    parameters: tuple[ParameterSize, ...]
    block: BlockSizes
    router: tuple[Product, ...]
    columns: int
    table: int

    @cached_property
    def count(self) -> int:
        """N."""
        return sum(parameter.count for parameter in self.parameters)

    @cached_property
    def counts(self) -> Counter[tuple[int, bool]]:
        """Numbers of parameters with so many dimensions that are matrices of blocks, or are not."""
        counts: Counter[tuple[int, bool]] = Counter()
        for parameter in self.parameters:
            counts[parameter.dims, parameter.matrix] += parameter.count
        return counts

    @cached_property
    def matrices(self) -> tuple[ParameterSize, ...]:
        """Those of blocks."""
        return tuple(parameter for parameter in self.parameters if parameter.matrix)


@cache
def part_sizes(
    model: ModelConfig,
    ponder: PonderConfig,
    tensor: int = 1,
    part: ModelPart | None = None,
    vocab_multiple: int = 1,
) -> PartSizes:
    """Sizes of what a rank holds; by default of a whole model in one process.

    Args:
        model, ponder: sections of a resolved configuration, with a vocabulary size.
        tensor: tensor ranks.
        part: of the pipeline rank.
        vocab_multiple: as in `ParallelConfig`.
    """
    with torch.device("meta"):
        built = PonderLM(model, ponder, Mesh(tensor=Axis(tensor)), part=part, vocab_multiple=vocab_multiple)
    parameters = tuple(
        ParameterSize(
            parameter.dim(), parameter.numel(), spec.shard_dim is None, spec.of_heads, spec.matrix, spec.shape
        )
        for _, parameter, spec, _ in declarations(built)
    )
    table = built.head or built.embedding
    return PartSizes(
        parameters,
        _block_sizes(next(iter(built.transformer.blocks.values())), model.rotated_channels),
        () if built.router is None else tuple(_products(built.router)),
        0 if built.head is None else built.head.weight.shape[0],
        0 if table is None else table.weight.numel(),
    )


def _block_sizes(block: Block, rotated: int) -> BlockSizes:
    attention, feed_forward, norm = block.attention, block.mlp, block.attention_norm
    query, key = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    layers = [layer for layer in block.modules() if "weight" in getattr(layer, "specs", ())]
    residual = [
        layer for layer in layers if not (isinstance(layer, ColumnParallelLinear) or layer.specs["weight"].of_heads)
    ]
    heads = (query // attention.head_size, key // attention.head_size)
    return BlockSizes(
        parameters=sum(parameter.numel() for parameter in block.parameters()),
        hidden=norm.weight.numel(),
        query=query,
        key=key,
        query_heads=heads[0],
        key_heads=heads[1],
        normed_heads=0 if attention.q_norm is None else sum(heads),
        rotated=rotated * sum(heads),
        before=tuple(_products(attention, ColumnParallelLinear)),
        after=tuple(_products(attention, RowParallelLinear) + _products(feed_forward)),
        biased_before=_biased(attention, ColumnParallelLinear),
        biased_after=_biased(attention, RowParallelLinear) + _biased(feed_forward),
        expanded=sum(product.columns for product in _products(feed_forward, ColumnParallelLinear)),
        activated=feed_forward.down_proj.weight.shape[1],
        residual=sum(layer.weight.shape[0] for layer in residual),
        norm_statistics=norm.STATISTICS,
        norm_workspace=norm.WORKSPACE,
        shares_input=block.parallel_residual,
    )


def _products(module: nn.Module, kind: type[ShardedModule] = ShardedModule) -> list[Product]:
    """Of all layers of a kind inside a module, in order."""
    return [Product(*reversed(layer.weight.shape)) for layer in _matrices(module, kind)]


def _biased(module: nn.Module, kind: type[ShardedModule] = ShardedModule) -> int:
    return sum(layer.weight.shape[0] for layer in _matrices(module, kind) if "bias" in layer.specs)


def _matrices(module: nn.Module, kind: type[ShardedModule]) -> list[ShardedModule]:
    layers = (layer for layer in module.modules() if isinstance(layer, kind) and "weight" in layer.specs)
    return [layer for layer in layers if layer.weight.dim() == 2]
