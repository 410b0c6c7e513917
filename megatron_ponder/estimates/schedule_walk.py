"""How busy a pipeline keeps its ranks: the schedules that run, played through on paper with passes of unequal length.

Symbols: P pipeline ranks, M micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from megatron_ponder.parallel.pipeline import ScheduleKind, schedule_class

# Time of a forward pass over one slot, and of its backward pass: whole, of inputs, of weights.
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
# Rounds of P micro-batches after which every further round takes as long as the one before.
WALKED_ROUNDS = {"1f1b": 2, "zero_bubble": 3}


class Action(NamedTuple):
    """What a rank computes next; `kind` is a key of `COSTS`."""

    stage: int
    kind: str
    micro_batch: int


def stages_on_paper(pipeline: int, passes: int) -> list[SimpleNamespace]:
    """One stage for each pass on the first of so many pipeline ranks, as far as a schedule looks when it is made."""
    ranks = {stage: stage % pipeline for stage in range(passes * pipeline)}
    return [
        SimpleNamespace(
            group_size=pipeline,
            group_rank=0,
            group=None,
            stage_index=index * pipeline,
            num_stages=len(ranks),
            stage_index_to_group_rank=ranks,
            is_first=index == 0,
            is_last=False,
            has_backward=True,
            submod=None,
        )
        for index in range(passes)
    ]


@cache
def orders(kind: ScheduleKind, pipeline: int, micro_batches: int, passes: int) -> dict[int, list[Action]]:
    """What every rank computes, in the order of the schedule that training builds."""
    schedule = _computations(schedule_class(kind))(stages_on_paper(pipeline, passes), micro_batches, loss_fn=max)
    return {
        rank: [Action(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a is not None]
        for rank, actions in schedule.pipeline_order.items()
    }


@cache
def _computations(base: type[PipelineScheduleMulti]) -> type[PipelineScheduleMulti]:
    """The same schedule without its sends and receives, which take most of the time in which it is made."""
    return type(f"{base.__name__}OnPaper", (base,), {"_prepare_schedule_with_comms": lambda *args, **kwargs: None})


def step_length(
    actions: Mapping[int, Sequence[Action]], duration: Callable[[Action], float], messages: Sequence[float] = ()
) -> float:
    """Time from the first action to the last: each starts when its rank is free and what it needs has arrived.

    Args:
        actions: of every rank, in order.
        duration: of an action.
        messages: how long one from each stage to the next, and back, is under way; no time unless given. Ranks compute
            while they send.

    Raises:
        ValueError: if the ranks wait for each other for ever.
    """
    last_stage = max(action.stage for own in actions.values() for action in own)
    free, finished = dict.fromkeys(actions, 0.0), {}
    waiting = {rank: list(reversed(own)) for rank, own in actions.items()}
    while waiting:
        before = len(finished)
        for rank, own in list(waiting.items()):
            while own:
                needs = _needs(own[-1], last_stage)
                if not finished.keys() >= set(needs):
                    break
                action = own.pop()
                arrived = [finished[need] + _under_way(need[1], action.stage, messages) for need in needs]
                free[rank] = finished[_result(action)] = max(free[rank], *arrived, 0.0) + duration(action)
            if not own:
                del waiting[rank]
        if len(finished) == before:
            raise ValueError(f"nothing can start of {[own[-1] for own in waiting.values()]}")
    return max(free.values())


def _under_way(sender: int, receiver: int, messages: Sequence[float]) -> float:
    return messages[min(sender, receiver)] if messages and sender != receiver else 0.0


def _result(action: Action) -> tuple[str, int, int]:
    """What others wait for: of a backward pass in two parts, the gradients of the inputs."""
    return "I" if action.kind == "B" else action.kind, action.stage, action.micro_batch


def _needs(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    kind, stage, micro_batch = _result(action)
    if kind == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [("I", stage, micro_batch)]
    return [("F", stage, micro_batch)] + ([("I", stage + 1, micro_batch)] if stage < last_stage else [])


def idle_share(
    kind: ScheduleKind, pipeline: int, micro_batches: int, plan: tuple[int, ...], message: float = 0.0
) -> float:
    """Share of a step in which ranks wait for each other, if passes take time in proportion to their slots.

    Micro-batches run in max(1, M // P) rounds. They are played through; of rounds of P only the first, because the
    others repeat the last of these. What is under way holds nothing up but what reads it.

    Args:
        kind: of schedule.
        pipeline: P.
        micro_batches: M.
        plan: slots of every pass.
        message: how long one is under way for each slot of its pass, where a forward pass over a slot takes 1.
    """
    if pipeline == 1:
        return 0.0
    rounds = max(1, micro_batches // pipeline)
    size = micro_batches // rounds
    walked = WALKED_ROUNDS[kind] + (message > 0) if size == pipeline else rounds
    whole = _length(kind, pipeline, min(rounds, walked) * size, plan, message)
    if rounds > walked:
        whole += (rounds - walked) * (whole - _length(kind, pipeline, (walked - 1) * size, plan, message))
    return 1 - (COSTS["F"] + COSTS["B"]) * sum(plan) * micro_batches / whole


@cache
def _length(kind: ScheduleKind, pipeline: int, micro_batches: int, plan: tuple[int, ...], message: float) -> float:
    every = orders(kind, pipeline, micro_batches, len(plan))
    messages = [message * plan[stage // pipeline] for stage in range(len(plan) * pipeline - 1)]
    return step_length(every, lambda action: COSTS[action.kind] * plan[action.stage // pipeline], messages)
