"""The folder of a run, which one run at a time writes to."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from megatron_ponder.base.claims import Claim
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, write_atomically

OWNER = "owner.json"
logger = logging.getLogger(__name__)


class RunFolder:
    """Holds the folder for this run; on the first rank alone. Use as a context manager around all that writes to it.

    Attributes:
        path: of the folder.
    """

    def __init__(self, path: Path, config_yaml: str) -> None:
        """Prepare.

        Args:
            path: of the folder, which need not exist.
            config_yaml: the resolved configuration.
        """
        self.path, self._config = path, config_yaml
        self._claim = self._new_claim()

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Raises:
            UserError: another run has it.
            OSError: it cannot be written.
        """
        make_folder(self.path)
        self._claim.take()
        return self

    def __exit__(self, *_) -> None:
        self._claim.release()
        with suppress(OSError):  # not empty, unless the run was refused before it wrote anything
            os.rmdir(self.path)

    def write_config(self) -> None:
        """Store the configuration, in place of that of an earlier start.

        Raises:
            OSError: it cannot be written.
        """
        write_atomically(self.path / "config.yaml", self._config)

    def check(self) -> None:
        """Look whether the folder is still there and still this run's, before each save; make again what is gone.

        Raises:
            UserError: another run has taken it.
            OSError: it cannot be written.
        """
        if not self._claim.path.exists():
            logger.warning("%s was removed while training goes on; it is made again", self.path)
            make_folder(self.path)
            self._claim.release()
            self._claim = self._new_claim()
            self._claim.take()
        self._claim.verify()
        if not (self.path / "config.yaml").exists():
            self.write_config()

    def is_ours(self) -> bool:
        """Tell whether no other run has taken it."""
        try:
            self._claim.verify()
        except UserError:
            return False
        return True

    def _new_claim(self) -> Claim:
        return Claim(self.path / OWNER, f"the run folder {self.path}", "choose another --training.run_dir")
