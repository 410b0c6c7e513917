"""The loss on samples that nothing is learnt from, while training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config import Config
from megatron_ponder.config.layout import own_length
from megatron_ponder.data.dataset import Share
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.data.mixture import Samples
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.careful_reader import CarefulReader
from megatron_ponder.training.deepspeed_engine import Engine

# Refinements that stand for the fixed point where ranks share a model, of which each can sweep over all of it alone.
DEEP = 32


class Validation:
    """Measures cross-entropy and steps on the first held-out samples, with the largest R of training.

    Between micro-batches the ranks agree on whether to stop.
    """

    def __init__(
        self, config: Config, mesh: Mesh, dataset: Samples, engine: Engine, boundary: Boundary, watchdog: Watchdog
    ) -> None:
        """Prepare.

        Args:
            config: resolved.
            mesh: the ranks.
            dataset: whose first samples are looked at.
            engine: that evaluates.
            boundary: where the ranks agree.
            watchdog: told of every micro-batch.
        """
        self._config, self._mesh, self._dataset, self._engine = config, mesh, dataset, engine
        self._boundary, self._watchdog = boundary, watchdog
        self._refinements = config.ponder_training.evaluation_refinements
        self._count = min(config.training.eval_samples, dataset.samples_per_epoch)

    def run(self, rule: Rule) -> tuple[Tally, Tally] | None:
        """Measure under the rule of training, and what pruning would make of it.

        Returns:
            Tallies under the rule, with what every step predicts by itself, and under its hard form, which is the same
            where nothing is pruned softly; None if the ranks are to stop.

        Raises:
            UserError: on every rank, if a sample cannot be read on any.
        """
        pruned = tally = self.measure(rule, each_step=rule.latents)
        if tally is not None and passes_of(self._config.ponder).routed and rule.kind == "soft":
            pruned = self.measure(replace(rule, kind="hard"), each_step=False)
        return None if pruned is None else (tally, pruned)

    def measure(self, rule: Rule, each_step: bool) -> Tally | None:
        """Measure one tally, as `run` does two.

        Args:
            rule: how a routing is applied.
            each_step: measure also what every step predicts by itself.
        """
        return self._measure(rule, self._refinements, self._count, each_step)

    def run_exact(self, rule: Rule) -> tuple[Tally, Tally] | None:
        """Measure the first samples by the fixed point, as the model decodes, and with the largest R of training.

        Where ranks share a model, `DEEP` refinements stand for the fixed point.

        Args:
            rule: how a routing is applied; there are latent steps, and passes that are iterated.

        Returns:
            Tallies of the fixed point and of training's R; None if the ranks are to stop.

        Raises:
            UserError: as `run`.
        """
        count = min(self._config.training.exact_samples, self._count)
        shared = self._mesh.model.size > 1 or self._mesh.context.size > 1 or self._engine.shares_weights
        trained = self._measure(rule, self._refinements, count, each_step=False)
        exact = None if trained is None else self._measure(rule, DEEP if shared else None, count, each_step=False)
        return None if exact is None else (exact, trained)

    def _measure(self, rule: Rule, refinements: int | None, count: int, each_step: bool) -> Tally | None:
        """Measure the first `count` samples, with R refinements or, where that is None, by `exact`."""
        mesh, size, vocab_size = self._mesh, self._config.training.micro_batch_size, self._config.model.vocab_size
        share = Share(mesh.context.rank, mesh.context.size)
        own = validation_batches(self._dataset, count, size, mesh.data.rank, mesh.data.size, vocab_size, share)
        rounds = math.ceil(math.ceil(count / mesh.data.size) / size)
        at_once = mesh.pipeline.size  # micro-batches that fill a pipeline
        groups = iter(lambda: list(islice(own, at_once)), None)
        reader, sums = CarefulReader((size, own_length(self._config) + 1)), 0
        for first in range(0, rounds, at_once):
            micro_batches = reader.read(groups, 1)
            self._watchdog.beat()
            if self._boundary.poll(reader.problem):
                return None
            micro_batches = [tokens.to(mesh.device) for tokens in micro_batches]
            sums = sums + self._engine.evaluate(
                micro_batches, min(at_once, rounds - first), refinements, rule, each_step
            )
        return _over_copies(sums, mesh)


def measure_each_step(
    mesh: Mesh, engine: Engine, micro_batches: Sequence[Tensor], refinements: int, rule: Rule
) -> Tally:
    """Measure what every latent step predicts by itself, on an eighth of a micro-batch of a training step.

    Of as many micro-batches as there are pipeline ranks. Apart from the training step, whose memory and communication
    it leaves as they are; so few sequences that it takes next to no time.

    Args:
        mesh: the ranks.
        engine: that evaluates.
        micro_batches: of this data-parallel rank in the training step, int64 (B, L + 1) each.
        refinements: R.
        rule: of the training step.
    """
    first = [tokens[: math.ceil(len(tokens) / 8)] for tokens in micro_batches[: mesh.pipeline.size]]
    return _over_copies(engine.evaluate(first, len(first), refinements, rule, each_step=True), mesh)


def _over_copies(sums: Tensor, mesh: Mesh) -> Tally:
    if mesh.copies.size > 1:
        dist.all_reduce(sums, group=mesh.copies.group)
    return Tally.of(sums)
