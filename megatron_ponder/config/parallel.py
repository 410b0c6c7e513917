"""The section about ranks."""

from dataclasses import dataclass
from typing import Literal

from megatron_ponder.config.declarations import SECONDS, STEPS, number_field, path_field

# The axes of the grid of ranks, from neighbours, which lie inside a node, to ranks that are farthest apart. The size of
# each is a field of the section below, but for that of `data`, along which the ranks lie that are left.
AXES = ("tensor", "context", "data", "pipeline")
# Those along which each rank holds a part of the model. Along the others all hold the same and see other data, so that
# gradients, and sums of losses, are added up over them, and ZeRO divides over them what it partitions.
MODEL_AXES = ("tensor", "pipeline")
# Numbers of the configuration that the ranks along some axes, all together, divide evenly.
DIVIDED = {
    "model.num_heads": ("tensor", "context"),
    "model.num_kv_heads": ("tensor",),
    "model.ffn_hidden_size": ("tensor",),
    "data.sequence_length": ("context",),
}


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over ranks."""

    tensor: int = number_field(1, 1, 2**12)
    """Ranks that share each layer."""
    context: int = number_field(1, 1, 2**12)
    """Ranks that share the tokens of every sequence, each of them equally many in a row, with heads exchanged around
    attention."""
    pipeline: int = number_field(1, 1, 2**12)
    """Ranks that share the stack of layers."""
    sequence_parallel: bool = False
    """Split norms and the residual stream over the tensor ranks."""
    zero_stage: int = number_field(1, 0, 3)
    """DeepSpeed ZeRO stage over the data-parallel ranks; at most 1 with a pipeline."""
    pipeline_layers: list[int] | None = number_field(None, 1, 10_000)
    """Blocks on each pipeline rank, first to last, for example `[5, 6, 5]`; divided as evenly as possible unless
    given."""
    pipeline_schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    """Order of forward and backward passes of a step: `1f1b` (interleaved one-forward-one-backward) or `zero_bubble`
    (computes gradients of weights where a rank would wait)."""
    vocab_multiple: int = number_field(1, 1, 2**16)
    """Rows of the vocabulary on each tensor rank are padded to a multiple of this; padded ids exist in memory only, in
    no checkpoint and in no loss."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and moments are kept: `none` (with the weights), `cpu` (host memory; `zero_stage` 1 to 3) or
    `nvme` (files below `offload_nvme_path`; `zero_stage` 3)."""
    offload_nvme_path: str | None = path_field(None)
    """Folder on a fast disk of every node."""
    offload_pin_memory: bool = False
    """Offload through page-locked host memory, which is faster and cannot be swapped out."""
    replica_check_interval: int = number_field(100, 0, STEPS)
    """Optimiser steps between comparisons of the checksums of what ranks hold alike, which are made before checkpoints
    too; 0 = never."""
    replica_tolerance: float = number_field(1e-2, 0, 1)
    """On GPUs, what ranks hold alike may differ by so much of its norm, as sums in another order make it; all then take
    what the first has. More ends the run, and so does any difference with 0, on CPUs, or with
    `training.deterministic`."""
    start_timeout: int = number_field(300, 1, SECONDS)
    """Seconds that ranks wait for each other at the start."""
