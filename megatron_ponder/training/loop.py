"""The training loop."""

import math
from contextlib import closing
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import Preempted, UserError
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.checkpoint.folders import checkpoint_name
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config, micro_batches
from megatron_ponder.config.batch_sizes import batch_size
from megatron_ponder.config.layout import own_length
from megatron_ponder.data.dataset import Share
from megatron_ponder.data.loader import batches
from megatron_ponder.data.mixture import validation_sets
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.spans import span
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import Value
from megatron_ponder.runs.run_output import Silence
from megatron_ponder.training import records
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.careful_reader import CarefulReader
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.interruption import Abandoned, Interruption
from megatron_ponder.training.loss_spikes import LossSpikes
from megatron_ponder.training.out_of_memory import out_of_memory_explained
from megatron_ponder.training.penalty import Penalty
from megatron_ponder.training.profiler import FOLDER, Profiler
from megatron_ponder.training.replicas import allowed_drift, mend_replicas
from megatron_ponder.training.schedules import StepPlan, plan_step
from megatron_ponder.training.setup import RunParts
from megatron_ponder.training.skipped_steps import SkippedSteps
from megatron_ponder.training.state import state_of
from megatron_ponder.training.step_costs import StepCosts
from megatron_ponder.training.step_watch import StepWatch
from megatron_ponder.training.task_evaluator import TaskEvaluator
from megatron_ponder.training.time_limit import seconds_left
from megatron_ponder.training.validation import measure_each_step
from megatron_ponder.training.validation_sets import ValidationSets


class TrainingLoop:
    """Takes steps, validates and saves, until all are done, somebody asks it to stop, or it cannot go on."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        parts: RunParts,
        engine: Engine,
        state: RunState,
        output: Silence,
        signals: StopSignals,
        last_step: int,
    ) -> None:
        """Prepare; a collective of all ranks.

        Args:
            config: resolved, of the phase of the run.
            mesh: the ranks.
            parts: of the run.
            engine: with the state of the start.
            state: of the run, which the loop goes on changing.
            output: where this rank tells what happens.
            signals: that end the run early.
            last_step: optimiser steps of the run at the end of the phase.
        """
        training = config.training
        self._config, self._mesh, self._engine = config, mesh, engine
        self._state, self._saved_step, self._last_step, self._output = state, state.step, last_step, output
        self._unsaved: UserError | None = None
        self._batch = batch_size(training, state.samples)  # of the step under way
        self._routed = passes_of(config.ponder).routed
        self._boundary = Boundary(signals, seconds_left(config, signals), mesh)
        self._checkpointer = Checkpointer(config, parts.tokenizer_path, parts.fingerprints, mesh)
        self._watchdog = Watchdog(training.step_timeout)
        self._costs = StepCosts(config)
        self._watch = StepWatch(config, mesh, engine.model.transformer)
        self._profiler = Profiler(training, dist.get_rank(), dist.get_world_size(), mesh.device, output)
        self._interruption = Interruption(signals, mesh)
        engine.allow(self._interruption)
        self._penalty, self._skipped = Penalty(config, state), SkippedSteps(state, training)
        self._spikes = LossSpikes(config.logging.spike_threshold, output.losses)
        self._loader = batches(
            parts.datasets["train"],
            state.samples,
            partial(batch_size, training),
            training.micro_batch_size,
            mesh.data.rank,
            mesh.data.size,
            config.data.num_workers,
            pin_memory=mesh.device.type == "cuda",
            vocab_size=config.model.vocab_size,
            share=Share(mesh.context.rank, mesh.context.size),
        )
        self._reader = CarefulReader((training.micro_batch_size, own_length(config) + 1))
        self._validation = None
        if sets := validation_sets(parts.datasets, config.data):
            self._validation = ValidationSets(config, mesh, sets, engine, self._boundary, self._watchdog)
        state.validated = state.validated or self._validation is None
        self._tasks = TaskEvaluator(config, self._boundary, self._watchdog, output) if config.tasks.names else None

    def run(self) -> Path:
        """Train.

        Returns:
            The folder of the last checkpoint.

        Raises:
            UserError: on every rank, for whatever the user has to change.
            Preempted: on every rank, after a checkpoint.
        """
        # The loader is closed, or its processes keep this one from ending.
        full = out_of_memory_explained(Path(self._config.training.run_dir) / FOLDER, dist.get_rank())
        with full, self._checkpointer, self._watchdog, closing(self._loader), self._profiler:
            self._run()
        return self._checkpointer.folder / checkpoint_name(self._saved_step)

    def _run(self) -> None:
        training, boundary, state = self._config.training, self._boundary, self._state
        if not state.validated:  # the start before was stopped in it, or this is the first
            with self._watchdog.paused():
                fields = self._validate()
            if fields:
                self._output.complete(state.step, fields)
            if boundary.stop and state.step > 0:
                self._save()
        if self._scored_here() and not boundary.stop and self._tasks.lacks(state.step):
            self._tasks.run(state.step)
        while state.step < self._last_step and not boundary.stop and not self._skipped.too_many(state.step):
            try:
                record = self._take_step()
            except Abandoned as abandoned:
                boundary.stop = abandoned.reason
                self._output.say(f"step {state.step + 1} is given up; it has changed nothing")
                if self._saved_step != state.step:
                    self._save()
                break
            self._judge(record)
            if self._validation is not None and self._due(training.eval_interval):
                record |= self._validate()
            self._output.record(record)
            saves = self._due(self._config.checkpoint.interval) or self._scored_here()
            if boundary.stop or self._skipped.too_many(state.step) or saves:
                self._save()
            if self._scored_here() and not boundary.stop:
                self._evaluate_tasks()
            self._profiler.end(state.step)
        self._end()

    def _take_step(self) -> dict[str, Value]:
        """Take one optimiser step.

        Returns:
            Its record.
        """
        state = self._state
        if (change := self._costs.change(state.step)) is not None:
            self._output.say(f"step {state.step}  {change}")
        self._grow_batch()
        self._profiler.begin(state.step + 1)
        self._boundary.begin(self._checkpointer.seconds)
        self._watch.begin()
        plan = plan_step(state.step, self._config, self._penalty.weight(state.step))
        own_batches = self._read()
        self._watch.mark()
        own = self._measure_each_step(own_batches, plan)
        with self._interruption.possible(self._boundary.step_seconds):
            sums = self._engine.forward_backward(
                own_batches, plan.refinements, plan.rule, self._penalty.weights(state.step), self._scale()
            )
        self._watch.mark()
        norm = self._engine.step(plan.learning_rate)
        self._watch.mark()
        tally = self._cross(sums)
        routes = self._routed and plan.rule.latents
        if routes and math.isfinite(norm):
            self._penalty.observe(state.step, tally.mean_steps, tally.mean_shares)
        flops = self._costs.flops(plan, tally)
        state.advance(self._batch, tally.tokens, flops)
        self._watchdog.beat()
        self._tell_news()
        drift = self._mend_replicas()
        return {
            "step": state.step,
            "samples": state.samples,
            "tokens": state.tokens,
            "steps_left": self._costs.left(state.step, state.samples, self._batch),
            "training_flops": state.training_flops,
            "grad_norm": norm,
            **records.rate_fields(plan.learning_rate, self._config, self._routed),
            "penalty_weight": plan.penalty_weight,
            "refinements": plan.refinements,
            **records.step_fields(tally, plan.penalty_weight, self._penalty.of(tally)),
            **(records.router_fields(tally, self._config.ponder.steps) if routes else {}),
            **records.scale_fields(self._engine.model.latent_scale),
            **own,
            **drift,
            **self._end_watch(flops, tally),
        }

    # Parts of a step, in their order -------------------------------------------------------------------------------

    def _grow_batch(self) -> None:
        """Take the global batch of the step, and say so where it is not that of the one before."""
        before, self._batch = self._batch, batch_size(self._config.training, self._state.samples)
        if self._batch != before:
            self._output.say(f"step {self._state.step}  from here a step is {counted(self._batch, 'sequence')}")

    def _read(self) -> list[Tensor]:
        """Read this rank's micro-batches of the step, onto its device."""
        with span("data"):
            count = micro_batches(self._config, self._mesh.data.size, self._batch)
            read = self._reader.read(self._loader, count)
            return [tokens.to(self._mesh.device, non_blocking=True) for tokens in read]

    def _measure_each_step(self, own_batches: list[Tensor], plan: StepPlan) -> dict[str, Value]:
        """Measure, every so often, what every latent step predicts by itself."""
        interval = self._config.logging.own_losses_interval
        if not (self._routed and plan.rule.latents) or interval <= 0 or (self._state.step + 1) % interval:
            return {}
        with self._watch.aside():
            tally = measure_each_step(self._mesh, self._engine, own_batches, plan.refinements, plan.rule)
            return records.each_step_fields(tally)

    def _scale(self) -> float:
        """Factor on the sum over tokens; of what could not be read nothing must be learnt.

        All ranks skip a step whose loss is not a number, and then end together.
        """
        tokens = self._batch * self._config.data.sequence_length
        return math.nan if self._reader.problem else 1 / tokens

    def _cross(self, sums: Tensor) -> Tally:
        """The tally of the whole step, after which all ranks know whether to stop."""
        try:
            return Tally.of(self._boundary.cross(sums, self._reader.problem))
        except UserError:
            self._save()
            raise

    def _mend_replicas(self) -> dict[str, Value]:
        """Compare what ranks hold alike, every so often and before what is saved."""
        step, interval = self._state.step, self._config.parallel.replica_check_interval
        saves = self._boundary.stop or self._due(self._config.checkpoint.interval)
        if not interval or not (saves or self._step_is_multiple_of(interval)):
            return {}
        allowed = allowed_drift(self._config, self._mesh.device)
        drift = together(partial(mend_replicas, self._engine, step, allowed, self._remedy()))
        if drift is None:
            return {}
        what = f"{counted(drift.parameters, 'parameter')} had drifted apart by {drift.size:.1e} of their norm"
        self._output.say(f"step {step}  warning: {what}; all ranks have the first one's again")
        return {"replica_drift": drift.size}

    def _remedy(self) -> str:
        """How to go on after a state that is worth nothing."""
        if not self._saved_step:
            return "nothing is saved yet, start again"
        return f"resume from {self._checkpointer.folder / checkpoint_name(self._saved_step)}"

    def _tell_news(self) -> None:
        """Tell what has happened beside the steps: of compiled graphs, and of exports."""
        compiled = self._engine.model.transformer.compiled
        graphs = None if compiled is None else compiled.news()
        for news in (*[graphs] * bool(graphs), *self._checkpointer.news()):
            self._output.say(f"step {self._state.step}  {news}")

    def _end_watch(self, flops: float, tally: Tally) -> dict[str, Value]:
        measured, slow_ranks = self._watch.end(flops, tally.slots, tally.tokens)
        if slow_ranks is not None:
            self._output.say(f"step {self._state.step}  {slow_ranks}")
        return measured

    # Between steps ---------------------------------------------------------------------------------------------------

    def _judge(self, record: dict) -> None:
        """Say when a step was skipped or its loss is out of line, with its samples, and note it in the record."""
        step, loss, last = self._state.step, record["loss"], self._state.samples - 1
        samples = f"samples {last - self._batch + 1:,} to {last:,}"
        if self._skipped.note(step, record["grad_norm"]):
            record["skipped"] = True
            what = "loss" if not math.isfinite(loss) else "gradients"
            self._output.say(f"step {step}  warning: skipped, its {what} not finite ({samples})")
        elif (score := self._spikes.score(loss)) is not None:
            record["loss_spike"] = score
            self._output.say(f"step {step}  warning: loss {loss:.4f}, {score:.0f} deviations up ({samples})")

    def _validate(self) -> dict[str, Value]:
        """Fields of the record; none if the run is to stop before they are known."""
        state = self._state
        state.validated = False
        try:
            found = self._validation.run(state.step)
        except UserError:
            if state.step > 0:
                self._save()
            raise
        state.validated = found is not None
        if found is None:
            return {}
        for line in found.said:
            self._output.say(line)
        return found.fields

    def _save(self) -> None:
        """Save, or begin to; if that fails, training goes on all the same.

        Raises:
            UserError: on every rank, if the run's folder is another run's by now.
        """
        together(self._output.check_folder)
        self._unsaved = None
        with self._watchdog.paused(), span("checkpoint"):
            try:
                folder = self._checkpointer.save(state_of(self._engine), self._state)
            except UserError as error:
                self._unsaved = error
                self._output.say(f"step {self._state.step}  warning: not saved, training goes on: {error}")
                return
        self._saved_step = self._state.step
        verb = "saving" if self._config.checkpoint.asynchronous else "saved"
        self._output.say(f"step {self._state.step}  {verb} {folder}")

    def _scored_here(self) -> bool:
        """Whether tasks are evaluated after this step."""
        return self._tasks is not None and self._tasks.due(self._state.step)

    def _evaluate_tasks(self) -> None:
        """Evaluate the tasks on what has been saved, if it has been."""
        try:
            with self._watchdog.paused():
                self._checkpointer.finish()
        except UserError as error:
            self._unsaved = error
        if self._unsaved is None:
            self._tasks.run(self._state.step)

    def _end(self) -> None:
        step, stop = self._state.step, self._boundary.stop
        self._watch.close()
        with self._watchdog.paused():
            self._checkpointer.finish()
            self._checkpointer.end_exports(at_once=stop is not None)
        self._tell_news()
        if self._unsaved is not None:
            raise self._unsaved
        folder = self._checkpointer.folder / checkpoint_name(step)
        complaint = self._skipped.too_many(step)
        if complaint is not None:
            raise UserError(f"{complaint}; saved {folder}", shared=True)
        cut_off = not self._state.validated or (self._tasks is not None and self._tasks.pending)
        if stop and (step < self._config.training.steps or cut_off):
            where = f"checkpoint {folder}" if step > 0 else "there is nothing to save yet"
            message = f"stopped at step {step} by {stop}; {where}; resume with --checkpoint.resume auto"
            self._output.say(message)
            raise Preempted(stop, message)

    def _due(self, interval: int) -> bool:
        """Tell whether the time has come for something that is done every so often, and at the end."""
        return self._step_is_multiple_of(interval) or (interval > 0 and self._state.step == self._last_step)

    def _step_is_multiple_of(self, interval: int) -> bool:
        return interval > 0 and self._state.step % interval == 0
