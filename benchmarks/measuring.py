"""What benchmarks share: times of things that take turns, memory of this process, a small llama, and several ranks."""

import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

Name = TypeVar("Name", bound=Hashable)
# Nine million parameters.
SMALL_LLAMA = {
    "model.hidden_size": 256, "model.num_layers": 6, "model.num_heads": 4, "model.ffn_hidden_size": 688,
    "model.vocab_size": 8192,
}  # fmt: skip


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def rounds_of(actions: Mapping[Name, Callable[[], Any]], rounds: int, warm_up: int = 1) -> Iterator[dict[Name, Any]]:
    """What actions that take turns return, in each round after those that warm up."""
    for turn in range(warm_up + rounds):
        results = {name: action() for name, action in actions.items()}
        if turn >= warm_up:
            yield results


def in_turn(actions: Mapping[Name, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[Name, list[float]]:
    """Seconds of each action in every round; they take turns, and the first rounds warm up."""
    timed = {name: lambda action=action: seconds(action) for name, action in actions.items()}
    return by_name(rounds_of(timed, rounds, warm_up))


def by_name(results: Iterable[dict[Name, Any]]) -> dict[Name, list[Any]]:
    """Of every name, the results of all rounds."""
    every = list(results)
    return {name: [result[name] for result in every] for name in every[0]}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, what is resident now, or VmHWM, the most that was."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> dict[int, Any]:
    """What `function(*args)` returns on each of the processes that run it, by rank."""
    launch = LaunchConfig(
        1, 1, ranks, run_id="benchmark", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
        max_restarts=0,
    )  # fmt: skip
    return elastic_launch(launch, function)(*args)
