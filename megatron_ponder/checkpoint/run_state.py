"""State of a run: all that it needs to go on besides weights and moments. Read without PyTorch."""

from dataclasses import dataclass, field


@dataclass
class RunState:
    """The numbers that change from step to step; one object from the training loop to a manifest and back.

    Attributes:
        step: optimiser steps done.
        samples: training samples consumed, which is the whole state of the data order.
        tokens: of these samples; None of a run that began before they were counted.
        skipped: steps among them that changed nothing, because their loss or gradients were not finite.
        validated: false if a validation is due before the next step: that after this step, which has been cut off, or
            that before the first.
        training_flops: model FLOPs of all these steps; None of a run that began before they were counted.
        penalty_factor: what a target for the mean number of steps has made of the scheduled penalty.
        penalty_steps: mean K̂ of the last optimiser step that it was steered by; None if there was none.
        penalty_shares: mean of s over the tokens of the last optimiser step, from which a penalty on the batch
            goes on; None if there was none.
    """

    step: int = 0
    samples: int = 0
    tokens: int | None = 0
    skipped: list[int] = field(default_factory=list)
    validated: bool = True
    training_flops: float | None = 0.0
    penalty_factor: float = 1.0
    penalty_steps: float | None = None
    penalty_shares: list[float] | None = None

    def advance(self, samples: int, tokens: int, flops: float) -> None:
        """Count a further step, which has consumed some samples of some tokens and taken some model FLOPs."""
        self.step, self.samples = self.step + 1, self.samples + samples
        if self.tokens is not None:
            self.tokens += tokens
        if self.training_flops is not None:
            self.training_flops += flops

    @property
    def updates(self) -> int:
        """Optimiser steps that have changed the weights."""
        return self.step - len(self.skipped)
