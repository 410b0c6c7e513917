"""One rank of a layout, from the configuration alone: its place in the grid, its part of the model, its passes.

Symbols: D data-parallel ranks, b bytes of an activation, L tokens of a sequence on a rank.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from megatron_ponder.checkpoint.optimizer_state import group_of, moment_bytes, takes_whole
from megatron_ponder.config import Config, micro_batches, stage_layers
from megatron_ponder.config.layout import group_sizes, own_length
from megatron_ponder.estimates.part import ParameterSize, PartSizes, part_sizes
from megatron_ponder.kernels.attention import Call, Kernel, choose
from megatron_ponder.model.build import model_part
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.modes.pondering import Passes, Sizes
from megatron_ponder.model.transformer import ModelPart, Recompute
from megatron_ponder.parallel.context import head_repeats
from megatron_ponder.parallel.mesh import Axis

FP32 = 4


class PassSlots(NamedTuple):
    """Slots of one pass, of a token or of so many tokens; means, where slots are pruned.

    Attributes:
        run: that every block runs.
        kept: those that the last block of the stack finishes, because somebody reads their hidden states.
    """

    run: float
    kept: float


@dataclass(frozen=True)
class Rank:
    """The ranks of one place in the pipeline, which all hold as much.

    Attributes:
        config: resolved, with a vocabulary size.
        data: D.
        pipeline_rank: its place.
        device: `cpu` or `cuda`, which have different kernels.
        mean_steps: latent steps of a token in the mean, where the slots of others are not run; None where all are.
    """

    config: Config
    data: int = 1
    pipeline_rank: int = 0
    device: str = "cpu"
    mean_steps: float | None = None

    @cached_property
    def axes(self) -> dict[str, int]:
        """Ranks along the grid's axes; of `model`, which hold one copy; and of `copies`, which hold the same."""
        return group_sizes(self.config.parallel, self.data)

    @cached_property
    def copies(self) -> int:
        """Ranks that hold the same part of the model."""
        return self.axes["copies"]

    @cached_property
    def length(self) -> int:
        """L, tokens of a sequence; a share of them where context ranks share them."""
        return own_length(self.config)

    @cached_property
    def tensor(self) -> Axis:
        """The tensor ranks, without a group."""
        return Axis(self.config.parallel.tensor, sequence_parallel=self.config.parallel.sequence_parallel)

    @cached_property
    def key_repeats(self) -> int:
        """How often a head of keys and values is there on the context ranks together."""
        return head_repeats(self.part.block.key_heads, self.axes["context"])

    @property
    def layers(self) -> range:
        """Its blocks."""
        return self._model_part.layers

    @property
    def first(self) -> bool:
        """It has the embedding."""
        return self._model_part.first

    @property
    def last(self) -> bool:
        """It has the final norm, the router and the head."""
        return self._model_part.last

    @cached_property
    def part(self) -> PartSizes:
        """What it holds of the model."""
        model, ponder, multiple = self.config.model, self.config.ponder, self.config.parallel.vocab_multiple
        return part_sizes(model, ponder, self.tensor.size, self._model_part, multiple)

    @cached_property
    def moments(self) -> int:
        """Bytes of what the optimiser remembers of all that it holds, wherever that is."""
        optimizer, counts = self.config.optimizer, self.part.counts
        return sum(count * moment_bytes(optimizer, matrix) for (_, matrix), count in counts.items())

    @cached_property
    def optimizer_groups(self) -> list[int]:
        """Numbers in each group of the optimiser."""
        groups = [0, 0]
        for (dims, matrix), count in self.part.counts.items():
            groups[group_of(self.config.optimizer, dims, matrix)] += count
        return groups

    @property
    def taken_whole(self) -> tuple[ParameterSize, ...]:
        """Matrices that the optimiser makes orthogonal."""
        return self.part.matrices if takes_whole(self.config.optimizer, matrix=True) else ()

    @cached_property
    def _model_part(self) -> ModelPart:
        return model_part(self.config, self.pipeline_rank)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of activations."""
        return torch.bfloat16 if self.config.training.precision == "bf16" else torch.float32

    @property
    def width(self) -> int:
        """b."""
        return self.dtype.itemsize

    @cached_property
    def attention(self) -> Kernel:
        """The kernel that its attention takes."""
        block, config = self.part.block, self.config
        head_size, grouped = config.model.head_size, block.key * self.key_repeats < block.query
        segmented = config.data.reset_at_eod or self.mean_steps is not None
        call = Call(self.device, self.dtype, grouped, segmented, head_size, self.chain.own)
        return choose(call, config.training.attention_kernel)

    @property
    def chain(self) -> Passes:
        """The passes of its mode."""
        return passes_of(self.config.ponder)

    @property
    def sizes(self) -> Sizes:
        """Sizes of a micro-batch."""
        model, batch, tokens = self.config.model, self.config.training.micro_batch_size, self.length
        return Sizes(batch, tokens, self.tensor.share(tokens), model.hidden_size, model.vocab_size)

    @property
    def tokens(self) -> int:
        """B L, tokens of a micro-batch."""
        return self.config.training.micro_batch_size * self.length

    @cached_property
    def plan(self) -> tuple[int, ...]:
        """Slots a token of every pass, with that R."""
        return plan_of(self.config, self.refinements)

    @cached_property
    def once(self) -> bool:
        """Whether every slot is run once."""
        return runs_once(self.config)

    @property
    def refinements(self) -> int:
        """The largest R that training draws."""
        return self.config.ponder_training.evaluation_refinements

    @cached_property
    def micro_batches(self) -> int:
        """M, micro-batches of a step."""
        return micro_batches(self.config, self.data)

    @property
    def recompute(self) -> Recompute:
        """What backward passes compute again."""
        return Recompute(self.config.training.recompute, self.config.training.recompute_passes)

    def slots(self, refinements: int) -> list[PassSlots]:
        """The slots a token of every pass of a step with R refinements."""
        return slots_of_passes(self.config, refinements, mean_steps=self.mean_steps)

    def residual(self, slots: float) -> float:
        """Those of so many slots that this rank holds between sharded layers."""
        return slots * self.tensor.share(self.length) / self.length


def runs_once(config: Config) -> bool:
    """Whether training runs every slot once, for which one rank has all blocks; see `Passes.runs_once`."""
    return config.parallel.pipeline == 1 and passes_of(config.ponder).runs_once(config.ponder_training.gradient_passes)


def plan_of(config: Config, refinements: int, latents: bool = True) -> tuple[int, ...]:
    """Slots a token of every pass of a training forward with R refinements, with latent steps or without."""
    return passes_of(config.ponder).plan(refinements, latents, runs_once(config))


def slots_of_passes(
    config: Config, refinements: int, latents: bool = True, mean_steps: float | None = None
) -> list[PassSlots]:
    """The slots a token of every pass of one training forward.

    Args:
        config: resolved.
        refinements: R.
        latents: whether there are latent steps.
        mean_steps: mean K̂ of tokens whose other slots are not run; None where all are. A pass of n latent slots runs
            min(mean, n) of them, which is what tokens run if all have the mean, and else the most that they can. Of
            passes of one slot a token, those have a whole one that the mean reaches, and the next what is left of it.
    """
    passes, plan = passes_of(config.ponder), plan_of(config, refinements, latents)
    if latents and runs_once(config):
        reached = 1 + (passes.steps if mean_steps is None else mean_steps)
        shares = [min(1, max(0, reached - index)) for index in range(len(plan))]
        return [PassSlots(share, share) for share in shares]
    whole = [PassSlots(slots, len(range(slots)[passes.kept(index, plan)])) for index, slots in enumerate(plan)]
    if mean_steps is None:
        return whole
    return [PassSlots(min(run, 1 + mean_steps), min(kept, 1 + mean_steps)) for run, kept in whole]


def places(config: Config) -> list[int]:
    """Places in the pipeline of which one needs most: the ends, and the first of every number of blocks."""
    counts = [len(layers) for layers in stage_layers(config)]
    between = {counts[place]: place for place in reversed(range(len(counts)))}
    return sorted({0, len(counts) - 1, *between.values()})
