"""Events of a run for TensorBoard."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


class TensorBoardEvents:
    """Events that TensorBoard draws; a disk that is full costs its curves, and not the training."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Begin; what was written of later steps than this one is dropped."""
        self._run_dir = run_dir
        self.begin_again(step)

    def begin_again(self, step: int) -> None:
        """Go on in a new file after a step."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = SummaryWriter(str(self._run_dir), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        if self._writer is None:
            return
        try:
            for key, value in numbers.items():
                self._writer.add_scalar(key, value, step)
        except OSError as error:
            logger.warning("no more TensorBoard events are written: %s", error)
            self._writer = None

    def finish(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
