"""The training loop, from a configuration to a trained run folder."""

import math
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.config import Config, data_parallel_size, to_yaml
from megatron_ponder.data.loader import batches, validation_batches
from megatron_ponder.errors import UserError
from megatron_ponder.evaluation.plots import plot_training
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.training.checkpoint import (
    Checkpointer,
    check_resumable,
    find_resume,
    initial_weights,
    verify_together,
)
from megatron_ponder.training.engine import Engine
from megatron_ponder.training.layout import describe_layout
from megatron_ponder.training.metrics import MetricsLog, RunLog, RunProgress, prepare_run_dir
from megatron_ponder.training.objective import Objective, Tally
from megatron_ponder.training.schedules import learning_rate, penalty_weight, refinements
from megatron_ponder.training.setup import RunParts, build_model, open_parts
from megatron_ponder.training.watch import StepWatch


def train(config: Config, device: torch.device) -> None:
    """Train, or go on training, in the configured run folder.

    Args:
        config: resolved and validated.
        device: of this rank, inside a process group.

    Raises:
        UserError: on every rank, for whatever the user has to change.
    """
    data_size = together(lambda: data_parallel_size(config, dist.get_world_size()))
    config, parts = together(lambda: open_parts(config))
    resumed = together(lambda: find_resume(config))
    source = resumed or together(lambda: initial_weights(config))
    if source is not None:
        verify_together(source)
    fingerprints = (parts.data_fingerprint, parts.tokenizer.fingerprint if parts.tokenizer else None)
    manifest = None if resumed is None else together(lambda: check_resumable(resumed, config, *fingerprints))
    parallel = config.parallel
    mesh = build_mesh(device, parallel.tensor, parallel.pipeline, data_size, parallel.sequence_parallel)
    model = together(lambda: build_model(config, parts, mesh, source))
    run_dir, leader = Path(config.training.run_dir), dist.get_rank() == 0
    together(lambda: prepare_run_dir(run_dir, to_yaml(config)) if leader else None)

    engine = Engine(Objective(model), config, mesh)
    step, samples = 0, 0
    if manifest is not None:
        step, samples = manifest.step, manifest.samples
        if step > 0:
            together(lambda: engine.restore(resumed, step))
    tokenizer = Path(config.tokenizer.path) if parts.tokenizer else None
    together(lambda: parts.datasets["train"].prepare(samples))
    log = together(lambda: MetricsLog(run_dir, config.logging, step) if leader else None)
    lines = together(lambda: RunLog(run_dir) if leader else None)
    watch = StepWatch(config, mesh, model.transformer)
    with RunProgress(config.training.steps, step, config.logging.interval, shown=leader, log=lines) as progress:
        progress.say(_headline(config, mesh, parts, step))
        progress.say(describe_layout(config, mesh))
        with Checkpointer(config, tokenizer, fingerprints, mesh) as checkpointer:
            _loop(config, mesh, parts, engine, checkpointer, log, progress, watch, step, samples)
        if leader:
            log.close()
            progress.say(f"loss plot in {plot_training(run_dir)}")


def _loop(
    config: Config,
    mesh: Mesh,
    parts: RunParts,
    engine: Engine,
    checkpointer: Checkpointer,
    log: MetricsLog | None,
    progress: RunProgress,
    watch: StepWatch,
    step: int,
    samples: int,
) -> None:
    training = config.training
    pruning = engine.pruning(hard=False)
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    loader = batches(
        parts.datasets["train"],
        samples,
        training.global_batch_size,
        training.micro_batch_size,
        mesh.data.rank,
        mesh.data.size,
        config.data.num_workers,
        pin_memory=mesh.device.type == "cuda",
    )
    while step < training.steps:
        watch.begin()
        rate = learning_rate(step, training.steps, config.optimizer)
        penalty = penalty_weight(step, config.ponder)
        r = refinements(step, training.seed, config.ponder)
        micro_batches = [tokens.to(mesh.device, non_blocking=True) for tokens in next(loader)]
        watch.mark()
        sums = engine.forward_backward(micro_batches, r, pruning, penalty, scale=1 / tokens_per_step)
        watch.mark()
        norm = engine.step(rate)
        watch.mark()
        step, samples = step + 1, samples + training.global_batch_size
        interval = config.parallel.replica_check_interval
        if mesh.tensor.size > 1 and interval and step % interval == 0:
            together(partial(check_replicas, engine, step))
        tally = _sum_over_data_ranks(sums, mesh)
        measured, slow_ranks = watch.end(r)
        if slow_ranks is not None:
            progress.say(f"step {step}  {slow_ranks}")
        record = {
            "step": step,
            "loss": tally.mean_loss + penalty * tally.penalty / tally.tokens,
            "cross_entropy": tally.mean_loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "mean_steps": tally.mean_steps,
            "samples": samples,
            "penalty": tally.penalty / tally.tokens,
            "penalty_weight": penalty,
            "refinements": r,
            "step_histogram": tally.steps,
            **measured,
        }
        last = step == training.steps
        if "valid" in parts.datasets and training.eval_interval and (last or step % training.eval_interval == 0):
            tally = validate(config, mesh, parts, engine)
            record |= {"validation_loss": tally.mean_loss, "validation_mean_steps": tally.mean_steps}
            progress.say(f"step {step}  validation loss {tally.mean_loss:.4f}  steps/token {tally.mean_steps:.2f}")
        if log is not None:
            log.write(record)
        progress.update(record)
        if last or step % config.checkpoint.interval == 0:
            verb = "saving" if config.checkpoint.asynchronous else "saved"
            progress.say(f"step {step}  {verb} {checkpointer.save(engine, step, samples)}")
    watch.close()


def validate(config: Config, mesh: Mesh, parts: RunParts, engine: Engine) -> Tally:
    """Cross-entropy and steps on the first validation samples, with the soft mask and the largest R of training."""
    dataset = parts.datasets["valid"]
    count = min(config.training.eval_samples, dataset.samples_per_epoch)
    r = config.ponder.evaluation_refinements
    own = validation_batches(dataset, count, config.training.micro_batch_size, mesh.data.rank, mesh.data.size)
    micro_batches = [tokens.to(mesh.device) for tokens in own]
    rounds = math.ceil(math.ceil(count / mesh.data.size) / config.training.micro_batch_size)
    return _sum_over_data_ranks(engine.evaluate(micro_batches, rounds, r, engine.pruning(hard=False)), mesh)


def check_replicas(engine: Engine, step: int) -> None:
    """Compare what tensor ranks hold replicated.

    Raises:
        UserError: if it has come to differ, after which they no longer train one model.
    """
    differing = engine.differing_replicas()
    if differing:
        raise UserError(
            f"after step {step}, {differing[0]} and {len(differing) - 1} more replicated parameters differ between "
            "tensor ranks, as faulty memory or a faulty link makes them; resume from the last checkpoint on other nodes"
        )


def _sum_over_data_ranks(sums: Tensor, mesh: Mesh) -> Tally:
    if mesh.data.size > 1:
        dist.all_reduce(sums, group=mesh.data.group)
    return Tally.of(sums)


def _headline(config: Config, mesh: Mesh, parts: RunParts, step: int) -> str:
    ponder, training = config.ponder, config.training
    steps = {"vanilla": "no additional steps", "fixed": f"{ponder.max_steps} additional steps"}.get(
        ponder.mode, f"up to {ponder.max_steps} additional steps"
    )
    start = f"going on after step {step}" if step else "starting"
    return (
        f"{start}: {config.model.family}, {ponder.mode}, {steps}; {training.precision} on {mesh.device.type}; "
        f"{parts.datasets['train'].samples_per_epoch:,} samples of {config.data.sequence_length} tokens an epoch, "
        f"{training.global_batch_size} a step"
    )
