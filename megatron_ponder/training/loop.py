"""The training loop."""

import math
from contextlib import closing
from dataclasses import replace
from functools import partial

from megatron_ponder.base.errors import Preempted, UserError
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.checkpoint.manifest import Manifest, checkpoint_name
from megatron_ponder.config import Config, micro_batches
from megatron_ponder.data.loader import batches
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import MetricsLog, Value
from megatron_ponder.runs.progress_bar import RunProgress, nats
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.careful_reader import CarefulReader
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.interruption import Abandoned, Interruption
from megatron_ponder.training.loss_spikes import WINDOW, LossSpikes
from megatron_ponder.training.penalty import Penalty, PenaltyState
from megatron_ponder.training.router_health import router_complaint
from megatron_ponder.training.schedules import learning_rate, refinements, training_rule
from megatron_ponder.training.setup import RunParts
from megatron_ponder.training.skipped_steps import SkippedSteps
from megatron_ponder.training.step_watch import StepWatch
from megatron_ponder.training.validation import measure_each_step, validate


class TrainingLoop:
    """Takes steps, validates and saves, until all steps are done, somebody asks it to stop, or it cannot go on."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        parts: RunParts,
        engine: Engine,
        checkpointer: Checkpointer,
        boundary: Boundary,
        interruption: Interruption,
        watchdog: Watchdog,
        watch: StepWatch,
        folder: RunFolder | None,
        log: MetricsLog | None,
        progress: RunProgress,
        start: Manifest,
    ) -> None:
        """Prepare.

        Args:
            config: resolved.
            mesh: the ranks.
            parts: of the run.
            engine: with the state of the start.
            checkpointer: of the run folder.
            boundary: where ranks agree on whether to stop.
            interruption: where they do within a step.
            watchdog: told of every step.
            watch: takes the time of every step.
            folder: of the run, on the first rank alone.
            log: on the first rank alone.
            progress: says what happens.
            start: of the checkpoint to go on from, or an empty one.
        """
        self._config, self._mesh, self._parts, self._engine = config, mesh, parts, engine
        self._checkpointer, self._boundary, self._watchdog = checkpointer, boundary, watchdog
        self._interruption, self._saved_step = interruption, start.step
        self._watch, self._folder, self._log, self._progress = watch, folder, log, progress
        self._step, self._samples = start.step, start.samples
        self._validated = start.validated or "valid" not in parts.datasets
        self._skipped = SkippedSteps(start.skipped, config.training)
        losses = [] if log is None else [record["loss"] for record in log.kept[-WINDOW:]]
        self._penalty = Penalty(
            config.ponder_training, config.ponder.latent_steps, PenaltyState(start.penalty_factor, start.penalty_steps)
        )
        self._spikes = LossSpikes(config.logging.spike_threshold, losses)
        self._unsaved: UserError | None = None
        self._routed = passes_of(config.ponder).routed
        training = config.training
        self._loader = batches(
            parts.datasets["train"],
            start.samples,
            training.global_batch_size,
            training.micro_batch_size,
            mesh.data.rank,
            mesh.data.size,
            config.data.num_workers,
            pin_memory=mesh.device.type == "cuda",
            vocab_size=config.model.vocab_size,
        )
        self._reader = CarefulReader((training.micro_batch_size, config.data.sequence_length + 1))
        self._micro_batches = micro_batches(config, mesh.data.size)

    def run(self) -> None:
        """Train.

        Raises:
            UserError: on every rank, for whatever the user has to change.
            Preempted: on every rank, after a checkpoint.
        """
        with closing(self._loader):  # or its processes keep this one from ending
            self._run()

    def _run(self) -> None:
        training, boundary = self._config.training, self._boundary
        if not self._validated:  # the start before was stopped in it
            fields = self._validate()
            if self._log is not None and fields:
                self._log.complete(self._step, fields)
            if boundary.stop:
                self._save()
        while self._step < training.steps and not boundary.stop and not self._skipped.too_many(self._step):
            try:
                record = self._take_step()
            except Abandoned as abandoned:
                boundary.stop = abandoned.reason
                self._progress.say(f"step {self._step + 1} is given up; it has changed nothing")
                if self._saved_step != self._step:
                    self._save()
                break
            self._judge(record)
            if "valid" in self._parts.datasets and self._due(training.eval_interval):
                record |= self._validate()
            if self._log is not None:
                self._log.write(record)
            self._progress.update(record)
            if boundary.stop or self._skipped.too_many(self._step) or self._due(self._config.checkpoint.interval):
                self._save()
        self._end()

    def _take_step(self) -> dict[str, float | int | list]:
        """One optimiser step; its record."""
        config, step = self._config, self._step
        training = config.training
        self._boundary.begin(self._checkpointer.seconds)
        self._watch.begin()
        rate = learning_rate(step, training.steps, config.optimizer)
        penalty = self._penalty.weight(step)
        r = refinements(step, training.seed, config.ponder_training)
        micro_batches = self._reader.read(self._loader, self._micro_batches)
        micro_batches = [tokens.to(self._mesh.device, non_blocking=True) for tokens in micro_batches]
        self._watch.mark()
        rule, own = training_rule(step, config.ponder_training, config.inference.threshold), {}
        interval = self._config.logging.own_losses_interval
        if self._routed and interval > 0 and (step + 1) % interval == 0:
            with self._watch.aside():
                own = _own(measure_each_step(self._mesh, self._engine, micro_batches, r, rule))
        tokens_per_step = training.global_batch_size * self._config.data.sequence_length
        # Of what could not be read nothing must be learnt: all ranks skip the step, and then end together.
        scale = math.nan if self._reader.problem else 1 / tokens_per_step
        with self._interruption.possible(self._boundary.step_seconds):
            sums = self._engine.forward_backward(micro_batches, r, rule, penalty, scale)
        self._watch.mark()
        norm = self._engine.step(rate)
        self._watch.mark()
        try:
            tally = Tally.of(self._boundary.cross(sums, self._reader.problem))
        except UserError:
            self._save()
            raise
        if self._routed and math.isfinite(norm):
            self._penalty.observe(step, tally.mean_steps)
        self._step, self._samples = step + 1, self._samples + training.global_batch_size
        self._watchdog.beat()
        if self._mesh.tensor.size > 1 and self._step_is_multiple_of(self._config.parallel.replica_check_interval):
            together(partial(check_replicas, self._engine, self._step))
        measured, slow_ranks = self._watch.end(r)
        if slow_ranks is not None:
            self._progress.say(f"step {self._step}  {slow_ranks}")
        return {
            "step": self._step,
            "loss": tally.mean_loss + penalty * tally.penalty / tally.tokens,
            "cross_entropy": tally.mean_loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "mean_steps": tally.mean_steps,
            "samples": self._samples,
            "penalty": tally.penalty / tally.tokens,
            "penalty_weight": penalty,
            "refinements": r,
            "step_histogram": tally.steps,
            **(self._of_router(tally) if self._routed else {}),
            **own,
            **measured,
        }

    def _of_router(self, tally: Tally) -> dict[str, float]:
        below = 1 - tally.mean_steps / self._config.ponder.steps
        return {"router_entropy": tally.entropy / tally.tokens, "below_threshold": below}

    def _judge(self, record: dict) -> None:
        """Say when a step was skipped or its loss is out of line, with its samples, and note it in the record."""
        loss = record["loss"]
        samples = f"samples {self._samples - self._config.training.global_batch_size:,} to {self._samples - 1:,}"
        if self._skipped.note(self._step, record["grad_norm"]):
            record["skipped"] = True
            what = "loss" if not math.isfinite(loss) else "gradients"
            self._progress.say(f"step {self._step}  warning: skipped, its {what} not finite ({samples})")
        elif (score := self._spikes.score(loss)) is not None:
            record["loss_spike"] = score
            self._progress.say(f"step {self._step}  warning: loss {loss:.4f}, {score:.0f} deviations up ({samples})")

    def _validate(self) -> dict[str, float]:
        """Fields of the record; none if the run is to stop before they are known."""
        self._validated = False
        config = self._config
        rule = training_rule(self._step - 1, config.ponder_training, config.inference.threshold)  # of the last step
        try:
            pruned = tally = self._measure(rule, each_step=True)
            if tally is not None and self._routed and rule.kind == "soft":
                pruned = self._measure(replace(rule, kind="hard"), each_step=False)
        except UserError:
            self._save()
            raise
        self._validated = pruned is not None
        if pruned is None:
            return {}
        loss, steps = tally.mean_loss, tally.mean_steps
        self._progress.say(f"step {self._step}  validation loss {nats(loss)}  steps/token {steps:.2f}")
        fields = {"validation_loss": loss, "validation_mean_steps": steps}
        if not self._routed:
            return fields
        cost = pruned.mean_loss - loss
        if complaint := router_complaint(tally, cost, self._step, config):
            self._progress.say(f"step {self._step}  warning: {complaint}")
        return fields | {
            "validation_pruned_loss": pruned.mean_loss,
            "validation_step_histogram": tally.steps,
            "validation_weights": [weight / tally.tokens for weight in tally.weights],
            "validation_router_entropy": tally.entropy / tally.tokens,
            **{f"validation_{name}": value for name, value in _own(tally).items()},
        }

    def _measure(self, rule: Rule, each_step: bool) -> Tally | None:
        parts = self._mesh, self._parts, self._engine
        return validate(self._config, *parts, rule, self._boundary, self._watchdog, each_step)

    def _save(self) -> None:
        """Save, or begin to; if that fails, training goes on all the same.

        Raises:
            UserError: on every rank, if the run's folder is another run's by now.
        """
        together(lambda: self._folder.check() if self._folder is not None else None)
        self._unsaved = None
        with self._watchdog.paused():
            try:
                folder = self._checkpointer.save(
                    self._engine,
                    self._step,
                    self._samples,
                    self._validated,
                    self._skipped.steps,
                    self._penalty.state,
                )
            except UserError as error:
                self._unsaved = error
                self._progress.say(f"step {self._step}  warning: not saved, training goes on: {error}")
                return
        self._saved_step = self._step
        verb = "saving" if self._config.checkpoint.asynchronous else "saved"
        self._progress.say(f"step {self._step}  {verb} {folder}")

    def _end(self) -> None:
        self._watch.close()
        with self._watchdog.paused():
            self._checkpointer.finish()
        if self._unsaved is not None:
            raise self._unsaved
        folder = self._checkpointer.folder / checkpoint_name(self._step)
        complaint = self._skipped.too_many(self._step)
        if complaint is not None:
            error = UserError(f"{complaint}; saved {folder}")
            error.shared = True
            raise error
        stop = self._boundary.stop
        if stop and (self._step < self._config.training.steps or not self._validated):
            where = f"checkpoint {folder}" if self._step > 0 else "there is nothing to save yet"
            message = f"stopped at step {self._step} by {stop}; {where}; resume with --checkpoint.resume auto"
            self._progress.say(message)
            raise Preempted(stop, message)

    def _due(self, interval: int) -> bool:
        """Whether something is to be done after this step that is done every so often, and at the end."""
        return self._step_is_multiple_of(interval) or (interval > 0 and self._step == self._config.training.steps)

    def _step_is_multiple_of(self, interval: int) -> bool:
        return interval > 0 and self._step % interval == 0


def _own(tally: Tally) -> dict[str, Value]:
    """What every step predicts by itself, as fields of a record."""
    losses = [nats / tally.tokens for nats in tally.own_losses]
    return {"own_losses": losses, "steps_follow_loss": tally.steps_follow_loss}


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
