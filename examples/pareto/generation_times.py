"""How long each trained model takes to generate, measured on this machine: all of them in turn, several times."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track
from runs import Run

from megatron_ponder.base.files import write_atomically
from megatron_ponder.checkpoint.folders import latest_checkpoint
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.config import read_config
from megatron_ponder.evaluation.sources import split_batches
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.runs.json_lines import records_in

PROMPTS, READ, GENERATED = 8, 16, 48  # sequences at a time, and tokens of each


def measure_generation(runs: Sequence[Run], path: Path, rounds: int) -> dict[tuple[str, int], float]:
    """Measure what is not in the file yet, and keep it there.

    In every round each model continues the same prompts, one model after another, so that what else the machine does
    meets all of them. One thread computes. Controls that cannot generate are left out.

    Args:
        runs: finished.
        path: a JSON object a measurement; it goes on where it was stopped.
        rounds: measurements of each model.

    Returns:
        Median seconds a generated token, by variant and seed.
    """
    lines = records_in(path.read_bytes()) if path.exists() else []
    known = {_key(line) for line in lines}
    runs = [run for run in runs if not read_config(run.arguments).ponder.routes_by_token]
    wanted = [
        {"variant": run.variant, "seed": run.seed, "checkpoint": checkpoint.name, "round": number}
        for number in range(rounds)
        for run in runs
        if (checkpoint := latest_checkpoint(run.folder / "checkpoints")) is not None
    ]
    missing = [line for line in wanted if _key(line) not in known]
    folders = {(run.variant, run.seed): run.folder for run in runs}
    for line in track(missing, "generation", disable=not missing):
        seconds = _seconds(load_model(folders[line["variant"], line["seed"]]))
        lines.append(line | {"seconds": seconds})
        write_atomically(path, "".join(json.dumps(each) + "\n" for each in lines))
    return dict(_medians(lines, {_key(line) for line in wanted}))


def _key(line: dict) -> tuple:
    return tuple(line[name] for name in ("variant", "seed", "checkpoint", "round"))


def _medians(lines: Sequence[dict], wanted: set[tuple]) -> Iterator[tuple[tuple[str, int], float]]:
    found = defaultdict(list)
    for line in lines:
        if _key(line) in wanted:
            found[line["variant"], line["seed"]].append(line["seconds"])
    for which, seconds in found.items():
        yield which, statistics.median(seconds)


@torch.no_grad()
def _seconds(loaded: LoadedModel) -> float:
    """Seconds that a model takes for a token, of prompts that it continues together."""
    prepare_cpu()
    torch.set_num_threads(1)
    batches = split_batches(loaded, None, "valid", PROMPTS).batches
    prompts = [tuple(row[:READ].tolist()) for batch in batches for row in batch]
    _generate(loaded, prompts, tokens=2)  # what is made once is made now
    room = loaded.config.model.max_position_embeddings - READ  # of a model for less
    begun = time.perf_counter()
    generated = _generate(loaded, prompts, min(GENERATED, room))
    return (time.perf_counter() - begun) / generated


def _generate(loaded: LoadedModel, prompts: Sequence[tuple[int, ...]], tokens: int) -> int:
    """Continue prompts by so many tokens each, drawn from the model; how many there are."""
    with Generator(loaded.model, tokenizer=loaded.tokenizer) as generator:
        for seed, prompt in enumerate(prompts):
            generator.submit(Request(prompt, tokens, Sampling(temperature=1.0, seed=seed)))
        generator.run()
    return tokens * len(prompts)
