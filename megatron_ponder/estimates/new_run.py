"""The configuration of a new run: a known size in some mode, in the layout that estimates find best for a machine."""

from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.typed_arguments import options_of
from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.gpus import GIGA, GPUS
from megatron_ponder.cluster.hardware import GIB, Hardware
from megatron_ponder.config import Config, read_config
from megatron_ponder.config.known_sizes import Size
from megatron_ponder.estimates.plan_tables import SECONDS_PER_DAY, nothing_fits
from megatron_ponder.estimates.search import KEYS, Plan, fitting
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.ponder import PonderLM

# Of Hoffmann et al. (2022), for a parameter.
TOKENS = 20
# Of the steps of a run: when the penalty of a router begins, and when it has its full weight.
_PENALTY = (0.02, 0.2)


def new_run(
    name: str,
    size: Size,
    mode: str,
    ranks: int,
    overrides: Sequence[str],
    tokens: float | None = None,
    cpu: bool = False,
) -> tuple[Config, list[str]]:
    """The configuration of a run but for its layout, and the keys to write.

    Args:
        name: of the run.
        size: of the model.
        mode: of latent steps.
        ranks: of the machine, which divide the global batch.
        overrides: `--section.key value ...`, which win, and are written.
        tokens: to train on; 20 for each parameter unless given.
        cpu: the ranks are processors.
    """
    batch = ranks * max(1, round(size.global_batch_size / ranks))
    values = {f"model.{key}": value for key, value in size.model.items()} | {
        "ponder.mode": mode,
        "data.path": "data/corpus_text_document",
        "data.sequence_length": size.sequence_length,
        "tokenizer.path": "data/tokenizer.model",
        "optimizer.learning_rate": size.learning_rate,
        "optimizer.schedule": "cosine",
        "optimizer.weight_decay": 0.1,
        "training.run_dir": f"runs/{name}",
        "training.global_batch_size": batch,
        "training.precision": "fp32" if cpu else "bf16",
        "checkpoint.keep": 3,
        "checkpoint.resume": "auto",
        "checkpoint.asynchronous": "false" if cpu else "true",
    }
    config = _read(values, overrides)
    passes = passes_of(config.ponder)
    values |= {"ponder.latent_steps": config.ponder.latent_steps} if config.ponder.steps else {}
    values |= {"ponder_training.jacobi_iterations": [2, 3]} if passes.iterated else {}
    given = "training.steps" in _keys(overrides)
    per_step = config.training.global_batch_size * config.data.sequence_length
    wanted = TOKENS * parameters(config) if tokens is None else tokens
    steps = config.training.steps if given else max(10, round(wanted / per_step))
    every = max(1, min(1000, steps // 10))
    values |= {"training.steps": steps, "training.eval_interval": every, "checkpoint.interval": every}
    if passes.routed:
        begin, end = (round(share * steps) for share in _PENALTY)
        values |= {"ponder_training.penalty_weight": 0.01}
        values |= {"ponder_training.penalty_start": begin, "ponder_training.penalty_end": end}
    layout = [f"{section}.{key}" for section, key in KEYS]
    return _read(values, overrides), [*values, *layout, *_keys(overrides)]


def best_layout(config: Config, hardware: Hardware, overrides: Sequence[str]) -> Plan:
    """The fastest layout that fits and has what overrides say of it.

    Raises:
        UserError: none does.
    """
    fixed = [(section, key) for section, key in KEYS if f"{section}.{key}" in _keys(overrides)]
    value = lambda of, section, key: getattr(getattr(of, section), key)
    for plan in fitting(config, hardware):
        if all(value(plan.config, *names) == value(config, *names) for names in fixed):
            return plan
    raise UserError(nothing_fits(hardware))


def parameters(config: Config) -> int:
    """Number of weights of the model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in PonderLM(config.model, config.ponder).parameters())


def with_a_gpu(cluster: Cluster, precision: str) -> tuple[Cluster, list[str]]:
    """A cluster of which only the memory of its GPUs is known, with the rates of a GPU like them.

    Returns:
        The cluster, and the options that say the same; none where a GPU is named.
    """
    if cluster.gpu is not None or cluster.memory_gib is None or cluster.tflops is not None:
        return cluster, []
    rated = [name for name, gpu in GPUS.items() if gpu.peak(precision)]
    name = min(rated, key=lambda name: abs(GPUS[name].memory * GIGA - cluster.memory_gib * GIB))
    return replace(cluster, gpu=name), ["--gpu", name]


def this_processor(memory_gib: float | None) -> Hardware:
    """One process on the processors of this machine; its rates are unknown, and so are times.

    Args:
        memory_gib: that it may take; that of this machine unless given.
    """
    memory = psutil.virtual_memory().total if memory_gib is None else memory_gib * GIB
    return Hardware("CPU", 1, 1, memory, 1e11, 2e10, GIGA, GIGA, device="cpu")


def expected(name: str, plan: Plan, hardware: Hardware) -> list[str]:
    """Lines about a run: what it is, and what estimates say, which nobody has measured."""
    training, need, there = plan.config.training, plan.memory.total / GIB, hardware.memory / GIB
    tokens = training.steps * training.global_batch_size * plan.config.data.sequence_length
    what = f"{name}: {parameters(plan.config) / 1e6:,.1f}M parameters, {_short(tokens)} tokens"
    if hardware.device == "cpu":
        return [f"{what}, on one process of a CPU.", f"Expected: {need:.1f} of {there:.1f} GiB of memory."]
    nodes = "" if hardware.nodes == 1 else f"{hardware.nodes} nodes of "
    days = plan.time.total * training.steps / SECONDS_PER_DAY
    return [
        f"{what}, on {nodes}{hardware.gpus_per_node} × {hardware.name}.",
        f"Expected, not measured: {need:.1f} of {there:.1f} GiB on the fullest GPU; {plan.time.total:.2f} s a step, "
        f"{days:,.1f} days.",
    ]


def _short(tokens: int) -> str:
    return f"{tokens / 1e9:,.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:,.1f}M"


def _read(values: dict, overrides: Sequence[str]) -> Config:
    return read_config([*(f"--{key}={value}" for key, value in values.items()), *overrides])


def _keys(overrides: Sequence[str]) -> list[str]:
    return [name for name, _ in options_of(overrides)]
