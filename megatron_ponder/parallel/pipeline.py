"""A ring of pipeline ranks that a micro-batch goes round several times, as virtual stages of PyTorch's schedules.

Stage r · P + p is round r on rank p of P. All stages of a rank run the same weights, so gradients are never divided by
the number of micro-batches here: that would divide shared weights once a round.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import P2POp, ProcessGroup, Work
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, ScheduleInterleavedZeroBubble

from megatron_ponder.parallel.edges import Edges
from megatron_ponder.parallel.mesh import Axis

ScheduleKind = Literal["1f1b", "zero_bubble"]


class _Outbox:
    """What one rank is sending; PyTorch's schedules hold on to all that a step sends until its end.

    To wait for an old send cannot block for ever: the action table has its receive at the same place as the send, so
    that nothing after the send is needed for it, and each edge and direction has a group of its own.
    """

    def __init__(self, limit: int) -> None:
        """Allow so many sends under way."""
        self._limit = limit
        self._works: deque[Work] = deque()

    def send(self, operations: list[P2POp]) -> None:
        for operation in operations:
            self._works.append(dist.isend(operation.tensor, group=operation.group, group_dst=operation.group_peer))
        self.wait(self._limit)

    def wait(self, at_most: int = 0) -> None:
        """Wait until no more than so many are under way."""
        while len(self._works) > at_most:
            self._works.popleft().wait()


def outbox_limit(ranks: int) -> int:
    """Sends of a rank that may be under way in a pipeline of so many ranks."""
    return 2 * ranks


class _Stage(PipelineStage):
    """A stage that holds what it sends and receives no longer than it is needed.

    PyTorch's own stage keeps a receive buffer for every micro-batch from step to step, which would be as much memory as
    all rounds of all micro-batches send.
    """

    def __init__(
        self, *args, edges: Edges, outbox: _Outbox, given_up: Callable[[], bool], output: Tensor, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.outbox, self._edges, self._given_up, self._output = outbox, edges, given_up, output

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        return torch.ones(1)  # shapes are known everywhere, and nobody has to be asked

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.ones(1)

    def _get_init_p2p_neighbors_ops(self) -> list[P2POp]:
        return []

    def _prepare_forward_infra(self, *args, **kwargs):
        result = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            _forget(infos)
        return result

    def _prepare_backward_infra(self, *args, **kwargs):
        result = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            _forget(infos)
        return result

    def clear_runtime_states(self) -> None:
        self.outbox.wait()
        super().clear_runtime_states()

    def get_fwd_recv_ops(self, chunk: int) -> list[P2POp]:
        _allocate(self.args_recv_info[chunk], self.device)
        return _through(self._edges.from_last, super().get_fwd_recv_ops(chunk))

    def get_bwd_recv_ops(self, chunk: int) -> list[P2POp]:
        if self.has_backward:
            _allocate(self.grad_recv_info.get(chunk, ()), self.device)
        return _through(self._edges.from_next, super().get_bwd_recv_ops(chunk))

    def get_fwd_send_ops(self, chunk: int) -> list[P2POp]:
        self.outbox.send(_through(self._edges.to_next, super().get_fwd_send_ops(chunk)))
        if not self.has_backward:
            del self.fwd_cache[chunk]
        return []  # nothing is left to send

    def get_bwd_send_ops(self, chunk: int) -> list[P2POp]:
        self.outbox.send(_through(self._edges.to_last, super().get_bwd_send_ops(chunk)))
        return []

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if not self._given_up():
            return super().forward_maybe_with_nosync(*args, **kwargs)
        zeros = torch.zeros(self._output.shape, dtype=self._output.dtype, device=self.device)
        # A graph, as the schedule wants, through none of the numbers: 0 times what is none would be none, and a later
        # stage may read ids of tokens in it.
        return zeros.requires_grad_() if self.is_first else zeros + args[0].flatten()[:0].sum()

    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False):
        if backward_type == "weight":  # of one that has been passed already
            skipped = bwd_kwargs["param_groups"] is None
        else:
            skipped = self._given_up()
        if not skipped:
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        return tuple(torch.zeros_like(x) if x.requires_grad else None for x in bwd_kwargs.get("input_values", ())), None

    def forward_one_chunk(self, chunk: int, *args, **kwargs):
        output = super().forward_one_chunk(chunk, *args, **kwargs)
        _forget(self.args_recv_info[chunk])  # autograd, or nobody, needs it from here on
        return output

    def backward_one_chunk(self, chunk: int, *args, **kwargs) -> None:
        super().backward_one_chunk(chunk, *args, **kwargs)
        _forget(self.grad_recv_info.get(chunk, ()))


def _through(group: ProcessGroup, operations: list[P2POp]) -> list[P2POp]:
    """The same messages in another group."""
    return [P2POp(operation.op, operation.tensor, operation.peer, group) for operation in operations]


def _allocate(infos, device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.tensor_meta is not None:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def _forget(infos) -> None:
    for info in infos:
        if not info.is_root_arg:
            info.buffer = None


def schedule_class(kind: ScheduleKind) -> type[PipelineScheduleMulti]:
    """PyTorch's schedule of that name."""
    return ScheduleInterleaved1F1B if kind == "1f1b" else ScheduleInterleavedZeroBubble


def build_schedule(
    rounds: Sequence[nn.Module],
    carried: Sequence[int],
    first_input: Tensor,
    last_output: Tensor,
    dtype: torch.dtype,
    micro_batches: int,
    axis: Axis,
    edges: Edges,
    device: torch.device,
    kind: ScheduleKind,
    loss_function: Callable[[Tensor, Tensor], Tensor] | None,
    given_up: Callable[[], bool] = lambda: False,
) -> PipelineScheduleMulti:
    """The schedule of one rank; all ranks of the ring build theirs with the same arguments but for `rounds`.

    Args:
        rounds: what this rank runs in each round, which may return no view; called with the packed tensor received (the
            first stage of all with `first_input`) and with the keyword arguments of the step.
        carried: numbers in the packed tensor between consecutive stages, one fewer than there are stages.
        first_input: a tensor like a micro-batch's.
        last_output: a tensor like what the last stage returns.
        dtype: of the packed tensors.
        micro_batches: in a step.
        axis: the pipeline ranks.
        edges: groups of neighbours among them.
        device: of this rank.
        kind: of schedule; `zero_bubble` computes gradients of weights apart from those of activations, later.
        loss_function: of the last stage's output and the micro-batch's target; None for forward passes only.
        given_up: asked before every computation, as often on all ranks of the ring: whether it need not be done, since
            nobody wants the result of the step any more.
    """
    count = len(rounds) * axis.size
    grad = loss_function is not None
    between = [torch.empty(size, dtype=dtype, device="meta", requires_grad=grad) for size in carried]
    ends = [first_input.to("meta"), *between, last_output.to("meta").requires_grad_(grad)]
    outbox = _Outbox(outbox_limit(axis.size))
    stages = [
        _Stage(
            module,
            index,
            count,
            device,
            input_args=ends[index],
            output_args=ends[index + 1],
            group=axis.group,
            edges=edges,
            outbox=outbox,
            given_up=given_up,
            output=ends[index + 1],
        )
        for index, module in zip(range(axis.rank, count, axis.size), rounds, strict=True)
    ]
    schedule = schedule_class(kind if grad else "1f1b")
    return schedule(stages, micro_batches, loss_fn=loss_function, scale_grads=False)


def run_step(schedule: PipelineScheduleMulti, *args: Tensor, **kwargs: Tensor) -> Tensor | None:
    """One step of a schedule that `build_schedule` has made, until all is sent that the other ranks wait for.

    Arguments and result are those of the schedule's `step`.
    """
    result = schedule.step(*args, **kwargs)
    schedule._stages[0].outbox.wait()
    return result


def pack(x: Tensor, log_w: Tensor | None) -> Tensor:
    """One flat tensor of x's type from activations and log weights, for the journey between two stages.

    One, because pipeline stages exchange one contiguous buffer each way. The log weights travel bit by bit in the slots
    of a possibly narrower type, and so do their gradients back: in bf16, rounding would lose the router's tail.
    """
    return x.flatten().clone() if log_w is None else _Pack.apply(x, log_w)  # stages detach outputs, views cannot be


def unpack(packed: Tensor, x_shape: Sequence[int], log_w_shape: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
    """What was packed; log weights are fp32, or fp64 where everything is."""
    if log_w_shape is None:
        return packed.view(*x_shape), None
    return _Unpack.apply(packed, tuple(x_shape), tuple(log_w_shape))


def packed_size(x_shape: Sequence[int], log_w_shape: Sequence[int] | None, dtype: torch.dtype) -> int:
    """Numbers of the given type in the packed tensor."""
    size = torch.Size(x_shape).numel()
    return (
        size
        if log_w_shape is None
        else size + torch.Size(log_w_shape).numel() * _wide(dtype).itemsize // dtype.itemsize
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _join(x: Tensor, log_w: Tensor) -> Tensor:
    return torch.cat([x.flatten(), log_w.contiguous().flatten().view(x.dtype)])


def _split(packed: Tensor, x_shape: Sequence[int], log_w_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    size = torch.Size(x_shape).numel()
    log_w = packed[size:].clone().view(_wide(packed.dtype))  # a clone is aligned for the wider type
    return packed[:size].view(*x_shape), log_w.view(*log_w_shape)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, log_w: Tensor) -> Tensor:
        assert log_w.dtype == _wide(x.dtype)
        ctx.shapes = x.shape, log_w.shape
        return _join(x, log_w)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _split(grad, *ctx.shapes)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, x_shape: tuple[int, ...], log_w_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return _split(packed, x_shape, log_w_shape)

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_log_w: Tensor) -> tuple[Tensor, None, None]:
        return _join(grad_x, grad_log_w), None, None
