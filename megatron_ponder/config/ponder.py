"""The sections about latent steps: what a model is, how it learns to use them, and what a run may choose."""

from dataclasses import dataclass
from typing import Literal

from megatron_ponder.config.declarations import STEPS, changeable, number_field

Mode = Literal["vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm"]


@dataclass(frozen=True)
class PonderConfig:
    """Latent steps of the model; a checkpoint has them and keeps them."""

    mode: Mode = "adaptive"
    """`vanilla` (none), `fixed` (`latent_steps` for every token), `adaptive` (a router decides for each token), or a
    [baseline](model.md#baselines): `pause` (`latent_steps` learned pause embeddings after every token), `sps` (the
    same, seen by their own token alone), `loop` (all blocks run `latent_steps` + 1 times) or `ponderlm` (likewise, each
    time with the mean embedding of the last prediction)."""
    latent_steps: int = number_field(3, 0, 256)
    """K, the most latent steps of a token."""
    router_input: Literal["hidden", "token"] = "hidden"
    """What the router reads of a token: `hidden` (h_{t,0}, in which its context is) or `token` (its embedding alone, as
    a [control](analysis.md); for training and evaluation only)."""
    router_hidden_size: int = number_field(0, 0, 2**20)
    """Width of a hidden layer in the router; 0 for a linear router."""
    router_initial_bias: float = changeable(number_field(2.0, -1000, 1000))
    """Initial bias of the router for latent step K, so that training starts near `fixed`."""
    embedding_scale: float | None = number_field(None, 1e-3, 1e5)
    """c, factor on token embeddings; √(2.5 H) unless given, and 1 for `vanilla`."""
    latent_scale: float | Literal["auto", "learned"] = number_field(1.0, 1e-6, 1e6)
    """Factor on hidden states that enter again as latents, in `fixed`, `adaptive` and `loop`: a number, `learned`, or
    `auto`, which is [measured](continued_pretraining.md#latents) on a pretrained model."""
    initial_latent_scale: float | Literal["auto"] = changeable(number_field(1.0, 1e-6, 1e6))
    """What a learned `latent_scale` begins with; `auto` as there."""

    latent_visibility: Literal["all", "own"] = "all"
    """Who sees the latent slots of a token in `fixed` and `adaptive`: its own and `all` later tokens, or its
    [`own`](model.md#latents-that-no-other-token-sees) alone."""

    @property
    def steps(self) -> int:
        """Most latent steps of a token in this mode: `latent_steps`, or 0 for vanilla."""
        return 0 if self.mode == "vanilla" else self.latent_steps

    @property
    def reads_hidden(self) -> bool:
        """Whether latent steps read hidden states, which `latent_scale` multiplies."""
        return self.mode in ("fixed", "adaptive", "loop")

    @property
    def own_latents(self) -> bool:
        """Whether the slots of latent steps are seen by their own token alone."""
        return self.mode == "sps" or self.latent_visibility == "own"

    @property
    def routes_by_token(self) -> bool:
        """Whether the router is the control that reads a token's embedding alone."""
        return self.mode == "adaptive" and self.router_input == "token"


@dataclass(frozen=True)
class PonderTrainingConfig:
    """How a model learns to use its latent steps; a run that goes on may change it."""

    jacobi_iterations: int | list[int] | dict[int, int] = number_field([2, 3], 0, 1000)
    """R, refinement passes in training. A list is drawn from uniformly, once per optimiser step; of `{0: 3, 2: 5}`, 0
    comes up three times in eight and 2 five times."""
    gradient_passes: int | None = number_field(None, 1, 1000)
    """Let gradients flow through the last so many passes only; all of them unless given."""
    latent_start: int = number_field(0, 0, STEPS)
    """Optimiser step at which latent steps [begin](training.md#how-many-steps); before, a step is one pass over the
    tokens, at the cost of `vanilla`."""
    latent_warmup: int = number_field(0, 0, STEPS)
    """Optimiser steps from `latent_start` on in which w of all latent steps [rises](training.md#how-many-steps) from 0
    to 1; unused without a router, so that one configuration serves every mode."""
    router_start: int = number_field(0, 0, STEPS)
    """Optimiser step from which the router decides; before, every token takes all latent steps, [as in `fixed`
    mode](training.md#how-many-steps)."""
    penalty: Literal["token", "batch"] = "token"
    """What of the router λ weighs in the loss: `token`, the mean over tokens of the sum of w over latent steps; or
    `batch`, the [divergence](training.md#how-many-steps) of the mean of s over the global batch from `penalty_prior`,
    by which tokens may differ as they like while their mean is the prior."""
    penalty_prior: float | list[float] | None = number_field(None, 0, 1, above=True, below=True)
    """Of `penalty: batch`: the wanted shares of tokens that take 0, 1 … K latent steps, which sum to 1; or a rate, the
    share of those that have come to a step which stop there, by which they fall geometrically."""
    penalty_weight: float = number_field(0.0, 0, 1e6)
    """λ, weight in the loss of what `penalty` says; unused without a router, so that one configuration serves every
    mode."""
    penalty_start: int = number_field(0, 0, STEPS)
    """Optimiser step from which the penalty is warmed up linearly."""
    penalty_end: int = number_field(0, 0, STEPS)
    """Optimiser step from which the penalty has its full weight."""
    target_latent_steps: float | None = number_field(None, 0, 256, above=True)
    """Mean latent steps a token at τ, towards which the penalty is [steered](training.md#how-many-steps) from
    `penalty_end` on, starting from `penalty_weight`; not steered unless given."""
    target_rate: float = number_field(0.01, 1e-6, 1)
    """How fast: log λ grows by so much in an optimiser step that has one latent step a token too many."""
    prune_start: int | None = number_field(None, 0, STEPS)
    """Optimiser step from which training [prunes](training.md#how-many-steps) by τ, as inference does; never unless
    given."""
    packed: bool = True
    """Do not run what is pruned; otherwise it is run and masked, with the same result."""

    @property
    def router_decides(self) -> int:
        """Optimiser step from which the router decides: `router_start`, but not before latent steps begin."""
        return max(self.latent_start, self.router_start)

    def prior(self, latent_steps: int) -> tuple[float, ...] | None:
        """Wanted shares of tokens that take 0, 1 … K = `latent_steps` latent steps; None with `penalty: token`."""
        if self.penalty_prior is None or isinstance(self.penalty_prior, list):
            return None if self.penalty_prior is None else tuple(self.penalty_prior)
        falling = [(1 - self.penalty_prior) ** steps for steps in range(latent_steps + 1)]
        return tuple(share / sum(falling) for share in falling)

    @property
    def refinement_choices(self) -> tuple[int, ...]:
        """The set that R is drawn from in training."""
        return tuple(dict.fromkeys(self.refinement_draws))

    @property
    def refinement_draws(self) -> tuple[int, ...]:
        """What R is drawn from uniformly in training: each R as many times as its weight."""
        choices = self.jacobi_iterations
        if isinstance(choices, dict):
            return tuple(r for r, weight in choices.items() for _ in range(weight))
        return (choices,) if isinstance(choices, int) else tuple(choices)

    @property
    def evaluation_refinements(self) -> int:
        """R where one number is needed, in evaluation and export: the largest that training used."""
        return max(self.refinement_choices)


@dataclass(frozen=True)
class InferenceConfig:
    """Which latent steps are executed: at inference, in validation, and in training that prunes."""

    threshold: float = number_field(1e-4, 0, 1)
    """τ; a latent step is executed while its weight w is at least this."""
    router_bias: float = number_field(0.0, -1000, 1000)
    """α, added k times to the router's logit of latent step k; positive buys more of them."""
