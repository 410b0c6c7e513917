"""The training loop, from a configuration to a trained run folder."""

import math
import time
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.checkpoint.store import Manifest, checkpoint_name
from megatron_ponder.config import Config, data_parallel_size, to_yaml
from megatron_ponder.data.loader import batches, validation_batches
from megatron_ponder.errors import Preempted, UserError
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
from megatron_ponder.training.metrics import MetricsLog, RunProgress, prepare_run_dir
from megatron_ponder.training.objective import Objective, Tally
from megatron_ponder.training.preemption import Boundary, StopSignals, seconds_left
from megatron_ponder.training.schedules import learning_rate, penalty_weight, refinements
from megatron_ponder.training.setup import RunParts, build_model, open_parts
from megatron_ponder.training.starts import recorded


def train(config: Config, device: torch.device, signals: StopSignals | None = None) -> None:
    """Train, or go on training, in the configured run folder.

    Args:
        config: resolved and validated.
        device: of this rank, inside a process group.
        signals: that end the run early; None for none.

    Raises:
        UserError: on every rank, for whatever the user has to change.
        Preempted: on every rank, when a signal or the time limit has ended the run early, after a checkpoint.
    """
    signals = signals or StopSignals()
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
    start = manifest or Manifest()
    if start.step > 0:
        together(lambda: engine.restore(resumed, start.step))
    tokenizer = Path(config.tokenizer.path) if parts.tokenizer else None
    together(lambda: parts.datasets["train"].prepare(start.samples))
    log = together(lambda: MetricsLog(run_dir, config.logging, start.step) if leader else None)
    with ExitStack() as stack:
        if leader:
            stack.callback(log.close)
            stack.enter_context(recorded(run_dir, start.step, dist.get_world_size()))
        progress = stack.enter_context(
            RunProgress(config.training.steps, start.step, config.logging.interval, shown=leader)
        )
        progress.say(_headline(config, mesh, parts, start.step))
        progress.say(describe_layout(config, mesh))
        boundary = Boundary(signals, seconds_left(config, signals), mesh)
        checkpointer = stack.enter_context(Checkpointer(config, tokenizer, fingerprints, mesh))
        _loop(config, mesh, parts, engine, checkpointer, boundary, log, progress, start)
    if leader:
        print(f"loss plot in {plot_training(run_dir)}", flush=True)


def _loop(
    config: Config,
    mesh: Mesh,
    parts: RunParts,
    engine: Engine,
    checkpointer: Checkpointer,
    boundary: Boundary,
    log: MetricsLog | None,
    progress: RunProgress,
    start: Manifest,
) -> None:
    training = config.training
    pruning = engine.pruning(hard=False)
    tokens_per_step = training.global_batch_size * config.data.sequence_length
    step, samples, validated = start.step, start.samples, start.validated or "valid" not in parts.datasets
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

    def validate_now() -> dict[str, float]:
        tally = validate(config, mesh, parts, engine, boundary)
        if tally is None:
            return {}
        progress.say(f"step {step}  validation loss {tally.mean_loss:.4f}  steps/token {tally.mean_steps:.2f}")
        return {"validation_loss": tally.mean_loss, "validation_mean_steps": tally.mean_steps}

    def save() -> None:
        verb = "saving" if config.checkpoint.asynchronous else "saved"
        progress.say(f"step {step}  {verb} {checkpointer.save(engine, step, samples, validated)}")

    if not validated:
        fields = validate_now()
        validated = bool(fields)
        if log is not None and validated:
            log.complete(step, fields)
        if boundary.stop:
            save()
    while step < training.steps and not boundary.stop:
        boundary.begin(checkpointer.seconds)
        started = time.perf_counter()
        rate = learning_rate(step, training.steps, config.optimizer)
        penalty = penalty_weight(step, config.ponder)
        r = refinements(step, training.seed, config.ponder)
        micro_batches = [tokens.to(mesh.device, non_blocking=True) for tokens in next(loader)]
        sums = engine.forward_backward(micro_batches, r, pruning, penalty, scale=1 / tokens_per_step)
        norm = engine.step(rate)
        step, samples = step + 1, samples + training.global_batch_size
        interval = config.parallel.replica_check_interval
        if mesh.tensor.size > 1 and interval and step % interval == 0:
            together(partial(check_replicas, engine, step))
        tally = Tally.of(boundary.cross(sums))
        record = {
            "step": step,
            "loss": tally.mean_loss + penalty * tally.penalty / tally.tokens,
            "cross_entropy": tally.mean_loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "mean_steps": tally.mean_steps,
            "tokens_per_second": tokens_per_step / (time.perf_counter() - started),
            "samples": samples,
            "penalty": tally.penalty / tally.tokens,
            "penalty_weight": penalty,
            "refinements": r,
            "step_histogram": tally.steps,
        }
        last = step == training.steps
        if "valid" in parts.datasets and training.eval_interval and (last or step % training.eval_interval == 0):
            fields = validate_now()
            validated = bool(fields)
            record |= fields
        if log is not None:
            log.write(record)
        progress.update(record)
        if last or boundary.stop or step % config.checkpoint.interval == 0:
            save()
    checkpointer.finish()
    if boundary.stop and (step < training.steps or not validated):
        folder = checkpointer.folder / checkpoint_name(step)
        message = (
            f"stopped at step {step} by {boundary.stop}; checkpoint {folder}; resume with --checkpoint.resume auto"
        )
        progress.say(message)
        raise Preempted(boundary.stop, message)


def validate(
    config: Config, mesh: Mesh, parts: RunParts, engine: Engine, boundary: Boundary | None = None
) -> Tally | None:
    """Cross-entropy and steps on the first validation samples, with the soft mask and the largest R of training.

    Returns:
        None if the boundary, which is asked between micro-batches, says that the run is to stop.
    """
    dataset = parts.datasets["valid"]
    count = min(config.training.eval_samples, dataset.samples_per_epoch)
    r, pruning = config.ponder.evaluation_refinements, engine.pruning(hard=False)
    own = validation_batches(dataset, count, config.training.micro_batch_size, mesh.data.rank, mesh.data.size)
    rounds = math.ceil(math.ceil(count / mesh.data.size) / config.training.micro_batch_size)
    at_once = mesh.pipeline.size  # micro-batches that fill a pipeline
    sums = 0
    for start in range(0, rounds, at_once):
        if boundary is not None and boundary.poll():
            return None
        micro_batches = [tokens.to(mesh.device) for tokens in islice(own, at_once)]
        sums = sums + engine.evaluate(micro_batches, min(at_once, rounds - start), r, pruning)
    return Tally.of(_sum_over_data_ranks(sums, mesh))


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


def _sum_over_data_ranks(sums: Tensor, mesh: Mesh) -> Tensor:
    if mesh.data.size > 1:
        dist.all_reduce(sums, group=mesh.data.group)
    return sums


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
