"""Tensors with values that are no numbers, which would make nonsense of everything computed from them."""

from torch import Tensor

from megatron_ponder.base.errors import UserError


def not_finite(tensor: Tensor) -> tuple[int, int]:
    """Count the values of a tensor that are NaN, and those that are infinite."""
    if tensor.isfinite().all():
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())


def require_finite(tensor: Tensor, what: str, remedy: str) -> None:
    """Refuse a tensor that was read, if any of its values is not finite.

    Args:
        tensor: of any shape.
        what: it is, and where it was read: "runs/a/checkpoints/step-00000010: the weight of head.weight".
        remedy: what a user can do, as the end of a sentence.

    Raises:
        UserError: naming it, with the number of such values.
    """
    nan, infinite = not_finite(tensor)
    if nan or infinite:
        raise UserError(f"{what} holds {nan} NaN and {infinite} infinite values; {remedy}")
