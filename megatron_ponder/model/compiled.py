"""Blocks that are compiled: one graph for each number of slots a token, shared by all layers and passes."""

import time

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.block import Block


class CompiledBlock:
    """`Block.forward` as `torch.compile` makes it.

    Weights are inputs of a graph, so that layers do not need one each. Shapes are constants of it but for the number of
    segments, because a graph of any shape is a slower one and a run has few shapes.

    Attributes:
        graphs: compiled so far, each with its backward pass.
        seconds: that were spent on it, with the calls that first needed them.
    """

    def __init__(self, most: int, backend: str = "inductor") -> None:
        """Compile nothing yet.

        Args:
            most: graphs that there may be.
            backend: as of `torch.compile`.
        """
        from torch._dynamo import lookup_backend  # which takes seconds that others need not wait

        self.graphs, self.seconds, self._told = 0, 0.0, 0
        self._backend = lookup_backend(backend)
        # Beyond its limit PyTorch refuses to compile, because it takes a function of so many graphs for a mistake.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, most)
        self._compiled = torch.compile(Block.forward, fullgraph=True, dynamic=False, backend=self._compile)

    def __call__(
        self,
        block: Block,
        x_BTH: Tensor,
        slots: Slots,
        cache: None = None,
        recipes: bool = False,
        recompute_attention: bool = False,
    ) -> Tensor:
        """The residual stream after a block, as `Block.forward` gives it.

        Args:
            block: any of those that are alike.
            x_BTH: the residual stream before it.
            slots: what its positions are.
            cache: none, as there is no backward pass with one.
            recipes: not asked for; the compiler decides what is cheap to compute again.
            recompute_attention: as in `Block.forward`.

        Raises:
            UserError: if PyTorch cannot compile it.
        """
        if slots.segments is not None:  # of which every micro-batch has another number
            torch._dynamo.maybe_mark_dynamic(slots.segments.bounds, 0)
        graphs, begun = self.graphs, time.perf_counter()
        try:
            y_BTH = self._compiled(block, x_BTH, slots, recompute_attention=recompute_attention)
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(getattr(error, "inner_exception", error)) or type(error).__name__
            reason = next(line for line in said.splitlines() if line.strip())
            raise UserError(
                f"PyTorch {torch.__version__} cannot compile the blocks of this model ({reason}); set training.compile "
                "to false"
            ) from error
        if self.graphs > graphs:
            self.seconds += time.perf_counter() - begun
        return y_BTH

    def news(self) -> str | None:
        """What has been compiled since this was last asked; None for nothing."""
        if self.graphs == self._told:
            return None
        self._told = self.graphs
        return f"{self.graphs} graphs of blocks compiled in {self.seconds:.1f} s"

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs += 1
        return self._backend(graph, inputs)
