"""The loss on samples that nothing is learnt from, while training."""

import math
from collections.abc import Sequence
from itertools import islice

import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config import Config
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.careful_reader import CarefulReader
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.setup import RunParts


def validate(
    config: Config,
    mesh: Mesh,
    parts: RunParts,
    engine: Engine,
    rule: Rule,
    boundary: Boundary,
    watchdog: Watchdog,
    each_step: bool,
) -> Tally | None:
    """Cross-entropy and steps on the first validation samples, with the largest R of training.

    Between micro-batches the ranks agree on whether to stop.

    Args:
        config: resolved.
        mesh: the ranks.
        parts: of the run, with a validation part.
        engine: that evaluates.
        rule: how a routing is applied.
        boundary: where the ranks agree.
        watchdog: told of every micro-batch.
        each_step: measure also what every step predicts by itself.

    Returns:
        None if they are to.

    Raises:
        UserError: on every rank, if a sample cannot be read on any.
    """
    dataset, size = parts.datasets["valid"], config.training.micro_batch_size
    count = min(config.training.eval_samples, dataset.samples_per_epoch)
    r = config.ponder_training.evaluation_refinements
    own = validation_batches(dataset, count, size, mesh.data.rank, mesh.data.size, config.model.vocab_size)
    rounds = math.ceil(math.ceil(count / mesh.data.size) / size)
    at_once = mesh.pipeline.size  # micro-batches that fill a pipeline
    groups = iter(lambda: list(islice(own, at_once)), None)
    reader, sums = CarefulReader((size, config.data.sequence_length + 1)), 0
    for first in range(0, rounds, at_once):
        micro_batches = reader.read(groups, 1)
        watchdog.beat()
        if boundary.poll(reader.problem):
            return None
        micro_batches = [tokens.to(mesh.device) for tokens in micro_batches]
        sums = sums + engine.evaluate(micro_batches, min(at_once, rounds - first), r, rule, each_step)
    return _over_data_ranks(sums, mesh)


def measure_each_step(
    mesh: Mesh, engine: Engine, micro_batches: Sequence[Tensor], refinements: int, rule: Rule
) -> Tally:
    """What every step predicts by itself, on the first sequences of a training step: an eighth of a micro-batch.

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
    return _over_data_ranks(engine.evaluate(first, len(first), refinements, rule, each_step=True), mesh)


def _over_data_ranks(sums: Tensor, mesh: Mesh) -> Tally:
    if mesh.data.size > 1:
        dist.all_reduce(sums, group=mesh.data.group)
    return Tally.of(sums)
