"""What a decoding forward cannot be faster than: the bytes that it has to read, over the bandwidth of memory."""

from dataclasses import dataclass

from rich.table import Table

from megatron_ponder.cluster.hardware import GIB, Hardware
from megatron_ponder.config import Config
from megatron_ponder.estimates.part import part_sizes
from megatron_ponder.estimates.rank import FP32

SEQUENCES, SLOTS = (1, 16, 256), 1024


@dataclass(frozen=True)
class Floor:
    """A forward that runs one slot of each sequence, on one GPU that holds the whole model.

    Attributes:
        sequences: how many, of `SLOTS` slots each.
        weights: bytes, of the embeddings none.
        cache: bytes of keys, values and log weights.
        seconds: until both are read.
    """

    sequences: int
    weights: int
    cache: int
    seconds: float


def decoding_floors(config: Config, hardware: Hardware) -> list[Floor]:
    """Floors for few sequences and for many.

    Of N parameters of b bytes all but the table of embeddings are read, V H b of them if it is not the head's; of each
    slot keys and values of all blocks, 2 b a channel, and log w in fp32.

    Args:
        config: resolved, with a vocabulary size; weights and cache have its precision.
        hardware: with the GPU.
    """
    sizes, width = part_sizes(config.model, config.ponder), 2 if config.training.precision == "bf16" else FP32
    weights = width * (sizes.count - (0 if config.model.tie_embeddings else sizes.table))
    slot = config.model.num_layers * 2 * sizes.block.key * width + FP32
    rate = hardware.memory_bandwidth * hardware.memory_bandwidth_share
    return [Floor(count, weights, count * SLOTS * slot, (weights + count * SLOTS * slot) / rate) for count in SEQUENCES]


def decoding_table(floors: list[Floor], hardware: Hardware) -> Table:
    """The floors, a row for each; those that do not fit are named."""
    table = Table(title=f"Least time of a forward, {SLOTS:,} slots a sequence, {hardware.name}")
    for heading in ("sequences", "weights, GiB", "cache, GiB", "ms", "slots/s"):
        table.add_column(heading, justify="right")
    for floor in floors:
        fits = floor.weights + floor.cache <= hardware.usable_memory
        times = (f"{1e3 * floor.seconds:.2f}", f"{floor.sequences / floor.seconds:,.0f}")
        sizes = (f"{size / GIB:.2f}" for size in (floor.weights, floor.cache))
        table.add_row(f"{floor.sequences}", *sizes, *(times if fits else ("does not fit", "")))
    return table
