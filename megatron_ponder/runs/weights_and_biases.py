"""Logging to Weights & Biases, for those who want it besides what the run folder holds."""

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import write_atomically

# In the run's folder: what this run is called there, whatever the folder is called or moved to.
RUN_ID = "wandb-id"
logger = logging.getLogger(__name__)


class WandbRun:
    """One run of a project: the same for all starts of a run folder, and another one for every other folder.

    A service that goes away costs its curves, and not the training.
    """

    def __init__(self, run_dir: Path, project: str, settings: Mapping) -> None:
        """Begin, or go on, with a run; without a network it is kept in the run's folder, for `wandb sync`.

        Args:
            run_dir: the run's folder.
            project: where the run belongs.
            settings: the resolved configuration, which is shown beside the curves.

        Raises:
            UserError: wandb is not installed, or nobody is logged in.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "logging.wandb_project is set, but wandb is missing; pip install 'megatron_ponder[wandb]'"
            ) from error
        given = {
            "project": project,
            "name": "/".join(run_dir.absolute().parts[-2:]),  # seeds of one experiment lie in folders of like names
            "dir": str(run_dir),
            "id": run_id(run_dir),
            "resume": "allow",
            "config": dict(settings),
        }
        try:
            self._run = wandb.init(**given)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise UserError(
                f"Weights & Biases lets nobody in ({' '.join(str(error).split())}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave logging.wandb_project out"
            ) from error
        except wandb.errors.CommError as error:
            logger.warning(
                "Weights & Biases cannot be reached (%s); `wandb sync` sends later what %s/wandb keeps",
                " ".join(str(error).split()),
                run_dir,
            )
            wandb.teardown()  # its process would say that the run is in use
            self._run = wandb.init(**given, mode="offline")

    @property
    def summary(self) -> dict:
        """The last value of every number that has been sent."""
        return dict(self._run.summary)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(numbers), step=step)
        except Exception as error:  # whatever a service and its processes may meet
            logger.warning("nothing more is sent to Weights & Biases: %s", error)
            self._run = None

    def finish(self) -> None:
        """Wait until all is sent."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            logger.warning("not everything has been sent to Weights & Biases: %s", error)


def run_id(run_dir: Path) -> str:
    """The identity of a run folder, made at its first start and kept in it."""
    path = run_dir / RUN_ID
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8").strip()
