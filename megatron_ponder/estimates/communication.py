"""What ranks send each other in one training step, term by term, from the configuration alone.

`benchmarks/communication.py` counts on real ranks what is sent, and compares.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ponder.config.deepspeed import LIVE_PARAMETERS, SMALL_PARAMETER, keeps_gradients, zero_stage
from megatron_ponder.estimates.rank import FP32, Rank
from megatron_ponder.model.modes.ponderlm import candidates
from megatron_ponder.model.stages import PassShapes
from megatron_ponder.model.tally import Tally

INT64, FP64 = 8, 8  # bytes of a number


@dataclass(frozen=True)
class Term:
    """One reason to communicate, in one training step of one rank.

    A message counts by its whole size, before what an algorithm makes of it: what is reduced, what is gathered from all
    ranks together, what is scattered, what is sent; in an all-to-all to all ranks together, this one among them.

    Attributes:
        axis: of the mesh, or `model` or `copies`.
        operation: `all-reduce`, `all-gather`, `all-to-all`, `reduce-scatter` or `send`.
        reason: in words.
        calls: of the operation.
        bytes: of all messages together.
        during: the computation that it may hide behind where DeepSpeed overlaps the two: `forward`, `backward` or none.
    """

    axis: str
    operation: str
    reason: str
    calls: int
    bytes: int
    during: Literal["forward", "backward"] | None = None


class Formula:
    """What one rank moves in a training step.

    M micro-batches of B sequences of L tokens, hidden size H, N blocks on this rank, b bytes a number. Pass i has S_i
    slots a token, so T_i = L · S_i; the last block of the stack finishes only those that somebody reads. With sequence
    parallelism L is padded to a multiple of the tensor ranks.
    """

    def __init__(self, rank: Rank, refinements: int) -> None:
        """Describe the steps of a rank that have R refinements."""
        self._rank, self._refinements, self._tensor = rank, refinements, rank.tensor
        self._passes, self._slots = rank.chain, rank.slots(refinements)
        tokens = rank.length
        self._tokens = self._tensor.share(tokens) * self._tensor.size if self._tensor.sequence_parallel else tokens
        self._batch, self._hidden = rank.config.training.micro_batch_size, rank.part.block.hidden

    def terms(self) -> list[Term]:
        """All terms of groups that have more than one rank."""
        every = [*self._tensor_terms(), *self._context_terms(), *self._pipeline_terms()]
        every += [*self._copies_terms(), *self._model_terms()]
        return [term for term in every if term.calls and self._rank.axes[term.axis] > 1]

    def textbook(self) -> int:
        """Bytes of Megatron's 4 all-reduces of B · T · H for each block and pass."""
        slots = self._batch * self._tokens * sum(run for run, _ in self._slots)
        return self._rank.micro_batches * len(self._rank.layers) * 4 * slots * self._hidden * self._rank.width

    def _tensor_terms(self) -> Iterator[Term]:
        rank, hidden = self._rank, self._hidden * self._rank.width
        for index, (run, kept) in enumerate(self._slots):
            yield from self._border("blocks", enter=2, leave=2, repeats=len(rank.layers) - rank.last, size=run * hidden)
            if rank.last:
                yield from self._border("blocks", enter=1, leave=0, size=run * hidden)  # keys need every slot
                yield from self._border("blocks", enter=1, leave=2, size=kept * hidden)
            if self._passes.routed and index > 0 and not rank.once:
                yield from self._border("log w", enter=1, leave=0, size=run * FP32)
            yield from self._recompute_terms(index)
        if self._passes.routed and rank.once:  # of all steps together
            yield from self._border("log w", enter=1, leave=0, size=self._passes.steps * FP32)
        if rank.first:  # a pipeline's first rank embeds anew in every pass that reads tokens
            anew = rank.axes["pipeline"] > 1 and self._passes.interleaved
            yield from self._border("embedding", enter=0, leave=1, repeats=len(self._slots) if anew else 1, size=hidden)
        if rank.last:
            yield from self._border("head", enter=1, leave=0, size=hidden)
            labels = rank.tokens * FP32
            yield self._step("tensor", "all-reduce", "loss: largest logit", 1, labels)
            yield self._step("tensor", "all-reduce", "loss: sum of exponentials, label's logit", 1, 2 * labels)
        if self._passes.predicts:
            yield from self._prediction_terms()
        yield from self._gradient_terms()
        if self._tensor.sequence_parallel and rank.part.router:
            options, sentences = rank.part.router[-1].columns, self._batch * self._tokens
            yield self._step("tensor", "all-gather", "routing: log s, log w", 2, sentences * options * FP32)
            yield self._step("tensor", "all-gather", "routing: steps", 1, sentences * INT64)
        yield from self._update_terms()

    def _gradient_terms(self) -> Iterator[Term]:
        """Gradients of what each rank applies to its tokens of the residual stream, or to its heads."""
        rank, split = self._rank, self._tensor.sequence_parallel
        shared = [size.count for size in rank.part.parameters if size.of_heads or (size.replicated and split)]
        if not shared:
            return
        reason = "gradients of parameters on all ranks"
        if keeps_gradients(rank.config):
            yield Term("tensor", "all-reduce", reason, 1, sum(shared) * FP32)
        else:
            yield self._each("tensor", "all-reduce", reason, shared, 1)

    def _update_terms(self) -> Iterator[Term]:
        """What Muon needs to have a matrix whole on each data rank that updates some of it; the mean of these ranks.

        Data ranks that share one send each other their parts, tensor ranks gather theirs.
        """
        rank = self._rank
        ranks = rank.copies if zero_stage(rank.config) > 0 else 1
        share = _padded(sum(matrix.count for matrix in rank.taken_whole), 2 * ranks) // ranks
        begin = gathers = gathered = sends = sent = 0
        for matrix in rank.taken_whole:
            end = begin + matrix.count
            sharers = (end - 1) // share - begin // share + 1
            gathers, gathered = gathers + sharers, gathered + sharers * math.prod(matrix.shape)
            sends, sent = sends + sharers * (sharers - 1), sent + matrix.count * (sharers - 1)
            begin = end
        width = rank.width
        yield Term("tensor", "all-gather", "matrices of Muon", -(-gathers // ranks), gathered * width // ranks)
        yield Term("copies", "send", "parts of matrices of Muon", -(-sends // ranks), sent * width // ranks)

    def _prediction_terms(self) -> Iterator[Term]:
        """Of predictions ranks gather the likeliest tokens, whose embeddings the next pass reads."""
        rank, hidden, predictions = self._rank, self._hidden * self._rank.width, len(self._slots) - 1
        if rank.first:
            yield from self._border("predictions", enter=0, leave=1, repeats=predictions, size=hidden)
        if rank.last:
            yield from self._border("predictions", enter=1, leave=0, repeats=predictions, size=hidden)
            count = rank.tokens * self._tensor.size * candidates(rank.part.columns)
            yield self._step("tensor", "all-gather", "likeliest logits", predictions, count * FP32)
            yield self._step("tensor", "all-gather", "likeliest tokens", predictions, count * INT64)
            yield self._step("tensor", "all-reduce", "gradients of the likeliest logits", predictions, count * FP32)

    def _border(self, reason: str, enter: int, leave: int, size: int, repeats: int = 1) -> Iterator[Term]:
        """Entering and leaving sharded regions, forward and backward; `size` is bytes of a token."""
        size *= self._batch * self._tokens
        if not self._tensor.sequence_parallel:  # one of the two directions is free
            yield self._step("tensor", "all-reduce", reason, repeats * (enter + leave), size)
            return
        for operation in ("all-gather", "reduce-scatter"):
            yield self._step("tensor", operation, reason, repeats * (enter + leave), size)

    def _recompute_terms(self, index: int) -> Iterator[Term]:
        """Forward passes of regions that are computed again, up to the last tensor that the backward pass needs.

        That is the input of the last product, so that the sum after it is not taken again.
        """
        recompute, (slots, kept) = self._rank.recompute.of_pass(index), self._slots[index]
        if recompute == "none":
            return
        kept = kept if self._rank.last else slots
        size = self._batch * self._tokens * self._hidden * self._rank.width
        again = []  # what is sent, and slots of it in the last block
        if self._tensor.sequence_parallel:
            again += [("all-gather", slots)]  # attention's input
            again += [("all-gather", kept)] if recompute == "block" else []  # the feed-forward layer's
        if recompute == "block":  # attention's output
            again += [("reduce-scatter" if self._tensor.sequence_parallel else "all-reduce", kept)]
        for operation, last in again:
            yield self._step("tensor", operation, "recompute", len(self._rank.layers) - 1, slots * size)
            yield self._step("tensor", operation, "recompute", 1, last * size)

    def _context_terms(self) -> Iterator[Term]:
        """Around attention, forward and backward, queries and outputs, keys and values, change from slots to heads.

        log w goes to every rank, once a pass, and its gradient back. Where every slot is run once, that of all steps
        goes together, and of tokens that do not run a step zeros are sent.
        """
        rank, block, ranks = self._rank, self._rank.part.block, self._rank.axes["context"]
        for index, (run, _) in enumerate(self._slots):
            calls = (4 if rank.recompute.of_pass(index) == "none" else 6) * len(rank.layers)
            size = rank.tokens * (1 if rank.once else run) * rank.width
            yield self._step("context", "all-to-all", "queries, outputs", calls, size * block.query)
            yield self._step("context", "all-to-all", "keys, values", calls, size * block.key * rank.key_repeats)
            if self._passes.routed and index > 0 and not rank.once:
                yield self._step("context", "all-to-all", "log w", 2, rank.tokens * run * ranks * FP32)
        if self._passes.routed and rank.once:
            yield self._step("context", "all-to-all", "log w", 2, rank.tokens * self._passes.steps * ranks * FP32)
        if rank.config.data.reset_at_eod:
            reads = len(self._slots) if rank.axes["pipeline"] > 1 else 1
            yield self._step("context", "all-gather", "ends of documents", reads, rank.tokens * ranks * INT64)
        if rank.mean_steps is not None and not rank.once:
            yield self._step("context", "all-gather", "steps", len(self._slots), rank.tokens * ranks * INT64)
        if rank.last and not rank.once:
            yield self._step("context", "all-gather", "work", 1, self._batch * len(self._slots) * ranks * FP64)

    def _pipeline_terms(self) -> Iterator[Term]:
        rank, ranks = self._rank, self._rank.axes["pipeline"]
        carried = PassShapes(rank.config.ponder, self._refinements, rank.sizes).carried(ranks, rank.dtype)
        for stage in range(rank.pipeline_rank, len(carried) + 1, ranks):
            if stage < len(carried):
                yield self._step("pipeline", "send", "activations", 1, carried[stage] * rank.width)
            if stage > 0:
                yield self._step("pipeline", "send", "their gradients", 1, carried[stage - 1] * rank.width)
        if rank.config.model.tie_embeddings and rank.first != rank.last:
            yield Term("pipeline", "all-reduce", "gradient of the tied embedding", 1, rank.part.table * FP32)
        yield Term("pipeline", "all-reduce", "sums of the tally", 1, Tally.width(rank.config.ponder.steps) * FP64)

    def _copies_terms(self) -> Iterator[Term]:
        rank, size, stage = self._rank, self._rank.copies, zero_stage(self._rank.config)
        numbers = [parameter.count for parameter in rank.part.parameters]
        each_padded = sum(_padded(count, size) for count in numbers)
        if stage == 3:
            gradients = self._step("copies", "reduce-scatter", "gradients", 1, each_padded * FP32)
        else:
            repeats = rank.micro_batches if stage == 2 else 1
            gradients = Term("copies", "all-reduce", "gradients", repeats, repeats * sum(numbers) * FP32)
        yield replace(gradients, during="backward" if stage > 0 else None)
        groups = rank.optimizer_groups
        if stage in (1, 2):
            gathered = sum(_padded(count, 2 * size) for count in groups)
            yield Term("copies", "all-gather", "updated weights", len(groups), gathered * rank.width)
        if stage == 3:
            repeats = 1 if sum(numbers) <= LIVE_PARAMETERS else 2 * len(self._slots)
            large = [_padded(count, size) for count in numbers if count > SMALL_PARAMETER]
            weights = self._each("copies", "all-gather", "weights, for all passes", large, repeats)
            yield replace(weights, during="forward")
            small = sum(_padded(count, size) for count in numbers if count <= SMALL_PARAMETER)
            yield Term("copies", "all-gather", "updated small weights", 1, small * rank.width)
        if stage == 3:
            yield Term("copies", "all-reduce", "gradient norm, overflow check", 2, 2 * FP64)
        elif stage > 0:
            yield self._checks("copies", len(groups))

    def _model_terms(self) -> Iterator[Term]:
        stage = zero_stage(self._rank.config)
        yield self._checks("model", 2) if stage > 0 else Term("model", "all-reduce", "gradient norm", 1, FP32)

    def _checks(self, axis: str, norms: int) -> Term:
        """The norm of each group of parameters, and in bf16 a byte that tells of gradients that are no numbers."""
        flags = int(self._rank.width < FP32 and zero_stage(self._rank.config) < 3)
        return Term(axis, "all-reduce", "gradient norm, overflow check", norms + flags, norms * FP32 + flags)

    def _step(self, axis: str, operation: str, reason: str, calls: int, size: int) -> Term:
        """As often in every micro-batch."""
        count = self._rank.micro_batches * calls
        return Term(axis, operation, reason, count, count * size)

    def _each(self, axis: str, operation: str, reason: str, counts: list[int], repeats: int) -> Term:
        """A call for each of these numbers of activations' type, so often in every micro-batch."""
        times = self._rank.micro_batches * repeats
        return Term(axis, operation, reason, times * len(counts), times * sum(counts) * self._rank.width)


def _padded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple
