"""A pipeline's schedule with the sends and receives of NCCL, simulated: does it end, and how busy are its ranks?

On a GPU a rank computes on one stream, and every communicator has a stream of its own. A message starts when both ranks
have come to it: each has done what it had computed before it asked for the message, and the messages that it had asked
for before on the same stream are through. So a send waits for the receive and the receive for the send, and what
follows them on either stream waits with them.

With one communicator for the whole pipeline, as NCCL has it for unbatched sends of a group that is bound to a device,
all messages of a rank are on one stream. With one for every edge and direction, a rank has four.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from megatron_ponder.estimates.schedule_walk import COSTS, Action, stages_on_paper
from megatron_ponder.parallel.pipeline import ScheduleKind, outbox_limit, schedule_class

Streams = Literal["rank", "edge"]
SENDS = {"SEND_F": ("F", 1), "SEND_B": ("B", -1)}  # what it carries, and to which stage from the sender's
RECEIVES = {"RECV_F": ("F", 0), "RECV_B": ("B", 0)}
Node = tuple


def orders_with_messages(
    kind: ScheduleKind, ranks: int, micro_batches: int, passes: int
) -> dict[int, list[tuple[str, Action]]]:
    """What every rank does in the order of the schedule: the name of the operation, and its stage and micro-batch."""
    schedule = schedule_class(kind)(stages_on_paper(ranks, passes), micro_batches, loss_fn=max)
    return {
        rank: [
            (a.computation_type.name, Action(a.stage_index, a.computation_type.value, a.microbatch_index))
            for a in actions
            if a.is_compute_op or a.computation_type.name in {**SENDS, **RECEIVES}
        ]
        for rank, actions in schedule.pipeline_order_with_comms.items()
    }


class Simulation:
    """One step of a schedule: what waits for what, and when it ends."""

    def __init__(
        self, actions: Mapping[int, Sequence[tuple[str, Action]]], streams: Streams, limit: int | None = None
    ) -> None:
        """Find out what waits for what.

        Args:
            actions: of every rank, in order.
            streams: one for a rank, or one for an edge and direction.
            limit: sends of a rank that may be under way before it computes on; None for any number.
        """
        self._ranks, self._streams, self._limit = len(actions), streams, limit
        self._needs: dict[Node, set[Node]] = {}
        for rank, own in actions.items():
            self._follow(rank, own)

    def _follow(self, rank: int, actions: Sequence[tuple[str, Action]]) -> None:
        computed, last, sent = set(), {}, []
        for name, action in actions:
            if name not in SENDS and name not in RECEIVES:
                node = ("compute", *action)
                awaited = set(sent[: -self._limit][-1:]) if self._limit else set()
                self._needs[node] = computed | awaited | set(self._received(action))
                computed = {node}
                continue
            carried, onwards = (SENDS | RECEIVES)[name]
            node = ("message", carried, action.stage + onwards, action.micro_batch)
            stream = self._stream(carried, action.stage + onwards)
            self._needs.setdefault(node, set()).update(computed, last.get(stream, ()))
            last[stream] = {node}
            sent += [node] * (name in SENDS)

    def _stream(self, carried: str, receiver: int) -> tuple:
        return () if self._streams == "rank" else (carried, receiver % self._ranks)

    def _received(self, action: Action) -> Iterator[Node]:
        """The message that an action reads; none comes to where the schedule has none."""
        carried = {"F": "F", "B": "B", "I": "B"}.get(action.kind)
        node = ("message", carried, action.stage, action.micro_batch)
        if node in self._needs:
            yield node

    def busy_share(
        self, duration: Callable[[Action], float], under_way: Callable[[int], float] = lambda edge: 0.0
    ) -> float:
        """Share of all ranks' time, from the first action to the last, in which they compute.

        Args:
            duration: of an action.
            under_way: how long a message is between a stage and the next, by the first of the two.

        Raises:
            ValueError: if the ranks wait for each other for ever.
        """
        waiting = {node: len(needs) for node, needs in self._needs.items()}
        followers = defaultdict(list)
        for node, needs in self._needs.items():
            for need in needs:
                followers[need].append(node)
        start = dict.fromkeys(self._needs, 0.0)
        ready, end, busy, done = [node for node, count in waiting.items() if not count], 0.0, 0.0, 0
        while ready:
            node = ready.pop()
            computes = node[0] == "compute"
            _, carried, stage, _ = node
            took = duration(Action(*node[1:])) if computes else under_way(stage - 1 if carried == "F" else stage)
            busy, done, end = busy + took * computes, done + 1, max(end, start[node] + took)
            for follower in followers[node]:
                start[follower] = max(start[follower], start[node] + took)
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)
        if done < len(self._needs):
            raise ValueError(f"{len(self._needs) - done} of {len(self._needs)} actions and messages never start")
        return busy / (self._ranks * end)


def busy_share(
    kind: ScheduleKind,
    ranks: int,
    micro_batches: int,
    plan: Sequence[int],
    streams: Streams,
    message: float = 0.0,
) -> float:
    """Busy share of a training step whose passes, and messages between them, take time in proportion to their slots.

    Args:
        kind: of schedule.
        ranks: P.
        micro_batches: M.
        plan: slots of every pass.
        streams: one for a rank, or one for an edge and direction.
        message: how long one is under way for each slot of its pass, where a forward pass over a slot takes 1.

    Raises:
        ValueError: as `Simulation.busy_share`.
    """
    actions = orders_with_messages(kind, ranks, micro_batches, len(plan))
    simulation = Simulation(actions, streams, outbox_limit(ranks))
    return simulation.busy_share(
        lambda action: COSTS[action.kind] * plan[action.stage // ranks], lambda stage: message * plan[stage // ranks]
    )
