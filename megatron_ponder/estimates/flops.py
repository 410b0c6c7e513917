"""Floating-point operations of training, counted from the slots that every pass executes.

A multiplication and the addition after it count as two. Symbols: L tokens of a sequence, S slots a token in a pass,
T = L S, H hidden size, F feed-forward width, V vocabulary.
"""

from typing import NamedTuple

from megatron_ponder.config import Config, ModelConfig
from megatron_ponder.model.baselines import CANDIDATES
from megatron_ponder.model.modes import passes_of

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


class Slots(NamedTuple):
    """Slots of one sequence in one pass.

    Attributes:
        run: T, slots that every block runs.
        kept: those that the last block of the stack finishes, because somebody reads their hidden states.
    """

    run: int
    kept: int


def slots_of_passes(config: Config, refinements: int) -> list[Slots]:
    """The slots of every pass of one training forward."""
    passes, tokens = passes_of(config.ponder), config.data.sequence_length
    plan = passes.plan(refinements)
    kept = [len(range(slots)[passes.kept(index, plan)]) for index, slots in enumerate(plan)]
    return [Slots(tokens * slots, tokens * rest) for slots, rest in zip(plan, kept, strict=True)]


def block_flops(model: ModelConfig, run: int, kept: int) -> PassFlops:
    """One block: 2 T (H² + 2 H kv) for q, k, v; 2 T' (H² + 3 H F) for the rest; attention 4 H T (T + 1) / 2.

    Args:
        model: the transformer; gpt_neox has two matrices of H · F where llama has three.
        run: T.
        kept: T', slots that the output projection and the feed-forward layer see.
    """
    hidden, kv = model.hidden_size, model.num_kv_heads * model.head_size
    ffn = (3 if model.family == "llama" else 2) * hidden * model.ffn_hidden_size
    matrices = 2 * run * (hidden**2 + 2 * hidden * kv) + 2 * kept * (hidden**2 + ffn)
    return PassFlops(matrices, 4 * hidden * run * (run + 1) / 2)


def router_flops(config: Config, final: bool) -> float:
    """2 L H (K + 1) for a linear router, and as much again where hidden states are fused for the output."""
    if not passes_of(config.ponder).routed:
        return 0.0
    hidden, width, options = config.model.hidden_size, config.ponder.router_hidden_size, config.ponder.latent_steps + 1
    router = width * (hidden + options) if width else hidden * options
    return 2 * config.data.sequence_length * (router + (hidden * options if final else 0))


def head_flops(config: Config) -> float:
    """2 L H V."""
    return 2.0 * config.data.sequence_length * config.model.hidden_size * config.model.vocab_size


def prediction_flops(config: Config, final: bool) -> float:
    """2 L H (V + n) where a pass but the last ends in a prediction, whose n likeliest tokens the next one reads."""
    if final or not passes_of(config.ponder).predicts:
        return 0.0
    count = min(CANDIDATES, config.model.vocab_size)
    return head_flops(config) + 2 * config.data.sequence_length * config.model.hidden_size * count


def forward_flops(config: Config, refinements: int) -> list[PassFlops]:
    """Every pass of one sequence through the whole stack, router and predictions for other passes included.

    The head that predicts the next token is left out.
    """
    every = []
    slots = slots_of_passes(config, refinements)
    for index, (run, kept) in enumerate(slots):
        inner, last = block_flops(config.model, run, run), block_flops(config.model, run, kept)
        layers = config.model.num_layers - 1
        final = index == len(slots) - 1
        matrices = layers * inner.matrices + last.matrices
        matrices += router_flops(config, final) + prediction_flops(config, final)
        every.append(PassFlops(matrices, layers * inner.attention + last.attention))
    return every


def training_flops(config: Config, refinements: int) -> float:
    """Model FLOPs of one optimiser step over all ranks: what the algorithm asks for, however it is carried out.

    Three times the forward passes, once those that `gradient_passes` cuts off, and three times the head. Not counted is
    what an implementation adds: recompute, masked halves of attention's squares, padding, channels that carry log w.

    Args:
        config: resolved, with a vocabulary size.
        refinements: R of the step.
    """
    passes = [flops.matrices + flops.attention for flops in forward_flops(config, refinements)]
    trained = config.ponder_training.gradient_passes or len(passes)
    sequence = sum(passes[:-trained]) + FORWARD_AND_BACKWARD * (sum(passes[-trained:]) + head_flops(config))
    return config.training.global_batch_size * sequence
