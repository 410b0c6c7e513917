"""The table that a run prints when it starts: who holds what."""

from collections.abc import Iterable

from megatron_ponder.base.counts import counted
from megatron_ponder.config import Config
from megatron_ponder.config.layout import describe_grid, group_sizes
from megatron_ponder.estimates.activations import most_in_flight
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank, plan_of

GIB = 2**30


def describe_layout(config: Config, data: int, device: str) -> str:
    """What is printed when training starts: the grid of ranks, the step, and a line for each place in the pipeline.

    Args:
        config: resolved, with a vocabulary size.
        data: data-parallel ranks.
        device: `cpu` or `cuda`.
    """
    parallel, training, tokens = config.parallel, config.training, config.data.sequence_length
    ranks = [Rank(config, data, place, device) for place in range(parallel.pipeline)]
    count, sequences = ranks[0].micro_batches, training.global_batch_size
    slots = sequences * tokens * config.ponder.steps
    plans = [plan_of(config, r) for r in config.ponder_training.refinement_choices]
    grid = group_sizes(parallel, data)
    flags = [f"ZeRO {parallel.zero_stage}", training.precision]
    flags += ["sequence parallel"] if parallel.sequence_parallel else []
    flags += [f"recompute {training.recompute}"] if training.recompute != "none" else []
    flags += [f"optimiser on {parallel.offload_optimizer}"] if parallel.offload_optimizer != "none" else []
    flags += [parallel.pipeline_schedule] if parallel.pipeline > 1 else []
    lines = [
        f"{counted(grid['model'] * grid['copies'], 'rank')}: {describe_grid(grid)}; {', '.join(flags)}",
        f"a step: {counted(sequences, 'sequence')}, {counted(sequences * tokens, 'token')}, "
        f"{counted(slots, 'latent slot')}",
        f"a micro-batch: {counted(training.micro_batch_size, 'sequence')}, {_span(map(len, plans), 'pass')} of "
        f"{_span(map(sum, plans), 'slot')} a token",
        f"each data rank: {counted(count, 'micro-batch')}{_in_flight(ranks)}",
        "",
        f"{'pipeline':>8} {'blocks':>7} {'with':<18} {'parameters':>10} │ expected peak of tensors, GiB a rank",
        f"{'rank':>8} {'':>7} {'':<18} {'a rank':>10} │ {'weights':>7} {'grads':>5} {'optim':>5} {'activ.':>6} "
        f"{'other':>5} {'total':>6}",
    ]
    for rank in ranks:
        memory, layers = memory_estimate(rank), rank.layers
        also = ["embedding"] * rank.first + ["head"] * rank.last
        also += ["router"] * bool(rank.part.router)
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.other, memory.total)
        shown = " ".join(f"{size / GIB:{width}.2f}" for size, width in zip(sizes, (7, 5, 5, 6, 5, 6), strict=True))
        lines.append(
            f"{rank.pipeline_rank:>8} {f'{layers[0]}–{layers[-1]}':>7} {' '.join(also):<18} "
            f"{rank.part.count / 1e6:>9.1f}M │ {shown}"
        )
    return "\n".join(lines)


def _in_flight(ranks: list[Rank]) -> str:
    """How many forward passes wait for their backward pass at most, on the first and the last rank of a pipeline."""
    if len(ranks) == 1:
        return ""
    first, last = (most_in_flight(rank, [1.0] * len(rank.plan)) for rank in (ranks[0], ranks[-1]))
    return f", {last:.0f} to {first:.0f} forward passes in flight on a pipeline rank"


def _span(numbers: Iterable[int], noun: str) -> str:
    least, *_, most = sorted([*numbers] * 2)
    return f"{least} to " * (least < most) + counted(most, noun)
