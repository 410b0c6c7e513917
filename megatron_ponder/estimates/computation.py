"""How long one rank computes in a step on a cluster, from the configuration alone.

Each function states its equation, so that a reader can check it against the code it describes. Symbols: B sequences of
a micro-batch, L tokens, T slots of a sequence in a pass, T' those whose result somebody reads, H hidden size, N
parameters of a rank, D copies of each, b bytes of an activation.
"""

from dataclasses import dataclass

from megatron_ponder.checkpoint.optimizer_state import WEIGHT_BYTES
from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config.deepspeed import zero_stage
from megatron_ponder.config.run import MUON_ITERATIONS
from megatron_ponder.estimates.element_wise import Moved, of_attention, of_feed_forward
from megatron_ponder.estimates.flops import FORWARD_AND_BACKWARD
from megatron_ponder.estimates.part import Product
from megatron_ponder.estimates.rank import FP32, Rank


@dataclass(frozen=True)
class Work:
    """Seconds of computation."""

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        attention, elementwise = self.attention + other.attention, self.elementwise + other.elementwise
        return Work(self.matrices + other.matrices, attention, elementwise)

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.matrices, times * self.attention, times * self.elementwise)

    @property
    def total(self) -> float:
        """All of it."""
        return self.matrices + self.attention + self.elementwise


@dataclass(frozen=True)
class BothWays:
    """The work of a part of a pass, forward and backward."""

    forward: Work = Work()
    backward: Work = Work()

    def __add__(self, other: "BothWays") -> "BothWays":
        return BothWays(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "BothWays":
        return BothWays(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class Computation:
    """What the ranks of one place in the pipeline compute in a step.

    Attributes:
        rank: the place.
        cluster: that it runs on.
        refinements: R of the step.
    """

    rank: Rank
    cluster: Hardware
    refinements: int

    def products(self, rows: float, weights: tuple[Product, ...]) -> float:
        """Seconds of (rows × inner) (inner × columns): 2 · rows · inner · columns operations each, or its memory."""
        rate, b = self.cluster.peak * self.cluster.matrix_share, self.rank.width
        return sum(
            max(2 * rows * weight.weights / rate, self.moved(b * (rows * sum(weight) + weight.weights)))
            for weight in weights
        )

    def moved(self, size: float) -> float:
        """Seconds in which so many bytes are read or written."""
        return size / (self.cluster.memory_bandwidth * self.cluster.memory_bandwidth_share)

    def attention(self, run: float, index: int) -> BothWays:
        """Everything of a block up to the output projection.

        Products, attention with 2 operations for each query, key that it may see (whole blocks of keys) and channel
        that the kernel computes of queries and of values, and what element-wise operations move. Context ranks have all
        slots of a share of the heads, and copy what they exchange. A sequence counts as one segment, because nothing
        says how long documents are. The backward pass has twice the products, and of attention what its kernel says.

        Args:
            run: slots of a sequence on this rank.
            index: of the pass; in all but the first keys have weights, if they have any.
        """
        rank, block = self.rank, self.rank.part.block
        weighted = rank.chain.routed and index > 0
        batch = rank.config.training.micro_batch_size
        rows, head_size = batch * run, block.query // block.query_heads
        kernel, ranks = rank.attention, rank.axes["context"]
        operations = block.query_heads / ranks * kernel.operations(head_size, weighted)
        attended = operations * batch * self._pairs(ranks * run, index) / self._attention_rate
        channels, _ = kernel.channels(head_size, weighted)
        copied = weighted and kernel.carried != "apart"
        moved = of_attention(block, channels, copied, rank.width, self._fused, rank.residual(1.0))
        exchanged = 4 * (block.query + block.key * rank.key_repeats) if ranks > 1 else 0
        rest = self._both_ways(rows, block.before, Moved(*(numbers + exchanged for numbers in moved)))
        return rest + BothWays(Work(attention=attended), Work(attention=kernel.backward * attended))

    def _pairs(self, run: float, index: int) -> float:
        """Pairs of a query and a key that the kernel computes for a sequence of so many slots.

        Where every slot is run once, tokens that do not run it are queries too, of zeros.
        """
        rank, kernel = self.rank, self.rank.attention
        if not rank.chain.own:
            return kernel.pairs(run)
        tokens = rank.length * rank.axes["context"]
        if rank.once:
            return kernel.pairs(tokens) + tokens * index
        slots = run / tokens
        return slots * kernel.pairs(tokens) + run * (slots - 1) / 2

    @property
    def _attention_rate(self) -> float:
        return self.cluster.peak * self.cluster.attention_share

    @property
    def _fused(self) -> bool:
        return self.rank.config.training.compile

    def feed_forward(self, kept: float) -> BothWays:
        """The rest of a block: products, and what element-wise operations move."""
        block, rows = self.rank.part.block, self.rank.config.training.micro_batch_size * kept
        moved = of_feed_forward(block, self._fused, self.rank.residual(1.0))
        return self._both_ways(rows, block.after, moved)

    def _both_ways(self, rows: float, weights: tuple[Product, ...], moved: Moved) -> BothWays:
        products, width = self.products(rows, weights), self.rank.width * rows
        forward, backward = (self.moved(width * numbers) for numbers in moved)
        return BothWays(Work(products, 0.0, forward), Work(2 * products, 0.0, backward))

    def head(self) -> Work:
        """Head and loss, forward and backward: products, and 36 + 2 b bytes for each logit.

        Cross-entropy reads and writes its fp32 logits about nine times in all.
        """
        rows, part = self.rank.tokens, self.rank.part
        products = FORWARD_AND_BACKWARD * self.products(rows, (Product(part.block.hidden, part.columns),))
        return Work(products, 0.0, self.moved(rows * part.columns * (36 + 2 * self.rank.width)))

    def micro_batch(self) -> tuple[Work, float]:
        """All passes of one micro-batch; and of these, the backward pass of the first pass that has one.

        What is recomputed comes on top of a backward pass.
        """
        work, first_backward = Work(), 0.0
        rank, slots = self.rank, self.rank.slots(self.refinements)
        tokens, layers = rank.length, len(rank.layers)
        trained = rank.config.ponder_training.gradient_passes or len(slots)
        for index, (run, kept) in enumerate(slots):
            kept = kept if rank.last else run
            attended = self.attention(tokens * run, index) * layers
            whole = attended + self.feed_forward(tokens * run) * (layers - 1) + self.feed_forward(tokens * kept)
            work += whole.forward
            if index >= len(slots) - trained:
                again = {"block": whole.forward, "attention": attended.forward, "none": Work()}
                backward = whole.backward + again[rank.recompute.of_pass(index)]
                first_backward = first_backward or backward.total
                work += backward
        if rank.last:
            work += self.head() * (len(slots) if rank.chain.predicts else 1)
        return work, first_backward

    def gradient_sums(self) -> float:
        """Every pass adds its gradients of weights to those before, 3 N b; sums of micro-batches in fp32, N (b + 8)."""
        rank = self.rank
        count, passes = rank.part.count, len(rank.slots(self.refinements))
        again = rank.micro_batches > 1 or rank.width < FP32
        size = 3 * rank.width * count * (passes - 1) + (count * (rank.width + 2 * FP32) if again else 0)
        return rank.micro_batches * self.moved(size)

    def optimizer(self) -> float:
        """Weight and moments are read and written, the gradient read thrice and, for clipping, written, all in fp32.

        Of AdamW 40 bytes for each of N / D parameters; N without ZeRO. Muon has 32 for its matrices, and the products
        that make each m × n with m ≤ n orthogonal, five times 4 m² n + 2 m³ operations: of N / D, at least of one.
        """
        rank = self.rank
        ranks = rank.copies if zero_stage(rank.config) > 0 else 1
        size = (2 * WEIGHT_BYTES + 4 * FP32) * rank.part.count + 2 * rank.moments
        sides = [sorted(matrix.shape) for matrix in rank.taken_whole]
        operations = [MUON_ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides]
        products = max(sum(operations) / ranks, max(operations, default=0)) / (
            self.cluster.peak * self.cluster.matrix_share
        )
        return self.moved(size / ranks) + products
