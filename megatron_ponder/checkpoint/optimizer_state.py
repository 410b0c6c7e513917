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
# Muon's average of the gradient, likewise.
MUON = {"momentum_buffer": 4}
# Of any optimiser.
KINDS = (WEIGHT, *ADAMW, *MUON)


def takes_whole(optimizer: OptimizerConfig, matrix: bool) -> bool:
    """Whether an optimiser takes a parameter as one matrix, and not number by number.

    Args:
        optimizer: which it is.
        matrix: as the parameter's layer declares.
    """
    return optimizer.name == "muon" and matrix


def moments(optimizer: OptimizerConfig, matrix: bool) -> dict[str, int]:
    """Bytes a number of everything that an optimiser remembers of a parameter, by its name in PyTorch."""
    return MUON if takes_whole(optimizer, matrix) else ADAMW


def is_decayed(dimensions: int) -> bool:
    """Whether weight decay applies to a parameter: matrices and embeddings are decayed, norms and biases are not."""
    return dimensions > 1


def group_of(optimizer: OptimizerConfig, dimensions: int, matrix: bool) -> int:
    """The group, 0 or 1, in which an optimiser has a parameter; every pipeline rank has some of both.

    AdamW's are what is decayed and what is not. Muon's are what it takes whole and what it leaves to AdamW: of that,
    ranks in the middle of a pipeline may have nothing that is decayed, and all ranks must have the same groups, because
    they add up the norm of each.
    """
    first = takes_whole(optimizer, matrix) if optimizer.name == "muon" else is_decayed(dimensions)
    return 0 if first else 1


def kinds(optimizer: OptimizerConfig, matrix: bool) -> tuple[str, ...]:
    """The kinds of tensors that there are of a parameter in training."""
    return (WEIGHT, *moments(optimizer, matrix))


def moment_bytes(optimizer: OptimizerConfig, matrix: bool) -> int:
    """Bytes a number of all that an optimiser remembers of a parameter."""
    return sum(moments(optimizer, matrix).values())
