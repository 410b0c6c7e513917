"""One rank of a layout, from the configuration alone: its part of the model, its passes, how many parameters it holds.

Symbols: H hidden size, F feed-forward width, t tensor ranks, D data-parallel ranks, b bytes of an activation.
"""

import math
from dataclasses import dataclass

import torch

from megatron_ponder.config import Config, micro_batches, stage_layers
from megatron_ponder.kernels.attention import Call, Kernel, choose
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.passes import Passes, Sizes

FP32 = 4


@dataclass(frozen=True)
class Rank:
    """The ranks of one place in the pipeline, which all hold as much.

    Attributes:
        config: resolved, with a vocabulary size.
        data: D.
        pipeline_rank: its place.
        device: `cpu` or `cuda`, which have different kernels.
    """

    config: Config
    data: int = 1
    pipeline_rank: int = 0
    device: str = "cpu"

    @property
    def layers(self) -> range:
        """Its blocks."""
        return stage_layers(self.config)[self.pipeline_rank]

    @property
    def first(self) -> bool:
        """It has the embedding."""
        return self.pipeline_rank == 0

    @property
    def last(self) -> bool:
        """It has the final norm, the router and the head."""
        return self.pipeline_rank == self.config.parallel.pipeline - 1

    @property
    def width(self) -> int:
        """b."""
        return 2 if self.config.training.precision == "bf16" else FP32

    @property
    def attention(self) -> Kernel:
        """The kernel that its attention takes."""
        model, dtype = self.config.model, torch.bfloat16 if self.width < FP32 else torch.float32
        grouped = model.num_kv_heads < model.num_heads
        return choose(Call(self.device, dtype, grouped, self.config.data.reset_at_eod))

    @property
    def chain(self) -> Passes:
        """The passes of its mode."""
        return passes_of(self.config.ponder)

    @property
    def sizes(self) -> Sizes:
        """Sizes of a micro-batch."""
        config, tokens = self.config, self.config.data.sequence_length
        share = round(self.residual(tokens))
        return Sizes(config.training.micro_batch_size, tokens, share, config.model.hidden_size, config.model.vocab_size)

    @property
    def plan(self) -> tuple[int, ...]:
        """Slots a token of every pass, with the largest R that training draws."""
        return self.chain.plan(self.config.ponder_training.evaluation_refinements)

    @property
    def micro_batches(self) -> int:
        """M, micro-batches of a step."""
        return micro_batches(self.config, self.data)

    def residual(self, slots: float) -> float:
        """Those of so many slots that this rank holds between sharded layers."""
        parallel, tokens = self.config.parallel, self.config.data.sequence_length
        return slots * math.ceil(tokens / parallel.tensor) / tokens if parallel.sequence_parallel else slots


def rank_parameters(rank: Rank) -> int:
    """Parameters that one rank holds when it holds all of its part, padding of the vocabulary included."""
    config = rank.config
    count = len(rank.layers) * block_parameters(rank)
    count += vocabulary_parameters(rank) * (rank.first + (rank.last and not config.model.tie_embeddings))
    count += config.ponder.steps * config.model.hidden_size * (rank.first and rank.chain.pauses)
    return count + (_norm_parameters(config) + _router_parameters(config) if rank.last else 0)


def block_parameters(rank: Rank) -> int:
    """q, o: H²/t each; k, v: H · kv/t each; 3 or 2 matrices H · F/t; neox biases; two norms."""
    model, t = rank.config.model, rank.config.parallel.tensor
    hidden, ffn, kv = model.hidden_size, model.ffn_hidden_size // t, model.num_kv_heads * model.head_size // t
    matrices = 2 * hidden * (hidden // t + kv) + (3 if model.family == "llama" else 2) * hidden * ffn
    biases = 0 if model.family == "llama" else hidden // t + 2 * kv + ffn + 2 * hidden
    return matrices + biases + 2 * _norm_parameters(rank.config)


def vocabulary_parameters(rank: Rank) -> int:
    """Rows of one tensor rank, padded to the multiple, times H."""
    model, parallel = rank.config.model, rank.config.parallel
    unit = parallel.vocab_multiple
    return math.ceil(model.vocab_size / (parallel.tensor * unit)) * unit * model.hidden_size


def _norm_parameters(config: Config) -> int:
    return config.model.hidden_size * (1 if config.model.family == "llama" else 2)


def _router_parameters(config: Config) -> int:
    if not passes_of(config.ponder).routed:
        return 0
    hidden, width, options = config.model.hidden_size, config.ponder.router_hidden_size, config.ponder.latent_steps + 1
    return width * (hidden + 1) + options * (width + 1) if width else options * (hidden + 1)
