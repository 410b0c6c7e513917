"""Kinds of tensors that there are of every parameter: the weight, and what the optimiser remembers of it.

Checkpoints name their tensors by these kinds, the engine hands them over by kind, and estimates count their bytes. Read
without PyTorch.
"""

from megatron_ponder.config import OptimizerConfig

# The master weight, which is fp32 in every precision.
WEIGHT = "weight"
WEIGHT_BYTES = 4
# AdamW's averages of the gradient and of its square, by their names in PyTorch: bytes a parameter.
ADAMW = {"exp_avg": 4, "exp_avg_sq": 4}
# Of any optimiser.
KINDS = (WEIGHT, *ADAMW)


def moments(optimizer: OptimizerConfig) -> dict[str, int]:
    """Bytes a parameter of everything that an optimiser remembers, by its name in PyTorch.

    Args:
        optimizer: which it is; AdamW is the only one so far.
    """
    return ADAMW


def is_decayed(dimensions: int) -> bool:
    """Whether weight decay applies to a parameter: matrices and embeddings are decayed, norms and biases are not."""
    return dimensions > 1


def kinds(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """The kinds of tensors that there are of every parameter in training."""
    return (WEIGHT, *moments(optimizer))


def moment_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes a parameter of all that an optimiser remembers."""
    return sum(moments(optimizer).values())
