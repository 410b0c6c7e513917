"""Validation on every set of a run, and what is told and written of it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config import Config
from megatron_ponder.data.mixture import Samples
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import Value
from megatron_ponder.runs.progress_bar import nats
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.records import validation_fields
from megatron_ponder.training.router_health import router_complaint
from megatron_ponder.training.schedules import training_rule
from megatron_ponder.training.validation import Validation


class Validated(NamedTuple):
    """What all sets have given.

    Attributes:
        fields: of the record of the step.
        said: lines to tell.
    """

    fields: dict[str, Value]
    said: list[str]


class ValidationSets:
    """Measures all validation sets of a run, one after another.

    *The* validation loss is that of the valid part; where a run has sets with names alone, that of all their samples
    together.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        sets: Mapping[str, Samples],
        engine: Engine,
        boundary: Boundary,
        watchdog: Watchdog,
    ) -> None:
        """Prepare.

        Args:
            config: resolved.
            mesh: the ranks.
            sets: by name; the valid part is called `valid`.
            engine: that evaluates.
            boundary: where the ranks agree.
            watchdog: told of every micro-batch.
        """
        self._config, self._routed = config, passes_of(config.ponder).routed
        self._sets = {
            name: Validation(config, mesh, samples, engine, boundary, watchdog) for name, samples in sets.items()
        }

    def run(self, step: int) -> Validated | None:
        """Measure under the rule of the last step, or of the first before there was one.

        Args:
            step: optimiser steps done.

        Returns:
            What is written and said; None if the ranks are to stop before it is known.

        Raises:
            UserError: on every rank, if a sample cannot be read on any.
        """
        rule = training_rule(max(0, step - 1), self._config)
        found = {}
        for name, validation in self._sets.items():
            measured = validation.run(rule)
            if measured is None:
                return None
            found[name] = measured
        named = {name: pair for name, pair in found.items() if name != "valid"}
        tally, pruned = found.get("valid") or (Tally.total(tallies) for tallies in zip(*named.values(), strict=True))
        routes = self._routed and rule.latents
        fields = validation_fields(tally, pruned if routes else None)
        for name, (own, own_pruned) in named.items():
            own_fields = validation_fields(own, own_pruned if routes else None)
            fields |= {f"{field}/{name}": value for field, value in own_fields.items()}
        losses = {name: own.mean_loss for name, (own, _) in named.items()}
        return Validated(fields, [*self._said(step, tally, losses, pruned if routes else None)])

    def _said(self, step: int, tally: Tally, losses: dict[str, float], pruned: Tally | None) -> Iterator[str]:
        by_name = f" ({', '.join(f'{name} {nats(loss)}' for name, loss in losses.items())})" if losses else ""
        steps = f"latent steps/token {tally.mean_steps:.2f}"
        yield f"step {step}  validation loss {nats(tally.mean_loss)}{by_name}  {steps}"
        if pruned is not None:
            cost = pruned.mean_loss - tally.mean_loss
            if complaint := router_complaint(tally, cost, step, self._config):
                yield f"step {step}  warning: {complaint}"
