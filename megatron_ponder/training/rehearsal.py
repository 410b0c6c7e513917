"""The start of a run on any number of ranks, and a step of it, one rank after another here and without the others.

All that a start does with other ranks is done: groups, this rank's part of the model, DeepSpeed, the pipeline and the
messages of a step. The model is narrow, its sequences are short and its micro-batches few, so that it takes seconds;
blocks, heads, passes and the grid are those of the run.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from megatron_ponder.base.counts import counted
from megatron_ponder.base.launch import Launch
from megatron_ponder.config import Config, check_layout, data_parallel_size, micro_batches, resolve
from megatron_ponder.config.layout import describe_grid, group_sizes, own_length, spoken_axes
from megatron_ponder.config.parallel import AXES
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.parallel.pretence import groups_of_this_rank, pretended_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import training_rule


@dataclass(frozen=True)
class Rehearsed:
    """What one rank has found at its start.

    Attributes:
        rank: of all.
        places: along every axis.
        groups: sizes of the process groups that it is in, each of which is a communicator on GPUs.
        samples: of every step, that it reads.
        seconds: that start and step took here.
    """

    rank: int
    places: dict[str, int]
    groups: list[int]
    samples: range
    seconds: float


def rehearse(config: Config, launch: Launch) -> Iterator[Rehearsed]:
    """Start the ranks that differ: the first and the last of all, and the first of other places in the pipeline.

    Args:
        config: resolved and validated, with a vocabulary size.
        launch: of rank 0.

    Raises:
        UserError: the layout cannot work on so many ranks.
        RuntimeError: a rank cannot start, or cannot take a step; says which, and is caused by the error.
    """
    check_layout(config, launch)
    data = data_parallel_size(config, launch.world_size)
    small = miniature(config, data)
    of_place = launch.world_size // config.parallel.pipeline
    for rank in _differing(config.parallel.pipeline, of_place):
        try:
            yield _start(config, small, launch, rank)
        except Exception as error:
            raise RuntimeError(
                f"rank {rank} of {launch.world_size}, at place {rank // of_place} of the pipeline, fails at its start"
            ) from error


def rehearsal_table(config: Config, ranks: int, rehearsed: Sequence[Rehearsed]) -> Table:
    """What ranks hold, with whom they speak, and what they read; a row for each.

    Args:
        config: of the run.
        ranks: in all.
        rehearsed: some of them.
    """
    data, training = data_parallel_size(config, ranks), config.training
    sizes = group_sizes(config.parallel, data)
    count, size = micro_batches(config, data), counted(training.micro_batch_size, "sequence")
    table = Table(
        title=f"{counted(ranks, 'rank')}: {describe_grid(sizes)}; {counted(count, 'micro-batch')} of {size} a step"
    )
    axes = spoken_axes(sizes)
    for heading in ("rank", "place", "blocks", "with", "parameters", "GiB", "groups", "samples", "seconds"):
        table.add_column(heading, no_wrap=True)
    for one in rehearsed:
        rank = Rank(config, data, one.places["pipeline"], "cuda")
        ends = ["embedding"] * rank.first + ["head"] * rank.last + ["router"] * bool(rank.part.router)
        table.add_row(
            str(one.rank),
            " ".join(str(one.places[axis]) for axis in axes),
            f"{rank.layers[0]}–{rank.layers[-1]}",
            " ".join(ends),
            f"{rank.part.count / 1e6:.1f}M",
            f"{memory_estimate(rank).total / 2**30:.2f}",
            " ".join(f"{size}" if count == 1 else f"{count}×{size}" for size, count in Counter(one.groups).items()),
            f"{one.samples[0]}–{one.samples[-1]}",
            f"{one.seconds:.1f}",
        )
    return table


def miniature(config: Config, data: int) -> Config:
    """The same run with the narrowest layers that can be divided alike, short sequences, and few micro-batches.

    Args:
        config: of the run.
        data: data-parallel ranks.
    """
    model, parallel = config.model, config.parallel
    channels = 2 * math.ceil(1 / model.rotary_fraction)  # of a head, so that two or more are rotated
    length = parallel.context * max(8, parallel.tensor)
    count = min(micro_batches(config, data), parallel.pipeline)
    small = replace(
        model,
        hidden_size=channels * model.num_heads,
        head_size=channels,
        ffn_hidden_size=2 * parallel.tensor,
        vocab_size=max(128, parallel.tensor),
        max_position_embeddings=length,
    )
    training = replace(config.training, micro_batch_size=1, global_batch_size=count * data)
    return resolve(replace(config, model=small, training=training, data=replace(config.data, sequence_length=length)))


def _differing(pipeline: int, of_place: int) -> list[int]:
    """The first ranks of the first place, of one in the middle, and of the last; and the last rank of all."""
    return sorted({0, pipeline // 2 * of_place, (pipeline - 1) * of_place, pipeline * of_place - 1})


def _start(config: Config, small: Config, launch: Launch, rank: int) -> Rehearsed:
    """Start one rank and take a step of it."""
    begun = time.perf_counter()
    with pretended_group(launch, rank) as device, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's and PyTorch's about each other
        mesh = build_mesh(device, small.parallel)
        model = build_part(small, mesh)
        initialize(model, small.training.seed)
        engine = Engine(Objective(model, small.ponder_training.gradient_passes), small, mesh)
        tokens = torch.zeros(1, own_length(small) + 1, dtype=torch.long)
        refinements = min(small.ponder_training.refinement_choices)
        rule = training_rule(0, small)
        engine.forward_backward([tokens] * micro_batches(small, mesh.data.size), refinements, rule, 0.0, 1.0)
        engine.step(0.0)
        block = config.training.global_batch_size // mesh.data.size
        return Rehearsed(
            rank,
            {axis: getattr(mesh, axis).rank for axis in AXES},
            groups_of_this_rank(),
            range(mesh.data.rank * block, (mesh.data.rank + 1) * block),
            time.perf_counter() - begun,
        )
