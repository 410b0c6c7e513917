"""Floating-point operations of training, counted from the slots that every pass executes.

A multiplication and the addition after it count as two. Symbols: L tokens of a sequence, S slots a token in a pass,
T = L S, H hidden size, V vocabulary.
"""

from typing import NamedTuple

from megatron_ponder.config import Config
from megatron_ponder.estimates.part import BlockSizes, PartSizes, Product, part_sizes
from megatron_ponder.estimates.rank import runs_once, slots_of_passes
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.modes.ponderlm import candidates

# The backward pass of a product computes two: one for the gradient of each factor.
FORWARD_AND_BACKWARD = 3


class PassFlops(NamedTuple):
    """One forward pass of one sequence, over all tensor ranks.

    Attributes:
        matrices: products with weights.
        attention: products of queries with the keys that they may see, and of probabilities with values.
    """

    matrices: float
    attention: float


def block_flops(block: BlockSizes, run: float, kept: float, pairs: float | None = None) -> PassFlops:
    """One block: 2 T for each weight up to queries, keys and values; 2 T' for the others; attention 4 q for each pair.

    Args:
        block: of a whole model; its queries are q wide.
        run: T.
        kept: T', slots that the output projection and the feed-forward layer see.
        pairs: of a slot and one that it sees; T (T + 1) / 2 unless given.
    """
    matrices = 2 * run * _weights(block.before) + 2 * kept * _weights(block.after)
    return PassFlops(matrices, 4 * block.query * (run * (run + 1) / 2 if pairs is None else pairs))


def own_pairs(run: float, tokens: int, further: float) -> float:
    """Pairs of a slot and one that it sees where latents are seen by their own token alone, T ((L + 1) / 2 + n).

    Args:
        run: T.
        tokens: L, whose first slots are seen by those behind them.
        further: n, latent slots that a slot sees in the mean: j of step j, (S - 1) / 2 of all S slots of tokens.
    """
    return run * ((tokens + 1) / 2 + further)


def _weights(products: tuple[Product, ...]) -> int:
    return sum(product.weights for product in products)


def head_flops(config: Config) -> float:
    """2 L H V."""
    return 2.0 * config.data.sequence_length * _whole(config).table


def forward_flops(
    config: Config, refinements: int, latents: bool = True, mean_steps: float | None = None
) -> list[PassFlops]:
    """Every pass of one sequence through the whole stack, router and predictions for other passes included.

    The head that predicts the next token is left out.

    Args:
        config: resolved, with a vocabulary size.
        refinements: R.
        latents: whether there are latent steps.
        mean_steps: as in `slots_of_passes`.
    """
    tokens, block, every = config.data.sequence_length, _whole(config).block, []
    own, once = passes_of(config.ponder).own, latents and runs_once(config)
    slots = slots_of_passes(config, refinements, latents, mean_steps)
    for index, (run, kept) in enumerate(slots):
        pairs = own_pairs(tokens * run, tokens, index if once else (run - 1) / 2) if own else None
        inner, last = (block_flops(block, tokens * run, tokens * rest, pairs) for rest in (run, kept))
        layers, final = config.model.num_layers - 1, index == len(slots) - 1
        matrices = layers * inner.matrices + last.matrices
        matrices += _router_flops(config, not once or index == 0, final) + _prediction_flops(config, final)
        every.append(PassFlops(matrices, layers * inner.attention + last.attention))
    return every


def work_of_passes(passes: int, trained: int | None) -> list[int]:
    """How many times the operations of its forward pass each pass costs in training.

    Args:
        passes: how many there are.
        trained: through how many of the last gradients flow; None for all.
    """
    cut = 0 if trained is None else max(0, passes - trained)
    return [1] * cut + [FORWARD_AND_BACKWARD] * (passes - cut)


def training_work(config: Config, refinements: int, latents: bool = True, mean_steps: float | None = None) -> PassFlops:
    """Model FLOPs of the passes of one sequence in training, as `training_flops` counts them."""
    passes = forward_flops(config, refinements, latents, mean_steps)
    times = work_of_passes(len(passes), config.ponder_training.gradient_passes)
    return PassFlops(
        *(sum(n * part for n, part in zip(times, parts, strict=True)) for parts in zip(*passes, strict=True))
    )


def training_flops(config: Config, refinements: int, latents: bool = True, mean_steps: float | None = None) -> float:
    """Model FLOPs of one optimiser step over all ranks: what the algorithm asks for, however it is carried out.

    Three times the forward passes, once those that `gradient_passes` cuts off, and three times the head. Not counted is
    what an implementation adds: recompute, masked halves of attention's squares, padding, channels that carry log w.

    Args:
        config: resolved, with a vocabulary size.
        refinements: R of the step.
        latents: whether it has latent steps.
        mean_steps: as in `slots_of_passes`.
    """
    sequence = sum(training_work(config, refinements, latents, mean_steps)) + FORWARD_AND_BACKWARD * head_flops(config)
    return config.training.global_batch_size * sequence


def _router_flops(config: Config, routes: bool, final: bool) -> float:
    """2 L for each weight of a router that is asked, and 2 L H (K + 1) where hidden states are fused for the output."""
    router = _whole(config).router
    if not router:
        return 0.0
    fusion = config.model.hidden_size * router[-1].columns
    return 2 * config.data.sequence_length * ((_weights(router) if routes else 0) + (fusion if final else 0))


def _prediction_flops(config: Config, final: bool) -> float:
    """2 L H (V + n) where a pass but the last ends in a prediction, whose n likeliest tokens the next one reads."""
    if final or not passes_of(config.ponder).predicts:
        return 0.0
    mixture = 2 * config.data.sequence_length * config.model.hidden_size * candidates(config.model.vocab_size)
    return head_flops(config) + mixture


def _whole(config: Config) -> PartSizes:
    """The model as one process would hold it."""
    return part_sizes(config.model, config.ponder)
