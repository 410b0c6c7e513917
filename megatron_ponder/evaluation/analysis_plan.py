"""What an analysis measures, and of which models."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.model.exits import Exit, can_exit
from megatron_ponder.model.ponder import PonderLM

# The threshold that the paper uses.
PAPER_THRESHOLD = 1e-4


@dataclass(frozen=True)
class Subject:
    """A model under analysis.

    Attributes:
        label: its name in figures; no two have the same.
        model: in evaluation mode.
        checkpoint: where it came from.
        refinements: R that it was trained with, the largest.
    """

    label: str
    model: PonderLM
    checkpoint: Path
    refinements: int

    @property
    def decides(self) -> bool:
        """Whether it has a router."""
        return self.model.router is not None

    @property
    def can_exit(self) -> bool:
        """Whether its tokens can stop by a confidence exit."""
        return can_exit(self.model.ponder_config)


@dataclass(frozen=True)
class AnalysisPlan:
    """What to measure.

    Attributes:
        refinements: R of jacobi(R), by which all is measured that does not compare several R; `exact`, as a user runs
            it, unless given.
        thresholds: τ of the sweep; that of the model is added.
        biases: α of the sweep; that of the model is added.
        entropies: in nats, of the sweep of the exit by entropy in a model of mode `fixed`, always `exact`.
        margins: of probabilities, of the sweep of the exit by margin in such a model, always `exact`.
        random_draws: random choices of K̂ that are measured at each τ.
        iterations: how many Jacobi iterates are compared with the fixed point.
        contraction_batches: on how many batches.
        refinement_sweep: R of jacobi(R) whose losses are compared with that of the fixed point; none by an empty list.
        listed: tokens shown and listed one by one, the first of them.
    """

    refinements: int | None = number_field(None, 0, 10**6)
    thresholds: tuple[float, ...] = number_field((1e-4, 0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), 0, 1)
    biases: tuple[float, ...] = number_field((-4.0, -2.0, -1.0, 1.0, 2.0, 4.0), -1000, 1000)
    entropies: tuple[float, ...] = number_field((0.0, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0), 0, 1000)
    margins: tuple[float, ...] = number_field((0.1, 0.3, 0.5, 0.7, 0.9, 0.99), 0, 2)
    random_draws: int = number_field(3, 0, 10**6)
    iterations: int = number_field(8, 1, 10**6)
    contraction_batches: int = number_field(1, 1, 10**6)
    refinement_sweep: tuple[int, ...] = number_field((0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 30), 0, 10**6)
    listed: int = number_field(1000, 0, 10**9)

    def __post_init__(self) -> None:
        check_ranges(self)

    def sweep(self, model: PonderLM) -> tuple[list[float], list[float]]:
        """Thresholds and biases of a model's sweeps, its own among them."""
        own = model.inference
        return sorted({*self.thresholds, own.threshold}), sorted({*self.biases, own.router_bias})

    @property
    def exits(self) -> list[Exit]:
        """Those of the sweeps."""
        return [Exit("entropy", nats) for nats in self.entropies] + [Exit("margin", lead) for lead in self.margins]

    def measurements(self, subject: Subject) -> int:
        """How many things are announced for a subject, at most."""
        config = subject.model.ponder_config
        if not config.steps:
            return 2
        jacobi = len({0, 3, subject.refinements})
        if not subject.decides:
            return 4 + jacobi + (len(self.exits) if subject.can_exit else 0)
        thresholds, biases = self.sweep(subject.model)
        rules = len({PAPER_THRESHOLD, subject.model.inference.threshold})
        return len(thresholds) * (1 + self.random_draws) + len(biases) + rules * (1 + jacobi) + 2
