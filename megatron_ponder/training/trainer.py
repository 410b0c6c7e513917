"""Training, from a configuration to a trained run folder."""

import gc
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ponder.base.counts import counted
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.checkpoint.folders import is_hugging_face
from megatron_ponder.config import Config, TrainingPhase, data_parallel_size, to_yaml, training_phases
from megatron_ponder.config.batch_sizes import batch_sizes
from megatron_ponder.data.mixture import validation_sets
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.runs.run_output import RunOutput, Silence
from megatron_ponder.runs.starts import Durations
from megatron_ponder.training.agreement import check_same
from megatron_ponder.training.compiling import compile_blocks
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.initial_weights import build_model, said_of
from megatron_ponder.training.loop import TrainingLoop
from megatron_ponder.training.memory_check import check_memory
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.resuming import Resumption, Start, find_resume, make_start
from megatron_ponder.training.setup import RunParts, open_parts, reopen_parts
from megatron_ponder.training.state import restore
from megatron_ponder.training.task_evaluator import check_tasks

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
    durations = Durations(signals.created)
    durations.mark("imports and process group")
    check_same(config)
    data_size = together(lambda: data_parallel_size(config, dist.get_world_size()))
    config, parts = together(lambda: open_parts(config))
    phases = training_phases(config)
    opened = together(lambda: [parts, *(reopen_parts(parts, phase.config) for phase in phases[1:])])
    together(lambda: check_tasks(config, parts.tokenizer_path) if dist.get_rank() == 0 else None)
    doubts = [check_memory(phase.config, data_size, device) for phase in phases]
    doubt = next(filter(None, doubts), None)
    if doubt is not None and dist.get_rank() == 0:
        logger.warning("warning: %s", doubt)  # now, since the system may end the run while its model is built
    with ExitStack() as stack:
        folder = RunFolder(Path(config.training.run_dir), to_yaml(config)) if dist.get_rank() == 0 else None
        together(lambda: None if folder is None else stack.enter_context(folder))
        found = find_resume(config)
        first_step = together(lambda: found.step)
        durations.mark("data and checkpoint")
        mesh = build_mesh(device, config.parallel)
        output = None

        def open_output() -> Silence:
            """The output of the run, opened where nothing can be refused any more, by the first phase that is run."""
            nonlocal output
            if output is None:
                output = stack.enter_context(together(lambda: _output(folder, config, first_step)))
                if doubt is not None:
                    output.note(f"warning: {doubt}")
            return output

        begun = sum(phase.first_step <= first_step for phase in phases) - 1
        for phase, its_parts in zip(phases[begun:], opened[begun:], strict=True):
            opening = _allowing(phase, max(first_step, phase.first_step))
            last = _train_phase(phase, opening, its_parts, found, mesh, folder, open_output, durations, signals)
            found = Resumption(last, [])
            gc.collect()  # of the engine, whose memory the next one needs
            durations = Durations(time.monotonic())
        output.draw()


def _train_phase(
    phase: TrainingPhase,
    opening: Config,
    parts: RunParts,
    found: Resumption,
    mesh: Mesh,
    folder: RunFolder | None,
    open_output: Callable[[], Silence],
    durations: Durations,
    signals: StopSignals,
) -> Path:
    """Train one phase, from the checkpoint that there is to the phase's last step.

    Args:
        phase: of the run.
        opening: its configuration for going on from the checkpoint, see `_allowing`.
        parts: of the phase.
        found: the checkpoint, or none.
        mesh: the ranks.
        folder: of the run, on its first rank.
        open_output: gives where this rank tells what happens.
        durations: of the parts of this start.
        signals: that end the run early.

    Returns:
        The folder of the last checkpoint.
    """
    config = phase.config
    start = make_start(opening, found, *parts.fingerprints)
    model = together(lambda: build_model(opening, parts, mesh, start.weights))
    together(lambda: None if folder is None else _write_beginning(folder, parts))
    durations.mark("model")
    engine = Engine(
        Objective(model, config.ponder_training.gradient_passes, config.ponder_training.packed), config, mesh
    )
    durations.mark("DeepSpeed")
    together(lambda: compile_blocks(model, config, mesh.device))  # now, or the engine's dry step would be compiled too
    if start.state.step > 0:  # or it has weights alone
        together(lambda: restore(engine, start.resumed, start.state.updates))
        durations.mark("restoring")
    together(lambda: parts.datasets["train"].prepare(start.state.samples))
    output = open_output()
    for problem in start.doubts:
        output.say(f"warning: {problem}")
    if start.weights is not None and is_hugging_face(start.weights):
        output.say(f"starting from {start.weights}, which says {said_of(start.weights, config)}")
    output.say(_headline(config, mesh, parts, start))
    for change in start.changes:
        output.say(change)
    if config.data.validation or not validation_sets(parts.datasets, config.data):
        output.say(_validation_sets(config, parts))
    output.say(describe_layout(config, mesh.data.size, mesh.device.type))
    output.note(engine.description)
    output.say(f"ready after {durations}")
    return TrainingLoop(config, mesh, parts, engine, start.state, output, signals, phase.last_step).run()


def _allowing(phase: TrainingPhase, step: int) -> Config:
    """The configuration of a phase, which at its beginning may be of other data and positions than the checkpoint."""
    checkpoint = phase.config.checkpoint
    if step == phase.first_step > 0:
        checkpoint = replace(checkpoint, allow_data_change=True, allow_rope_change=True)
    return replace(phase.config, checkpoint=checkpoint)


def _write_beginning(folder: RunFolder, parts: RunParts) -> None:
    folder.write_config()
    parts.keep_tokenizer()


def _output(folder: RunFolder | None, config: Config, first_step: int) -> Silence:
    """The output of this rank: full where it holds the run's folder, silent elsewhere."""
    return Silence() if folder is None else RunOutput(folder, config, first_step, dist.get_world_size())


def _headline(config: Config, mesh: Mesh, parts: RunParts, start: Start) -> str:
    ponder, training = config.ponder, config.training
    sizes = batch_sizes(training)
    limit = "up to " if ponder.mode == "adaptive" else ""
    steps = f"{limit}{ponder.steps or 'no'} latent steps"
    step = start.state.step
    begins = f"going on after step {step}" if step else "starting"
    if step and start.resumed.parent.parent != Path(training.run_dir):
        begins += f" of {start.resumed}"
    return (
        f"{begins}: {config.model.description}, {ponder.mode}, {steps}; {training.precision} on {mesh.device.type}; "
        f"{counted(parts.datasets['train'].samples_per_epoch, 'sample')} of "
        f"{counted(config.data.sequence_length, 'token')} an epoch, "
        f"{' to '.join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))} a step"
    )


def _validation_sets(config: Config, parts: RunParts) -> str:
    """How many samples a validation reads of each set, which may hold fewer than it is to read, or that it has none."""
    sets, most = validation_sets(parts.datasets, config.data), config.training.eval_samples
    if not sets:
        return "no validation, because data.split leaves nothing for it"
    counts = (f"{counted(min(most, samples.samples_per_epoch), 'sample')} of {name}" for name, samples in sets.items())
    return f"validation on {', '.join(counts)}"
