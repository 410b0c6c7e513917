"""Validation on every set of a run, and what is told and written of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config import Config
from megatron_ponder.data.mixture import Samples
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import Value
from megatron_ponder.runs.progress_bar import nats
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.records import exact_fields, validation_fields
from megatron_ponder.training.refinement_dependence import dependence
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
        self._config, self._watchdog, passes = config, watchdog, passes_of(config.ponder)
        self._routed, self._iterated = passes.routed, passes.iterated
        self._sets = {
            name: Validation(config, mesh, samples, engine, boundary, watchdog) for name, samples in sets.items()
        }

    def run(self, step: int) -> Validated | None:
        """Measure under the rule of the last step, or of the first before there was one; at the end by `exact` too.

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
        (tally, pruned), named = _in_all(found), _named(found)
        routes = self._routed and rule.latents
        fields = validation_fields(tally, pruned if routes else None)
        for name, (own, own_pruned) in named.items():
            fields |= _of_set(name, validation_fields(own, own_pruned if routes else None))
        losses = {name: own.mean_loss for name, (own, _) in named.items()}
        said = [*self._said(step, tally, losses, pruned if routes else None)]
        if step < self._config.training.steps or not (self._iterated and rule.latents):
            return Validated(fields, said)
        exact = self._run_exact(step, rule)
        return None if exact is None else Validated(fields | exact.fields, said + exact.said)

    def _run_exact(self, step: int, rule: Rule) -> Validated | None:
        """Measure what a model that is trained is worth when it decodes, and whether that depends on training's R."""
        if not self._config.training.exact_samples:
            return Validated({}, [])
        rule = replace(rule, kind="hard") if rule.kind == "soft" else rule
        found = {}
        with self._watchdog.paused():  # how many sweeps it takes depends on the model
            for name, validation in self._sets.items():
                if (measured := validation.run_exact(rule)) is None:
                    return None
                found[name] = measured
        exact, trained = _in_all(found)
        fields = exact_fields(exact, trained)
        for name, pair in _named(found).items():
            fields |= _of_set(name, exact_fields(*pair))
        said = f"step {step}  validation by exact {nats(exact.mean_loss)}, with R of training {nats(trained.mean_loss)}"
        complaint = dependence(exact, trained, self._config)
        return Validated(fields, [said, *([f"step {step}  warning: {complaint}"] if complaint else [])])

    def _said(self, step: int, tally: Tally, losses: dict[str, float], pruned: Tally | None) -> Iterator[str]:
        by_name = f" ({', '.join(f'{name} {nats(loss)}' for name, loss in losses.items())})" if losses else ""
        steps = f"latent steps/token {tally.mean_steps:.2f}"
        yield f"step {step}  validation loss {nats(tally.mean_loss)}{by_name}  {steps}"
        if pruned is not None:
            cost = pruned.mean_loss - tally.mean_loss
            if complaint := router_complaint(tally, cost, step, self._config):
                yield f"step {step}  warning: {complaint}"


def _named(found: Mapping[str, Sequence[Tally]]) -> dict[str, Sequence[Tally]]:
    """What the sets with names have given."""
    return {name: tallies for name, tallies in found.items() if name != "valid"}


def _in_all(found: Mapping[str, Sequence[Tally]]) -> Sequence[Tally]:
    """What the valid part has given; without one, all sets together."""
    return found.get("valid") or [Tally.total(tallies) for tallies in zip(*found.values(), strict=True)]


def _of_set(name: str, fields: Mapping[str, Value]) -> dict[str, Value]:
    """Fields of a set with a name."""
    return {f"{field}/{name}": value for field, value in fields.items()}
