"""Complaints about routers that decide nothing, by the tokens that they spread over latent steps."""

from megatron_ponder.config import Config
from megatron_ponder.model.tally import Tally

# Optimiser steps in which a router may still treat all tokens alike, and the share of tokens that counts as all.
FORMING, ALL = 200, 0.999
# Nats per token that pruning may cost.
COSTLY = 0.01


def router_complaint(tally: Tally, cost: float, step: int, config: Config) -> str | None:
    """Describe what is wrong with how a router spreads its tokens over steps, once the penalty has its full weight.

    Args:
        tally: of a validation.
        cost: nats per token that the steps below τ were worth in it.
        step: optimiser steps done.
        config: of the run.
    """
    training, threshold = config.ponder_training, config.inference.threshold
    if step < max(training.penalty_end, training.router_decides + FORMING):
        return None
    most, last = max(range(len(tally.steps)), key=tally.steps.__getitem__), config.ponder.steps
    if cost > COSTLY:
        return (
            f"without the steps whose weight is below inference.threshold ({threshold:g}) the loss is {cost:.3f} nats "
            "higher: attention uses small weights too; lower inference.threshold, or set ponder_training.prune_start, "
            "so that the last part of training prunes as inference does"
        )
    if tally.steps[most] < ALL * tally.tokens:
        return None
    if most == 0:
        return (
            f"{ALL:.1%} of tokens or more take no latent step: the router has collapsed; lower "
            "ponder_training.penalty_weight or inference.threshold, begin with a higher ponder.router_initial_bias, or "
            "compare with fixed mode, which tells whether steps help at all"
        )
    if most == last:
        return (
            f"{ALL:.1%} of tokens or more take all {last} latent steps: nothing is pruned; raise "
            f"inference.threshold ({threshold:g}) or ponder_training.penalty_weight ({training.penalty_weight:g})"
        )
    return f"{ALL:.1%} of tokens or more take {most} latent steps: the router does not tell tokens apart"
