"""How layers, batch and ranks divide, and the nearest layout that works where they do not."""

import math
from collections.abc import Mapping
from itertools import accumulate, product

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.config.batch_sizes import batch_sizes
from megatron_ponder.config.model import ModelConfig
from megatron_ponder.config.parallel import AXES, DIVIDED, MODEL_AXES, ParallelConfig
from megatron_ponder.config.sections import Config

# Groups of ranks, by the axes along which they lie: each axis; `model`, the ranks that hold one copy of the model; and
# `copies`, those that hold the same part of it.
GROUPS = {axis: (axis,) for axis in AXES} | {
    "model": MODEL_AXES,
    "copies": tuple(axis for axis in AXES if axis not in MODEL_AXES),
}
# Axes whose size is configured; ranks along them work on one sample.
CONFIGURED = tuple(axis for axis in AXES if axis != "data")


# Axes that are not spoken of, and have no group, where nobody lies along them.
RARE = ("context",)


def spoken_axes(sizes: Mapping[str, int]) -> list[str]:
    """The axes of a grid of these sizes that are worth a word."""
    return [axis for axis in AXES if sizes[axis] > 1 or axis not in RARE]


def describe_grid(sizes: Mapping[str, int]) -> str:
    """A grid of these sizes in words: 2 tensor × 4 data × 1 pipeline."""
    return " × ".join(f"{sizes[axis]} {axis}" for axis in spoken_axes(sizes))


def ranks_of_sample(parallel: ParallelConfig) -> int:
    """Ranks that work on one sample, which are those of one place along the data axis."""
    return math.prod(getattr(parallel, axis) for axis in CONFIGURED)


def group_sizes(parallel: ParallelConfig, data_size: int) -> dict[str, int]:
    """Ranks of each of `GROUPS`, that of every axis first, neighbours first."""
    axes = {axis: data_size if axis == "data" else getattr(parallel, axis) for axis in AXES}
    return {name: math.prod(axes[axis] for axis in along) for name, along in GROUPS.items()}


def stage_layers(config: Config) -> list[range]:
    """Global indices of the blocks of each pipeline rank, first to last.

    `parallel.pipeline_layers` if it is given, else as `even_layers` divides them.
    """
    parallel = config.parallel
    counts = parallel.pipeline_layers or even_layers(config.model.num_layers, parallel.pipeline)
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def even_layers(num_layers: int, pipeline: int) -> list[int]:
    """Blocks of each pipeline rank; counts differ by at most one.

    The ranks in the middle have one more, because the first has the embedding too and the last the head and the router.
    Where the remainder has no exact middle, the earlier ranks have it: the head is the larger of the two burdens.
    """
    share, remainder = divmod(num_layers, pipeline)
    first = (pipeline - remainder) // 2
    return [share + (first <= rank < first + remainder) for rank in range(pipeline)]


def divided_by_tensor() -> list[str]:
    """Fields of a model's section that tensor ranks divide."""
    return [key.removeprefix("model.") for key, axes in DIVIDED.items() if "tensor" in axes]


def largest_tensor(model: ModelConfig, at_most: int) -> int:
    """The largest number of tensor ranks up to `at_most` that heads and feed-forward can be divided over."""
    common = math.gcd(*(getattr(model, name) for name in divided_by_tensor()))
    return max(size for size in range(1, min(at_most, common) + 1) if common % size == 0)


def divides(config: Config, sizes: Mapping[str, int]) -> bool:
    """Whether ranks along axes of these sizes divide what they have to."""
    return all(
        getattr(getattr(config, section), name) % math.prod(sizes[axis] for axis in axes) == 0
        for (section, name), axes in ((key.split("."), axes) for key, axes in DIVIDED.items())
    )


def largest_context(config: Config, tensor: int, at_most: int) -> int:
    """The largest number of context ranks up to `at_most` that heads and sequences can be divided over."""
    fits = lambda size: divides(config, {"tensor": tensor, "context": size})
    return max(filter(fits, range(1, at_most + 1)), default=1)


def own_length(config: Config) -> int:
    """Tokens of every sequence that a rank has, a share of them where context ranks share them."""
    return config.data.sequence_length // config.parallel.context


def micro_batches(config: Config, data_size: int, batch: int | None = None) -> int:
    """M, the micro-batches of one optimiser step on each data-parallel rank.

    Args:
        config: resolved.
        data_size: data-parallel ranks.
        batch: sequences of the step over all ranks; the full global batch unless given.
    """
    sequences = config.training.global_batch_size if batch is None else batch
    return sequences // (config.training.micro_batch_size * data_size)


def fits_schedule(count: int, pipeline: int) -> bool:
    """Whether an interleaved schedule runs so many micro-batches: in max(1, count // pipeline) rounds of one size."""
    return count % max(1, count // pipeline) == 0


def data_parallel_size(config: Config, world_size: int) -> int:
    """Number of data-parallel ranks; checks that the layout and the batch fit the number of ranks.

    Args:
        config: resolved.
        world_size: number of ranks.

    Raises:
        UserError: when they do not.
    """
    return _divide(config, world_size, local_size=world_size)


def check_layout(config: Config, launch: Launch) -> None:
    """Refuse a layout that cannot work on the ranks that were started; needs no process group.

    Args:
        config: resolved and validated.
        launch: the place of this process among the ranks.

    Raises:
        UserError: on every rank alike; where the ranks of a node are the reason, on every rank of such nodes.
    """
    tensor, local_size = config.parallel.tensor, launch.local_size
    try:
        _divide(config, launch.world_size, local_size)
    except UserError as error:
        error.shared = True
        raise
    if launch.world_size > local_size and local_size % tensor:
        flags = _nearest_layout(config, launch.world_size, local_size)
        error = UserError(
            f"parallel.tensor {tensor} does not divide the {local_size} ranks of a node, and tensor ranks stay inside "
            f"a node; start a multiple of {tensor} ranks on each node, or add {flags}"
        )
        error.shared = launch.local_rank != 0  # other nodes may have other numbers of ranks and nothing to report
        raise error
    if launch.world_size > local_size and (launch.rank - launch.local_rank) % tensor:
        raise UserError(
            f"the {tensor} tensor ranks would lie on different nodes, because the ranks of a node do not follow each "
            "other; start with srun --distribution=block, or mpirun --map-by slot"
        )


def _divide(config: Config, world_size: int, local_size: int) -> int:
    parallel, training = config.parallel, config.training
    shared = ranks_of_sample(parallel)
    if world_size % shared:
        spoken = spoken_axes(group_sizes(parallel, 1))
        sizes = " × ".join(f"parallel.{axis}" for axis in CONFIGURED if axis in spoken)
        raise UserError(
            f"{world_size} ranks cannot be divided into groups of {sizes} = {shared}; "
            f"start a multiple of {shared} ranks, or add {_nearest_layout(config, world_size, local_size)}"
        )
    size = world_size // shared
    for batch in batch_sizes(training):
        _check_batch(config, batch, size)
    return size


def _check_batch(config: Config, batch: int, size: int) -> None:
    """Refuse a global batch that so many data-parallel ranks cannot share, or a pipeline cannot run."""
    training, pipeline = config.training, config.parallel.pipeline
    unit = training.micro_batch_size * size
    fits, count = _nearest_batch(batch, unit, pipeline), batch // unit
    name, remedy = f"training.global_batch_size {batch}", f"set training.global_batch_size to {fits}"
    if batch != training.global_batch_size:
        name = f"the global batch {batch} of training.batch_size_ramp"
        remedy = f"choose its start and its increment as multiples of {unit * pipeline}"
    if batch % unit:
        raise UserError(
            f"{name} is not a multiple of training.micro_batch_size {training.micro_batch_size} × {size} data-parallel "
            f"ranks; {remedy}, or a smaller training.micro_batch_size"
        )
    if batch != fits:
        raise UserError(
            f"{name} makes {count} micro-batches of each data-parallel rank, which do not divide into the "
            f"{count // pipeline} rounds of a pipeline of {pipeline} ranks; {remedy}"
        )


def _nearest_batch(wanted: int, unit: int, pipeline: int) -> int:
    """The global batch nearest to the wanted one that is some number of units that the schedule can run.

    Multiples of `pipeline` always are, so that one lies near.
    """
    about = round(wanted / unit)
    counts = range(max(1, about - pipeline), about + pipeline + 1)
    return min((count * unit for count in counts if fits_schedule(count, pipeline)), key=lambda fit: abs(fit - wanted))


def _nearest_layout(config: Config, world_size: int, local_size: int) -> str:
    """Flags that turn the layout into one that the ranks can have: the fewest, for the largest layout within it.

    No split becomes finer than it was, so that nothing is proposed that the model or a pipeline would not allow.
    """
    parallel = config.parallel
    coarser = product(*(range(getattr(parallel, axis), 0, -1) for axis in CONFIGURED))
    candidates = [
        _changes(config, sizes, world_size)
        for sizes in (dict(zip(CONFIGURED, numbers, strict=True)) for numbers in coarser)
        if world_size % math.prod(sizes.values()) == 0
        and divides(config, sizes)
        and (world_size == local_size or local_size % sizes["tensor"] == 0)
    ]
    return " ".join(f"--{key} {value}" for key, value in min(candidates, key=len).items())


def _changes(config: Config, sizes: Mapping[str, int], world_size: int) -> dict[str, int | str]:
    """What has to be set for these sizes of axes, with all that follows from them."""
    parallel, training = config.parallel, config.training
    changed = {axis: size for axis, size in sizes.items() if size != getattr(parallel, axis)}
    changes: dict[str, int | str] = {f"parallel.{axis}": size for axis, size in changed.items()}
    if changed.get("tensor") == 1 and parallel.sequence_parallel:
        changes["parallel.sequence_parallel"] = "false"
    if "pipeline" in changed and parallel.pipeline_layers is not None:
        changes["parallel.pipeline_layers"] = "null"
    if changed.get("pipeline") == 1 and parallel.pipeline_schedule != "1f1b":
        changes["parallel.pipeline_schedule"] = "1f1b"
    unit = training.micro_batch_size * (world_size // math.prod(sizes.values()))
    batch = _nearest_batch(training.global_batch_size, unit, sizes["pipeline"])
    if batch != training.global_batch_size:
        changes["training.global_batch_size"] = batch
    return changes
