"""Which numbers of every parameter a data rank updates, and which ranks have the others."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ParameterSpec


class ParameterPiece(NamedTuple):
    """What one data rank updates of a parameter.

    Attributes:
        spec: declaration of the parameter.
        shape: of what this tensor rank holds of it.
        holder: the tensor, perhaps of several parameters, in which the optimiser has them.
        place: of this rank's numbers in that tensor, flattened.
        shares: the numbers of each data rank that has some, among those of this tensor rank, flattened; by its rank.
    """

    spec: ParameterSpec
    shape: tuple[int, ...]
    holder: Tensor
    place: slice
    shares: Mapping[int, slice]

    def of(self, tensor: Tensor) -> Tensor:
        """This rank's numbers in a tensor like `holder`, (numbers,)."""
        return tensor.detach().view(-1)[self.place]


def whole_pieces(
    parameters: Sequence[Tensor], specs: Sequence[ParameterSpec], copies: Axis
) -> Iterator[ParameterPiece]:
    """The pieces of parameters that every data rank updates whole.

    Args:
        parameters: what this tensor rank holds of them.
        specs: their declarations.
        copies: the data ranks.
    """
    for parameter, spec in zip(parameters, specs, strict=True):
        everything = slice(0, parameter.numel())
        yield ParameterPiece(spec, tuple(parameter.shape), parameter, everything, {copies.rank: everything})


def partitioned_pieces(
    flat: Tensor, specs: Sequence[ParameterSpec], tensor: Axis, copies: Axis
) -> Iterator[ParameterPiece]:
    """The pieces of parameters that lie one behind the other, of which each data rank updates an equal share.

    Args:
        flat: this rank's share, of the last ranks with padding.
        specs: declarations of the parameters, in their order.
        tensor, copies: the ranks.
    """
    size, begin = flat.numel(), 0
    for spec in specs:
        shape = spec.part_shape(tensor)
        end = begin + math.prod(shape)
        shares = {
            rank: slice(max(begin, rank * size) - begin, min(end, (rank + 1) * size) - begin)
            for rank in range(begin // size, (end - 1) // size + 1)
        }
        if copies.rank in shares:
            start = max(0, begin - copies.rank * size)
            own = shares[copies.rank]
            yield ParameterPiece(spec, shape, flat, slice(start, start + own.stop - own.start), shares)
        begin = end


def exchange(parts: Sequence[tuple[ParameterPiece, Tensor]], copies: Axis) -> None:
    """Fill tensors, of which each rank has set its share, with the shares of the others; a collective of data ranks.

    Args:
        parts: pieces of parameters that this rank shares with others, with what is exchanged of each, (numbers,).
        copies: the data ranks.
    """
    messages = []
    for piece, part in parts:
        for rank, share in piece.shares.items():
            if rank != copies.rank:
                own = part[piece.shares[copies.rank]]
                messages.append(dist.P2POp(dist.isend, own, group=copies.group, group_peer=rank))
                messages.append(dist.P2POp(dist.irecv, part[share], group=copies.group, group_peer=rank))
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
