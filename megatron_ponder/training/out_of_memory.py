"""What a rank says when the memory of its GPU is full, and what it leaves behind to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, replacing


@contextmanager
def out_of_memory_explained(folder: Path, rank: int) -> Iterator[None]:
    """Write down what lies in the memory of the GPU if it does not suffice for the block.

    Args:
        folder: to write to.
        rank: of this process.

    Raises:
        UserError: the memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = ". ".join(str(error).split(". ")[:2])
        raise UserError(
            f"rank {rank}: {told}; {_snapshot(folder / f'rank_{rank}_out_of_memory.pickle')}; lower "
            "training.micro_batch_size, set training.recompute to block, raise parallel.zero_stage, or use more ranks"
        ) from error


def _snapshot(path: Path) -> str:
    """Write what lies in the memory of the GPU.

    Returns:
        What became of it.
    """
    try:
        make_folder(path.parent)
        with replacing(path) as aside:
            torch.cuda.memory._dump_snapshot(str(aside))
    except (OSError, UserError) as error:
        return f"what lay in it could not be written ({error})"
    return f"what lay in it is in {path}, for pytorch.org/memory_viz"
