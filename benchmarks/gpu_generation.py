"""Stages `decoding` and `prefill` of `gpu.py`."""

import time
from functools import partial

import torch

from benchmarks.gpu_bench import ROUNDS, Bench, Case, Numbers
from megatron_ponder.config import Config
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize

EVERY_STEP = Rule("hard", 0.5, 30.0)  # an α with which all latent steps run
FORWARDS = 16  # between two looks at the clock
TARGETS = {16: 1.5, 256: 12.0}  # milliseconds


def decoding_cases(tiny: bool) -> dict[str, Case]:
    """Cases by name."""
    counts = (1, 3) if tiny else (1, 16, 256)
    return {
        f"{mode}, {count} sequences": partial(decode, mode, count)
        for mode in ("vanilla", "adaptive")
        for count in counts
    }


def prefill_cases(tiny: bool) -> dict[str, Case]:
    """Cases by name."""
    lengths = (32,) if tiny else (1024, 4096)
    return {
        f"{mode}, {length:,} tokens": partial(read, mode, length)
        for mode in ("vanilla", "adaptive")
        for length in lengths
    }


def model_of(config: Config, bench: Bench) -> PonderLM:
    """With random weights, in bf16 on a GPU."""
    model = build_part(config, Mesh(device=bench.device))
    initialize(model, seed=0)
    return model.to(bench.device, torch.bfloat16 if bench.device.type == "cuda" else torch.float32).eval()


def prompts(config: Config, count: int, length: int) -> list[tuple[int, ...]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return list(map(tuple, torch.randint(0, config.model.vocab_size, (count, length), generator=generator).tolist()))


def decode(mode: str, count: int, bench: Bench) -> dict[str, Numbers]:
    """A forward with one slot of each sequence, which have 1,024 slots at first."""
    config = bench.configuration(mode, model__max_position_embeddings=4096)
    slots = 24 if bench.tiny else 1024
    forwards, each = (4 if bench.tiny else FORWARDS), config.ponder.steps + 1
    length, new = slots // each, (ROUNDS + 2) * forwards // each + 1
    batching = Batching(max_sequences=count, max_slots=count * (length + new) * each, prompt_slots=1 << 16)
    generator = Generator(model_of(config, bench), rule=EVERY_STEP if mode == "adaptive" else None, batching=batching)
    for prompt in prompts(config, count, length):
        generator.submit(Request(prompt, new))
    while generator.usage.tokens < count:
        generator.step()
    before, begun = generator.usage.tokens, time.perf_counter()
    numbers = dict(bench.in_turn({"steps": lambda: [generator.step() for _ in range(forwards)]})["steps"])
    if "ms" in numbers:
        numbers["tokens/s"] = (generator.usage.tokens - before) / (time.perf_counter() - begun)
        numbers["ms"] /= forwards
        numbers |= {"target ms": TARGETS[count]} if count in TARGETS else {}
    return {"a forward": numbers}


def read(mode: str, length: int, bench: Bench) -> dict[str, Numbers]:
    """From a prompt to its first token."""
    config = bench.configuration(mode, model__max_position_embeddings=2 * length)
    model, forwards = model_of(config, bench), []
    prompt = prompts(config, 1, length)[0]

    def run() -> None:
        generator = Generator(model, rule=EVERY_STEP if mode == "adaptive" else None)
        generator.submit(Request(prompt, 1))
        generator.run()
        forwards.append(generator.usage.forwards)

    numbers = dict(bench.in_turn({"prompt": run}, rounds=5)["prompt"])
    if "ms" in numbers:
        numbers |= {"forwards": forwards[-1], "tokens/s": 1e3 * length / numbers["ms"]}
    return {"to the first token": numbers}
