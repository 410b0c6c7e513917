"""Stage `training` of `gpu.py`: optimiser steps of the 410M shape on one GPU, and where their time goes."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_bench import Bench, Case, Numbers, failure
from megatron_ponder.base.launch import Launch, discover
from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.gpus import GPUS, Gpu
from megatron_ponder.cluster.hardware import hardware_of
from megatron_ponder.config import Config, ParallelConfig
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.estimates.step_time import step_time
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.compiling import compile_blocks
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective

REFINEMENTS = 2
TARGETS = {"vanilla": 0.5, "adaptive": 0.4}  # model FLOP utilisation of the slots that are run
SEQUENCES = {"vanilla": 16, "adaptive": 2}  # of a micro-batch, which take about the same memory
ATTENTION = re.compile(r"flash|fmha|attention|attn", re.IGNORECASE)
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|splitk", re.IGNORECASE)
OPTIMIZER = re.compile(r"adam|multi_tensor", re.IGNORECASE)


class Step:
    """Takes optimiser steps of two micro-batches."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        model = build_part(config, mesh)
        initialize(model, seed=0)
        compile_blocks(model, config, mesh.device)
        self.engine, self.config = Engine(Objective(model), config, mesh), config
        shape = (2, config.training.micro_batch_size, config.data.sequence_length + 1)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(mesh.device)
        self._scale = 1 / self.tokens[..., 1:].numel()

    def __call__(self) -> float:
        """The gradient norm."""
        rule = self.engine.rule("soft")
        self.engine.forward_backward(list(self.tokens), REFINEMENTS, rule, 0.01, self._scale)
        return self.engine.step(1e-6)


def training_cases(tiny: bool) -> dict[str, Case]:
    """Cases by name."""
    steps = {mode: partial(steps_of, mode, "auto") for mode in TARGETS}
    if not tiny:
        steps["adaptive, Triton's attention"] = partial(steps_of, "adaptive", "triton")
    return steps | {f"parts of {mode}": partial(parts_of, mode) for mode in TARGETS}


@contextmanager
def alone(bench: Bench) -> Iterator[Mesh]:
    """The grid of a single rank."""
    with process_group(Launch(port=discover().port)):
        yield build_mesh(bench.device, ParallelConfig())


def configured(mode: str, bench: Bench, **overrides: object) -> Config:
    """Two micro-batches a step, at R = 2."""
    size = {} if bench.tiny else {"training__micro_batch_size": SEQUENCES[mode]}
    config = bench.configuration(mode, ponder_training__jacobi_iterations=REFINEMENTS, **size, **overrides)
    training = replace(config.training, global_batch_size=2 * config.training.micro_batch_size)
    return replace(config, training=training)


def steps_of(mode: str, kernel: AttentionKernel, bench: Bench) -> dict[str, Numbers]:
    """Milliseconds a step, tokens/s and model FLOP utilisation, eager and compiled."""
    ways = {"eager": {}} | ({} if bench.tiny else {"compiled": {"training__compile": "true"}})
    with alone(bench) as mesh:
        made: dict[str, Step] = {}
        errors: dict[str, Numbers] = {}
        for way, overrides in ways.items():
            config = configured(mode, bench, training__attention_kernel=kernel, **overrides)
            message = failure(lambda way=way, config=config: made.update({way: Step(config, mesh)}))
            errors |= {way: {"error": message}} if message else {}
        measured = bench.in_turn(made, rounds=10)
        return errors | {way: figures(mode, made[way].config, numbers, bench) for way, numbers in measured.items()}


def figures(mode: str, config: Config, numbers: Numbers, bench: Bench) -> Numbers:
    """What follows from the time of a step."""
    if "ms" not in numbers:
        return numbers
    seconds = numbers["ms"] / 1e3
    tokens = config.training.global_batch_size * config.data.sequence_length
    result = dict(numbers) | {"tokens/s": tokens / seconds}
    if bench.gpu and (peak := bench.gpu.peak(config.training.precision)):
        result["MFU"] = training_flops(config, REFINEMENTS) / seconds / peak
        result["target MFU"] = TARGETS[mode]
    if bench.device.type == "cuda":
        result["GiB at most"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
    return result


def parts_of(mode: str, bench: Bench) -> dict[str, Numbers]:
    """Milliseconds of every kind of kernel in a step, and the least that estimates know of."""
    cuda = bench.device.type == "cuda"
    config = configured(mode, bench)
    with alone(bench) as mesh:
        step = Step(config, mesh)
        step()
        bench.wait()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as profile:
            step()
            bench.wait()
    times: Counter[str] = Counter()
    for event in profile.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if own > 0 and is_kernel == cuda:
            times[kind_of(event.key)] += own / 1e3
    floors = least(config, bench.gpu)
    return {kind: {"ms": times[kind]} | ({"floor ms": floors[kind]} if floors else {}) for kind in sorted(times)}


def kind_of(kernel: str) -> str:
    """What a kernel of this name is for."""
    for kind, pattern in (("attention", ATTENTION), ("optimiser", OPTIMIZER), ("matrices", PRODUCTS)):
        if pattern.search(kernel):
            return kind
    return "element-wise"


def least(config: Config, gpu: Gpu | None) -> dict[str, float]:
    """Milliseconds of each part of a step if everything ran at the card's peaks; nothing where they are not known."""
    name = next((name for name, known in GPUS.items() if known == gpu), None)
    if name is None:
        return {}
    full = {f"{what}_share": 1.0 for what in ("matrix", "attention", "memory_bandwidth", "link")}
    hardware = hardware_of(Cluster(gpu=name, nodes=1, gpus_per_node=1, **full), config.training.precision)
    parts = step_time(config, 1, hardware).parts
    times = Counter({kind: 1e3 * parts[kind] for kind in ("matrices", "attention", "optimiser")})
    times["element-wise"] = 1e3 * (parts["element-wise"] + parts["gradient sums"])
    return dict(times)
