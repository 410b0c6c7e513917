"""What the stages of `gpu.py` measure with, and the model that they measure."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from megatron_ponder.cluster.gpus import Gpu, known_gpu
from megatron_ponder.config import Config, read_config

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "llama_410m.yaml"
ROUNDS = 15
TINY = {
    "model.hidden_size": 32, "model.num_layers": 2, "model.num_heads": 2, "model.ffn_hidden_size": 64,
    "model.vocab_size": 64, "data.sequence_length": 16, "training.micro_batch_size": 1,
}  # fmt: skip
Numbers = Mapping[str, float | str]


class CannotRunError(Exception):
    """This machine cannot run a case, for the reason that is given."""


@dataclass(frozen=True)
class Bench:
    """What cases are measured with.

    Attributes:
        device: that computes.
        tiny: sizes that show that everything runs, and nothing else.
        deadline: of the stage, on the monotonic clock.
    """

    device: torch.device
    tiny: bool
    deadline: float

    @property
    def gpu(self) -> Gpu | None:
        """What is known of the card."""
        return known_gpu(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None

    def configuration(self, mode: str, **overrides: object) -> Config:
        """The 410M shape in some mode, with K = 3; `training__precision="fp32"` overrides a key."""
        values = (TINY if self.tiny else {}) | {key.replace("__", "."): value for key, value in overrides.items()}
        words = [f"--{key}={value}" for key, value in values.items()]
        return read_config(["--config", str(CONFIG), f"--ponder.mode={mode}", *words])

    def milliseconds(self, action: Callable[[], object]) -> float:
        """Of one call, until the device has done what it started."""
        self.wait()
        begun = time.perf_counter()
        action()
        self.wait()
        return 1e3 * (time.perf_counter() - begun)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def in_turn(self, actions: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Numbers]:
        """Median milliseconds of actions that take turns, or the error of those that cannot run.

        All run once before. There are fewer rounds where the stage's time ends.
        """
        failed = {name: message for name, action in actions.items() if (message := failure(action))}
        able = {name: action for name, action in actions.items() if name not in failed}
        times: dict[str, list[float]] = {name: [] for name in able}
        for turn in range(1 if self.tiny else rounds):
            if turn > 0 and time.monotonic() > self.deadline:
                break
            for name, action in able.items():
                times[name].append(self.milliseconds(action))
        medians = {name: {"ms": statistics.median(of_one), "rounds": len(of_one)} for name, of_one in times.items()}
        return {name: medians.get(name) or {"error": failed[name]} for name in actions}


Case = Callable[[Bench], Mapping[str, Numbers]]


def failure(action: Callable[[], object]) -> str | None:
    """The error that an action ends with, in one line; None if it ends well."""
    try:
        action()
    except Exception as error:  # of whatever kind: it is recorded
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return None
