"""What an analysis measures, and of which models."""

from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class AnalysisPlan:
    """What to measure.

    Attributes:
        refinements: R of all measurements that do not compare several; None for `exact`.
        thresholds: τ of the sweep; that of the model is added.
        biases: α of the sweep; that of the model is added.
        random_seeds: how many random choices of K̂ are measured at each threshold.
        iterations: how many Jacobi iterates are compared with the fixed point.
        contraction_batches: on how many batches.
        listed: the first so many tokens are listed one by one.
    """

    refinements: int | None = None
    thresholds: tuple[float, ...] = (1e-4, 0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    biases: tuple[float, ...] = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)
    random_seeds: int = 3
    iterations: int = 8
    contraction_batches: int = 1
    listed: int = 1000

    def sweep(self, model: PonderLM) -> tuple[list[float], list[float]]:
        """Thresholds and biases of a model's sweeps, its own among them."""
        own = model.inference
        return sorted({*self.thresholds, own.threshold}), sorted({*self.biases, own.router_bias})

    def measurements(self, subject: Subject) -> int:
        """How many things are announced for a subject, at most."""
        config = subject.model.ponder_config
        if not config.steps:
            return 2
        jacobi = len({0, 3, subject.refinements})
        if not subject.decides:
            return 3 + jacobi
        thresholds, biases = self.sweep(subject.model)
        rules = len({PAPER_THRESHOLD, subject.model.inference.threshold})
        return len(thresholds) * (1 + self.random_seeds) + len(biases) + rules * (1 + jacobi) + 1
