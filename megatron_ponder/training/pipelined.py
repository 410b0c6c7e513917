"""Forward and backward of a step, and evaluation, where pipeline ranks share the stack of blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ponder.model.packed_stages import PackedShapes, PackedStage
from megatron_ponder.model.ponder import PonderOutput
from megatron_ponder.model.router import Rule
from megatron_ponder.model.stages import PassShapes, PassStage
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.edges import build_edges
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.pipeline import ScheduleKind, build_schedule, run_step
from megatron_ponder.training.interruption import Interruption
from megatron_ponder.training.objective import Objective, PenaltyWeights


class PipelinedObjective:
    """An objective whose model is in parts.

    Every number of passes needs a schedule of its own; each is built when it is first wanted, and kept.

    Attributes:
        interruption: by which a step may be given up; None for none.
    """

    def __init__(self, objective: Objective, mesh: Mesh, dtype: torch.dtype, kind: ScheduleKind) -> None:
        """Prepare to run.

        Args:
            objective: with this rank's part of the model.
            mesh: the ranks.
            dtype: of activations.
            kind: of schedule in training.
        """
        self._objective, self._mesh, self._dtype, self._kind = objective, mesh, dtype, kind
        self._edges, self._schedules = build_edges(mesh.pipeline), {}
        self._penalty: PenaltyWeights = 0.0
        self._scale = 0.0
        self._each_step = False
        self._sums: list[Tensor] = []
        self.interruption: Interruption | None = None

    def forward_backward(
        self, micro_batches: Sequence[Tensor], refinements: int, rule: Rule, penalty: PenaltyWeights, scale: float
    ) -> Tensor:
        """All micro-batches of a step; gradients add up in the parameters.

        Args:
            micro_batches: int64 (B, L + 1) each, the same on all pipeline ranks.
            refinements: R.
            rule: how a routing is applied.
            penalty: as in `Objective.measure`.
            scale: factor on the loss.

        Returns:
            Sums of a `Tally`, the same on all pipeline ranks.
        """
        self._penalty, self._scale, self._sums = penalty, scale, []
        schedule = self._schedule(micro_batches, refinements, rule, training=True)
        tokens = torch.cat(list(micro_batches))
        last = {"target": tokens} if self._objective.model.part.last else {}
        run_step(schedule, *([tokens] if self._objective.model.part.first else []), tokens=tokens, **last)
        if self.interruption is not None:
            self.interruption.settle()
        return self._share(sum(sums.sum(0) for sums in self._sums) if self._sums else None)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Tensor], refinements: int, rule: Rule, each_step: bool) -> Tensor:
        """Evaluate as `Engine.evaluate` does, alike on all pipeline ranks; some micro-batches may be smaller."""
        part, ranks = self._objective.model.part, self._mesh.pipeline.size
        self._each_step, total = each_step, None
        size = max((len(tokens) for tokens in micro_batches), default=0)
        for start in range(0, len(micro_batches), ranks):
            group = list(micro_batches[start : start + ranks])
            # the schedule's shapes are fixed, so that what is missing is filled up and not counted
            full = [torch.cat([tokens, tokens[:1].expand(size - len(tokens), -1)]) for tokens in group]
            full += [full[0]] * (ranks - len(group))
            schedule = self._schedule(full, refinements, rule, training=False)
            tokens = torch.cat(full)
            sums = run_step(schedule, *([tokens] if part.first else []), tokens=tokens)
            if part.last:
                counted = [sums[index * size :][: len(tokens)].sum(0) for index, tokens in enumerate(group)]
                total = sum(counted) if total is None else total + sum(counted)
        return self._share(total)

    def _share(self, sums: Tensor | None) -> Tensor:
        """Tell all pipeline ranks the sums of the last."""
        if sums is None:
            steps = self._objective.model.ponder_config.steps
            sums = torch.zeros(Tally.width(steps), dtype=torch.float64, device=self._mesh.device)
        torch.distributed.all_reduce(sums, group=self._mesh.pipeline.group)
        return sums

    def _schedule(self, micro_batches: Sequence[Tensor], refinements: int, rule: Rule, training: bool):
        batch, width = micro_batches[0].shape
        packs = self._objective.packs(rule, not training and self._each_step)
        key = (refinements, len(micro_batches), batch, width, rule, training, packs)
        if key not in self._schedules:
            model, axis = self._objective.model, self._mesh.pipeline
            sizes = model.sizes(batch, width - 1)
            shapes, stage = PassShapes(model.ponder_config, refinements, sizes, rule.latents), PassStage
            if packs:
                shapes, stage = PackedShapes(model.ponder_config, refinements, sizes, model.axis), PackedStage
            finish = self._finish if training else self._measure
            self._schedules[key] = build_schedule(
                rounds=[stage(model, index, shapes, rule, finish) for index in range(len(shapes.plan))],
                carried=shapes.carried(axis.size, self._dtype),
                first_input=micro_batches[0],
                last_output=torch.empty(1) if training else torch.empty(batch, Tally.width(model.ponder_config.steps)),
                dtype=self._dtype,
                micro_batches=len(micro_batches),
                axis=axis,
                edges=self._edges,
                device=self._mesh.device,
                kind=self._kind,
                loss_function=(lambda loss, _: loss.sum()) if training else None,
                given_up=self._given_up,
            )
        return self._schedules[key]

    def _given_up(self) -> bool:
        return self.interruption is not None and self.interruption.point()

    def _finish(self, output: PonderOutput, tokens: Tensor) -> Tensor:
        loss, sums = self._objective.measure(output, tokens, self._penalty)
        self._sums.append(sums)
        return torch.stack([loss * self._scale])

    def _measure(self, output: PonderOutput, tokens: Tensor) -> Tensor:
        return self._objective.measure(output, tokens, 0.0, self._each_step)[1]
