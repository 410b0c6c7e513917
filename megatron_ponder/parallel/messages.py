"""Messages between ranks that work on their own time: an object, with activations if there are any."""

import pickle
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis


class Mailbox:
    """Sends and receives along one axis of the grid. Objects are pickled; all ranks are of one job."""

    def __init__(self, axis: Axis, like: Tensor) -> None:
        """Exchange activations of the device and type of `like`."""
        self._axis, self._like = axis, like
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, to: int, item: Any, x: Tensor | None = None) -> None:
        """Send without waiting for the other rank.

        Args:
            to: rank along the axis.
            item: anything that can be pickled.
            x: activations of two dimensions.
        """
        content = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(self._like.device)
        shape = (-1, -1) if x is None else x.shape
        header = torch.tensor([len(content), *shape], device=self._like.device)
        for tensor in (header, content) if x is None or x.numel() == 0 else (header, content, x.contiguous()):
            work = dist.isend(tensor, group=self._axis.group, group_dst=to)
            self._under_way.append((work, tensor))  # a buffer must live until it is sent
        while self._under_way and self._under_way[0][0].is_completed():
            self._under_way.popleft()

    def receive(self, source: int) -> tuple[Any, Tensor | None]:
        """Wait for the next message of a rank along the axis; the activations are None if there are none."""
        header = torch.empty(3, dtype=torch.long, device=self._like.device)
        dist.recv(header, group=self._axis.group, group_src=source)
        size, rows, columns = header.tolist()
        content = torch.empty(size, dtype=torch.uint8, device=self._like.device)
        dist.recv(content, group=self._axis.group, group_src=source)
        x = None
        if rows >= 0:
            x = self._like.new_empty(rows, columns)
            if x.numel():
                dist.recv(x, group=self._axis.group, group_src=source)
        return pickle.loads(content.cpu().numpy().tobytes()), x

    def broadcast(self, item: Any) -> Any:
        """The item of the axis' first rank, on all of its ranks."""
        if self._axis.size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, group=self._axis.group, group_src=0)
        return items[0]

    def close(self) -> None:
        """Wait until everything is sent."""
        while self._under_way:
            self._under_way.popleft()[0].wait()
