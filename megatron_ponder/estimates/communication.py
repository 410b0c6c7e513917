"""What ranks send each other in one training step, term by term, from the configuration alone.

`benchmarks/communication.py` counts on real ranks what is sent, and compares.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_ponder.config import Config, micro_batches, stage_layers
from megatron_ponder.config.deepspeed import LIVE_PARAMETERS, SMALL_PARAMETER, zero_stage
from megatron_ponder.estimates.rank import Rank, rank_parameters, vocabulary_parameters
from megatron_ponder.model.baselines import CANDIDATES
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.passes import Sizes
from megatron_ponder.model.stages import PassShapes
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Axis, Mesh

FP32, INT64, FP64 = 4, 8, 8  # bytes of a number


@dataclass(frozen=True)
class Term:
    """One reason to communicate, in one training step of one rank.

    A message counts by its whole size, before what an algorithm makes of it: what is reduced, what is gathered from all
    ranks together, what is scattered, what is sent.

    Attributes:
        axis: of the mesh.
        operation: `all-reduce`, `all-gather`, `reduce-scatter` or `send`.
        reason: in words.
        calls: of the operation.
        bytes: of all messages together.
    """

    axis: str
    operation: str
    reason: str
    calls: int
    bytes: int


def mesh_on_paper(config: Config, data: int, place: int, device: str) -> Mesh:
    """The grid of ranks as a rank of one place in the pipeline sees it, without process groups."""
    parallel = config.parallel
    return Mesh(
        torch.device(device),
        tensor=Axis(parallel.tensor, sequence_parallel=parallel.sequence_parallel),
        data=Axis(data),
        pipeline=Axis(parallel.pipeline, place),
        model=Axis(parallel.tensor * parallel.pipeline),
    )


def parameter_sizes(rank: Rank) -> list[tuple[int, int]]:
    """Dimensions and numbers of every parameter that one rank holds, padding of the vocabulary included."""
    config, model, t = rank.config, rank.config.model, rank.config.parallel.tensor
    hidden, ffn, kv = model.hidden_size, model.ffn_hidden_size // t, model.num_kv_heads * model.head_size // t
    own, llama = hidden // t, model.family == "llama"
    norm = [(1, hidden)] if llama else [(1, hidden)] * 2
    block = [(2, hidden * own), (2, hidden * kv), (2, hidden * kv), (2, hidden * own)]
    block += [(2, hidden * ffn)] * (3 if llama else 2) + norm * 2
    block += [] if llama else [(1, own), (1, kv), (1, kv), (1, hidden), (1, ffn), (1, hidden)]
    every = block * len(rank.layers)
    table = [(2, vocabulary_parameters(rank))]
    every += table if rank.first else []
    every += [(2, config.ponder.steps * hidden)] if rank.first and rank.chain.pauses else []
    if rank.last:
        every += norm + ([] if model.tie_embeddings else table)
        if rank.chain.routed:
            width, options = config.ponder.router_hidden_size, config.ponder.latent_steps + 1
            every += [(2, width * hidden), (1, width)] if width else []
            every += [(2, options * (width or hidden)), (1, options)]
    assert sum(count for _, count in every) == rank_parameters(rank)
    return every


class Formula:
    """What one rank moves in a training step.

    M micro-batches of B sequences of L tokens, hidden size H, N blocks on this rank, b bytes a number. Pass i has S_i
    slots a token, so T_i = L · S_i; the last block of the stack finishes only those that somebody reads. With sequence
    parallelism L is padded to a multiple of the tensor ranks.
    """

    def __init__(self, config: Config, mesh: Mesh, parameters: Sequence[tuple[int, int]], refinements: int) -> None:
        """Take the sizes.

        Args:
            config: resolved.
            mesh: the ranks, and this one's place.
            parameters: dimensions and numbers of this rank's part of each parameter.
            refinements: R of the step.
        """
        self._config, self._mesh, self._parameters = config, mesh, parameters
        self._layers = len(stage_layers(config)[mesh.pipeline.rank])
        self._first, self._last = mesh.pipeline.rank == 0, mesh.pipeline.rank == mesh.pipeline.size - 1
        self._passes = passes_of(config.ponder)
        self._refinements, self._plan = refinements, self._passes.plan(refinements)
        self._adaptive = self._passes.routed
        tokens = config.data.sequence_length
        self._own = mesh.tensor.share(tokens)
        self._tokens = self._own * mesh.tensor.size if mesh.tensor.sequence_parallel else tokens
        self._batch, self._hidden = config.training.micro_batch_size, config.model.hidden_size
        self._micro_batches = micro_batches(config, mesh.data.size)
        self._width = 2 if config.training.precision == "bf16" else FP32
        self._stage = zero_stage(config)

    def terms(self) -> list[Term]:
        """All terms of groups that have more than one rank."""
        every = [*self._tensor_terms(), *self._pipeline_terms(), *self._data_terms(), *self._model_terms()]
        return [term for term in every if term.calls and getattr(self._mesh, term.axis).size > 1]

    def textbook(self) -> int:
        """Bytes of Megatron's 4 all-reduces of B · T · H for each block and pass."""
        slots = self._batch * self._tokens * sum(self._plan)
        return self._micro_batches * self._layers * 4 * slots * self._hidden * self._width

    def _tensor_terms(self) -> Iterator[Term]:
        hidden, options, passes = self._hidden * self._width, self._config.ponder.steps + 1, len(self._plan)
        sentences = self._batch * self._tokens
        for index, slots in enumerate(self._plan):
            count = self._layers
            yield from self._border("blocks", enter=2, leave=2, repeats=count - self._last, size=slots * hidden)
            if self._last:
                kept = len(range(slots)[self._passes.kept(index, self._plan)])
                yield from self._border("blocks", enter=1, leave=0, size=slots * hidden)  # keys need every slot
                yield from self._border("blocks", enter=1, leave=2, size=kept * hidden)
            if self._adaptive and index > 0:
                yield from self._border("log w", enter=1, leave=0, size=slots * FP32)
            yield from self._recompute_terms(index)
        if self._first:  # a pipeline's first rank embeds anew in every pass that reads tokens
            repeats = passes if self._mesh.pipeline.size > 1 and self._passes.interleaved else 1
            yield from self._border("embedding", enter=0, leave=1, repeats=repeats, size=hidden)
        if self._last:
            yield from self._border("head", enter=1, leave=0, size=hidden)
            labels = self._batch * self._config.data.sequence_length * FP32
            yield self._step("tensor", "all-reduce", "loss: largest logit", 1, labels)
            yield self._step("tensor", "all-reduce", "loss: sum of exponentials, label's logit", 1, 2 * labels)
        yield from self._baseline_terms()
        if self._mesh.tensor.sequence_parallel:
            norms = passes * (2 * self._layers + self._last)
            yield self._step("tensor", "all-reduce", "gradients of norms", norms, hidden)
            if self._adaptive and self._last:
                weight, bias = options * hidden, options * self._width
                yield self._step("tensor", "all-reduce", "gradient of the router's weight", passes, weight)
                yield self._step("tensor", "all-reduce", "gradient of the router's bias", passes, bias)
                yield self._step("tensor", "all-gather", "routing: log s, log w", 2, sentences * options * FP32)
                yield self._step("tensor", "all-gather", "routing: steps", 1, sentences * INT64)

    def _baseline_terms(self) -> Iterator[Term]:
        """Pause embeddings, which tokens of all ranks read; predictions, of which ranks gather the likeliest tokens."""
        model, axis, hidden = self._config.model, self._mesh.tensor, self._hidden * self._width
        if self._passes.pauses and self._first and axis.sequence_parallel:
            size = self._config.ponder.steps * hidden
            yield self._step("tensor", "all-reduce", "gradient of the pause embeddings", 1, size)
        if not self._passes.predicts:
            return
        predictions = len(self._plan) - 1
        if self._first:
            yield from self._border("predictions", enter=0, leave=1, repeats=predictions, size=hidden)
        if self._last:
            yield from self._border("predictions", enter=1, leave=0, repeats=predictions, size=hidden)
            unit = self._config.parallel.vocab_multiple
            columns = math.ceil(model.vocab_size / (axis.size * unit)) * unit
            count = self._batch * self._config.data.sequence_length * axis.size * min(CANDIDATES, columns)
            yield self._step("tensor", "all-gather", "likeliest logits", predictions, count * FP32)
            yield self._step("tensor", "all-gather", "likeliest tokens", predictions, count * INT64)
            yield self._step("tensor", "all-reduce", "gradients of the likeliest logits", predictions, count * FP32)

    def _border(self, reason: str, enter: int, leave: int, size: int, repeats: int = 1) -> Iterator[Term]:
        """Entering and leaving sharded regions, forward and backward; `size` is bytes of a token."""
        size *= self._batch * self._tokens
        if not self._mesh.tensor.sequence_parallel:  # one of the two directions is free
            yield self._step("tensor", "all-reduce", reason, repeats * (enter + leave), size)
            return
        for operation in ("all-gather", "reduce-scatter"):
            yield self._step("tensor", operation, reason, repeats * (enter + leave), size)

    def _recompute_terms(self, index: int) -> Iterator[Term]:
        """Forward passes of regions that are computed again, up to the last tensor that the backward pass needs.

        That is the input of the last product, so that the sum after it is not taken again.
        """
        training, slots = self._config.training, self._plan[index]
        within = training.recompute_passes is None or index < training.recompute_passes
        if training.recompute == "none" or not within:
            return
        kept = len(range(slots)[self._passes.kept(index, self._plan)]) if self._last else slots
        size = self._batch * self._tokens * self._hidden * self._width
        inner = self._layers - 1
        gathered, split = self._mesh.tensor.sequence_parallel, training.recompute == "block"
        if gathered:  # attention's input
            yield self._step("tensor", "all-gather", "recompute", inner, slots * size)
            yield self._step("tensor", "all-gather", "recompute", 1, slots * size)
        if gathered and split:  # the feed-forward layer's
            yield self._step("tensor", "all-gather", "recompute", inner, slots * size)
            yield self._step("tensor", "all-gather", "recompute", 1, kept * size)
        if split:  # attention's output
            operation = "reduce-scatter" if gathered else "all-reduce"
            yield self._step("tensor", operation, "recompute", inner, slots * size)
            yield self._step("tensor", operation, "recompute", 1, kept * size)

    def _pipeline_terms(self) -> Iterator[Term]:
        axis = self._mesh.pipeline
        model = self._config.model
        sizes = Sizes(self._batch, self._config.data.sequence_length, self._own, model.hidden_size, model.vocab_size)
        shapes = PassShapes(self._config.ponder, self._refinements, sizes)
        carried = shapes.carried(axis.size, torch.bfloat16 if self._width < FP32 else torch.float32)
        for stage in range(axis.rank, len(carried) + 1, axis.size):
            if stage < len(carried):
                yield self._step("pipeline", "send", "activations", 1, carried[stage] * self._width)
            if stage > 0:
                yield self._step("pipeline", "send", "their gradients", 1, carried[stage - 1] * self._width)
        yield Term("pipeline", "all-reduce", "sums of the tally", 1, Tally.width(self._config.ponder.steps) * FP64)

    def _data_terms(self) -> Iterator[Term]:
        size, stage = self._mesh.data.size, self._stage
        numbers = [count for _, count in self._parameters]
        each_padded = sum(_padded(count, size) for count in numbers)
        if stage == 3:
            yield self._step("data", "reduce-scatter", "gradients", 1, each_padded * FP32)
        else:
            repeats = self._micro_batches if stage == 2 else 1
            yield Term("data", "all-reduce", "gradients", repeats, repeats * sum(numbers) * FP32)
        groups = [sum(count for dims, count in self._parameters if (dims > 1) is decayed) for decayed in (True, False)]
        if stage in (1, 2):
            gathered = sum(_padded(count, 2 * size) for count in groups)
            yield Term("data", "all-gather", "updated weights", len(groups), gathered * self._width)
        if stage == 3:
            repeats = 1 if sum(numbers) <= LIVE_PARAMETERS else 2 * len(self._plan)
            for count in numbers:
                if count > SMALL_PARAMETER:
                    whole = _padded(count, size) * self._width
                    yield self._step("data", "all-gather", "weights, for all passes", repeats, whole)
            small = sum(_padded(count, size) for count in numbers if count <= SMALL_PARAMETER)
            yield Term("data", "all-gather", "updated small weights", 1, small * self._width)
        if stage > 0:
            yield Term("data", "all-reduce", "gradient norm, overflow check", 2, 2 * (FP64 if stage == 3 else FP32))

    def _model_terms(self) -> Iterator[Term]:
        checks = 2 if self._stage > 0 else 1
        yield Term("model", "all-reduce", "gradient norm, overflow check", checks, checks * FP32)

    def _step(self, axis: str, operation: str, reason: str, calls: int, size: int) -> Term:
        """As often in every micro-batch."""
        return Term(axis, operation, reason, self._micro_batches * calls, self._micro_batches * calls * size)


def _padded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
