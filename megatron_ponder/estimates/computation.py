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

    def attention(self, run: float, weighted: bool) -> Work:
        """Everything of a block up to the output projection, forward.

        Products, attention with 2 operations for each query, key that it may see (whole blocks of keys) and channel
        that the kernel computes of queries and of values, the norm (T 2 H b), rotations of queries and keys (T 2 b a
        channel), and their norms if there are any (likewise). Context ranks have all slots of a share of the heads, and
        copy what they exchange (likewise). A sequence counts as one segment, because nothing says
        how long documents are.
        """
        rank, block, b = self.rank, self.rank.part.block, self.rank.width
        batch = rank.config.training.micro_batch_size
        rows, head_size = batch * run, block.query // block.query_heads
        kernel, rotated = rank.attention, block.query_heads + block.key_heads
        ranks = rank.axes["context"]
        operations = block.query_heads / ranks * kernel.operations(head_size, weighted)
        operations *= batch * kernel.pairs(ranks * run)
        turned = rotated * kernel.channels(head_size, weighted)[0]
        exchanged = 2 * (block.query + block.key * rank.key_repeats) if ranks > 1 else 0
        numbers = rank.residual(rows) * block.hidden + rows * (turned + block.normed + exchanged)
        return Work(self.products(rows, block.before), operations / self._attention_rate, self.moved(b * 2 * numbers))

    @property
    def _attention_rate(self) -> float:
        return self.cluster.peak * self.cluster.attention_share

    def feed_forward(self, kept: float) -> Work:
        """The rest of a block, forward: products, norm and two additions to the stream (T' 8 H b), the activation."""
        block, rows = self.rank.part.block, self.rank.config.training.micro_batch_size * kept
        numbers = 8 * self.rank.residual(rows) * block.hidden + rows * (block.expanded + block.activated)
        return Work(self.products(rows, block.after), 0.0, self.moved(self.rank.width * numbers))

    def head(self) -> Work:
        """Head and loss, forward and backward: products, and 36 + 2 b bytes for each logit.

        Cross-entropy reads and writes its fp32 logits about nine times in all.
        """
        rows, part = self.rank.tokens, self.rank.part
        products = FORWARD_AND_BACKWARD * self.products(rows, (Product(part.block.hidden, part.columns),))
        return Work(products, 0.0, self.moved(rows * part.columns * (36 + 2 * self.rank.width)))

    def micro_batch(self) -> tuple[Work, float]:
        """All passes of one micro-batch; and of these, the backward pass of the first pass that has one.

        A backward pass does twice the work of its forward pass, attention what its kernel says; what is recomputed
        comes on top.
        """
        work, first_backward = Work(), 0.0
        rank, slots = self.rank, self.rank.slots(self.refinements)
        tokens, layers = rank.length, len(rank.layers)
        trained = rank.config.ponder_training.gradient_passes or len(slots)
        for index, (run, kept) in enumerate(slots):
            kept = kept if rank.last else run
            attended = self.attention(tokens * run, weighted=rank.chain.routed and index > 0) * layers
            forward = attended + self.feed_forward(tokens * run) * (layers - 1) + self.feed_forward(tokens * kept)
            work += forward
            if index >= len(slots) - trained:
                again = {"block": forward, "attention": attended, "none": Work()}[rank.recompute.of_pass(index)]
                backward = forward * 2 + Work(attention=forward.attention * (rank.attention.backward - 2)) + again
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
