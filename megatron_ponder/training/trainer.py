"""Training, from a configuration to a trained run folder."""

import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ponder.base.errors import describe
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.config import Config, data_parallel_size, to_yaml
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.runs.metrics import MetricsLog
from megatron_ponder.runs.plots import plot_training
from megatron_ponder.runs.progress_bar import RunProgress
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.runs.run_log import RunLog
from megatron_ponder.runs.starts import Phases, recorded
from megatron_ponder.training.agreement import check_same
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.interruption import Interruption
from megatron_ponder.training.loop import TrainingLoop
from megatron_ponder.training.memory_check import check_memory
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.resuming import check_resumable, find_resume, initial_weights, verify_together
from megatron_ponder.training.setup import RunParts, build_model, open_parts
from megatron_ponder.training.step_watch import StepWatch
from megatron_ponder.training.time_limit import seconds_left

logger = logging.getLogger(__name__)


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
    phases = Phases(signals.created)
    phases.mark("imports and process group")
    check_same(config)
    data_size = together(lambda: data_parallel_size(config, dist.get_world_size()))
    config, parts = together(lambda: open_parts(config))
    doubt = check_memory(config, data_size, device)
    if doubt is not None and dist.get_rank() == 0:
        logger.warning("warning: %s", doubt)  # now, since the system may end the run while its model is built
    with ExitStack() as stack:
        folder = RunFolder(Path(config.training.run_dir), to_yaml(config)) if dist.get_rank() == 0 else None
        together(lambda: stack.enter_context(folder) if folder is not None else None)
        _train_in(folder, config, parts, data_size, device, signals, phases, doubt)


def _train_in(
    folder: RunFolder | None,
    config: Config,
    parts: RunParts,
    data_size: int,
    device: torch.device,
    signals: StopSignals,
    phases: Phases,
    doubt: str | None,
) -> None:
    """Train in a folder that is this run's alone; it is None on all ranks but the first."""
    resumed, damage = find_resume(config)
    source = resumed or together(lambda: initial_weights(config))
    if resumed is None and source is not None:
        verify_together(source)
    fingerprints = (parts.data_fingerprint, parts.tokenizer.fingerprint if parts.tokenizer else None)
    manifest = None if resumed is None else together(lambda: check_resumable(resumed, config, *fingerprints))
    phases.mark("data and checkpoint")
    parallel = config.parallel
    mesh = build_mesh(device, parallel.tensor, parallel.pipeline, data_size, parallel.sequence_parallel)
    model = together(lambda: build_model(config, parts, mesh, source))
    run_dir, leader = Path(config.training.run_dir), folder is not None
    together(lambda: folder.write_config() if leader else None)
    phases.mark("model")
    engine = Engine(Objective(model, config.ponder_training.gradient_passes), config, mesh)
    phases.mark("DeepSpeed")
    start = manifest or Manifest()
    if start.step > 0:
        together(lambda: engine.restore(resumed, start.step - len(start.skipped)))
        phases.mark("restoring")
    tokenizer = Path(config.tokenizer.path) if parts.tokenizer else None
    together(lambda: parts.datasets["train"].prepare(start.samples))
    log = together(lambda: MetricsLog(run_dir, config.logging, start.step, asdict(config)) if leader else None)
    lines = together(lambda: RunLog(run_dir) if leader else None)
    with ExitStack() as stack:
        if leader:
            stack.callback(log.close)
            stack.enter_context(recorded(folder, start.step, dist.get_world_size()))
        progress = stack.enter_context(
            RunProgress(config.training.steps, start.step, config.logging.interval, shown=leader, log=lines)
        )
        if doubt is not None and leader:
            lines.write(f"warning: {doubt}")
        for problem in damage:
            progress.say(f"warning: {problem}; it is passed over")
        progress.say(_headline(config, mesh, parts, start.step))
        progress.say(describe_layout(config, mesh))
        progress.say(f"ready after {phases}")
        boundary = Boundary(signals, seconds_left(config, signals), mesh)
        checkpointer = stack.enter_context(Checkpointer(config, tokenizer, fingerprints, mesh))
        watchdog = stack.enter_context(Watchdog(config.training.step_timeout))
        watch = StepWatch(config, mesh, model.transformer)
        interruption = Interruption(signals, mesh)
        engine.allow(interruption)
        running = boundary, interruption, watchdog, watch
        loop = TrainingLoop(config, mesh, parts, engine, checkpointer, *running, folder, log, progress, start)
        loop.run()
        if leader:
            try:
                progress.say(f"loss plot in {plot_training(run_dir)}")
            except OSError as error:  # a picture is not worth an error
                progress.say(f"warning: no loss plot: {describe(error)}")


def _headline(config: Config, mesh: Mesh, parts: RunParts, step: int) -> str:
    ponder, training = config.ponder, config.training
    limit = "up to " if ponder.mode == "adaptive" else ""
    steps = f"{limit}{ponder.steps or 'no'} additional steps"
    start = f"going on after step {step}" if step else "starting"
    return (
        f"{start}: {config.model.description}, {ponder.mode}, {steps}; {training.precision} on {mesh.device.type}; "
        f"{parts.datasets['train'].samples_per_epoch:,} samples of {config.data.sequence_length} tokens an epoch, "
        f"{training.global_batch_size} a step"
    )
