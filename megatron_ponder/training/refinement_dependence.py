"""A complaint about models that have learnt the number of refinements that they were trained with."""

from megatron_ponder.config import Config
from megatron_ponder.model.tally import Tally

# Nats per token by which the loss with the R of training may differ from that of the fixed point.
TOLERANCE = 0.01


def dependence(exact: Tally, trained: Tally, config: Config) -> str | None:
    """Describe how a model depends on the R that it was trained with; None if it does not.

    Args:
        exact: of the fixed point, as the model decodes.
        trained: of the same samples, with the largest R of training.
        config: of the run.
    """
    if abs(exact.mean_loss - trained.mean_loss) <= TOLERANCE:  # which what is not a number is not
        return None
    refinements = config.ponder_training.evaluation_refinements
    several = f"[{refinements}, {refinements + 1}]"
    return (
        f"the model depends on the R of its training: {trained.mean_loss:.3f} nats with R = {refinements}, "
        f"{exact.mean_loss:.3f} when it decodes token by token (exact); train with another R every step, such as "
        f"ponder_training.jacobi_iterations {several}, or with more"
    )
