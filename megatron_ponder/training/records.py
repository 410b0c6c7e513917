"""The numbers of `metrics.jsonl` that a tally gives, by the names under which they are written."""

from megatron_ponder.config import Config
from megatron_ponder.model.ends import LatentScale
from megatron_ponder.model.tally import Tally
from megatron_ponder.runs.metrics import Value


def step_fields(tally: Tally, penalty_weight: float, penalty: float) -> dict[str, Value]:
    """Fields of every training step's record about its loss.

    Args:
        tally: of the step.
        penalty_weight: λ.
        penalty: what it weighs.
    """
    return {
        "loss": tally.mean_loss + penalty_weight * penalty,
        "cross_entropy": tally.mean_loss,
        "mean_latent_steps": tally.mean_steps,
        "penalty": penalty,
        "latent_step_histogram": tally.steps,
    }


def rate_fields(learning_rate: float, config: Config, routed: bool) -> dict[str, Value]:
    """Fields of every training step's record about how far it has moved the weights.

    Args:
        learning_rate: of the step.
        config: resolved.
        routed: whether there is a router.
    """
    routers = learning_rate * config.optimizer.router_learning_rate_factor
    return {"learning_rate": learning_rate} | ({"router_learning_rate": routers} if routed else {})


def router_fields(tally: Tally, most_steps: int) -> dict[str, Value]:
    """Further fields of a training step of a routed model.

    Args:
        tally: of the step.
        most_steps: K.
    """
    below = 1 - tally.mean_steps / most_steps
    return {"router_entropy": tally.entropy / tally.tokens, "below_threshold": below}


def scale_fields(scale: LatentScale | None) -> dict[str, Value]:
    """Further fields of a training step of a model that learns the factor on its latents.

    Args:
        scale: of this rank's part of the model, as the step has left it; None where it has none.
    """
    return {"latent_scale": scale.learned_so_far()} if scale is not None and scale.learned else {}


def each_step_fields(tally: Tally) -> dict[str, Value]:
    """Fields about what every latent step predicts by itself."""
    losses = [nats / tally.tokens for nats in tally.own_losses]
    return {"own_losses": losses, "latent_steps_follow_loss": tally.steps_follow_loss}


def exact_fields(exact: Tally, trained: Tally) -> dict[str, Value]:
    """Fields of the validation by `exact` at the end of a run.

    Args:
        exact: of the fixed point.
        trained: of the same samples, with the R of training.
    """
    return {
        "validation_exact_loss": exact.mean_loss,
        "validation_exact_gap": exact.mean_loss - trained.mean_loss,
        "validation_exact_mean_latent_steps": exact.mean_steps,
    }


def validation_fields(tally: Tally, pruned: Tally | None) -> dict[str, Value]:
    """Fields of a validation.

    Args:
        tally: under the rule of training.
        pruned: under the hard rule; None where no router decides.
    """
    fields = {"validation_loss": tally.mean_loss, "validation_mean_latent_steps": tally.mean_steps}
    if pruned is None:
        return fields
    return fields | {
        "validation_pruned_loss": pruned.mean_loss,
        "validation_latent_step_histogram": tally.steps,
        "validation_weights": tally.mean_shares,
        "validation_router_entropy": tally.entropy / tally.tokens,
        **{f"validation_{name}": value for name, value in each_step_fields(tally).items()},
    }
