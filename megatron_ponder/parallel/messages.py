"""Messages between ranks that work on their own time: an object, with activations if there are any, or numbers."""

import pickle
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ponder.parallel.edges import Edges
from megatron_ponder.parallel.mesh import Axis


class Mailbox:
    """Sends to the next rank on a ring, and receives from the one before. Objects are pickled; ranks are of one job."""

    def __init__(self, edges: Edges, like: Tensor) -> None:
        """Exchange activations of the device and type of `like`."""
        self._edges, self._like = edges, like
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, item: Any, x: Tensor | None = None) -> None:
        """Send without waiting for the other rank.

        Args:
            item: anything that can be pickled; None for nothing.
            x: activations of two dimensions.
        """
        content = torch.empty(0, dtype=torch.uint8)
        if item is not None:
            content = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        shape = (-1, -1) if x is None else x.shape
        self._send(torch.tensor([len(content), *shape], device=self._like.device))
        self._send(content.to(self._like.device))
        if x is not None:
            self._send(x.contiguous())

    def receive(self) -> tuple[Any, Tensor | None]:
        """Wait for the next message that `send` has sent; the activations are None if there are none."""
        size, rows, columns = self._receive(torch.empty(3, dtype=torch.long, device=self._like.device)).tolist()
        content = self._receive(torch.empty(size, dtype=torch.uint8, device=self._like.device))
        x = self._receive(self._like.new_empty(rows, columns)) if rows >= 0 else None
        return pickle.loads(content.cpu().numpy().tobytes()) if size else None, x

    def send_numbers(self, numbers: Tensor) -> None:
        """Send numbers in fp64 whose count the other rank knows, without waiting for it."""
        self._send(numbers.to(self._like.device))

    def receive_numbers(self, count: int) -> Tensor:
        """Wait for so many numbers that `send_numbers` has sent."""
        return self._receive(torch.empty(count, dtype=torch.float64, device=self._like.device))

    def close(self) -> None:
        """Wait until everything is sent."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def _send(self, x: Tensor) -> None:
        if x.numel():
            group = self._edges.to_next
            self._under_way.append((dist.isend(x, group=group, group_dst=_other(group)), x))  # x must live until then
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def _receive(self, x: Tensor) -> Tensor:
        if x.numel():
            dist.recv(x, group=self._edges.from_last, group_src=_other(self._edges.from_last))
        return x


def _other(group: ProcessGroup) -> int:
    """The other rank of two."""
    return 1 - dist.get_rank(group)


def broadcast(item: Any, axis: Axis) -> Any:
    """The item of the axis' first rank, on all of its ranks."""
    if axis.size == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, group=axis.group, group_src=0)
    return items[0]
