"""Blocks that are compiled: one graph for each number of slots a token, and one for any number of packed slots.

All layers and passes share them.
"""

import time
from functools import partial

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.signals import hold_signals
from megatron_ponder.model.attention import KeysAndValues, Slots
from megatron_ponder.model.block import Block


class CompiledBlock:
    """`Block.forward` as `torch.compile` makes it.

    Weights are inputs of a graph, so that layers do not need one each. Shapes are constants of it but for the number of
    segments, because a graph of any shape is a slower one and a run has few shapes. Of packed slots there is another
    number in every pass: those have a graph of any shape, which wants no padding.

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

        self.graphs, self.seconds, self._told = 0, 0.0, (0, 0.0)
        self._backend = lookup_backend(backend)
        # Beyond its limit PyTorch refuses to compile, because it takes a function of so many graphs for a mistake.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, most)
        torch._dynamo.config.specialize_float = True  # ε of norms, or the first graph of any shape is made twice
        compiled = partial(torch.compile, Block.forward, fullgraph=True, backend=self._compile)
        self._of_shape, self._of_any_shape = compiled(dynamic=False), compiled(dynamic=True)

    def __call__(
        self,
        block: Block,
        x_BTH: Tensor,
        slots: Slots,
        cache: None = None,
        recipes: bool = False,
        recompute_attention: bool = False,
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
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
        run = self._of_any_shape if slots.packed else self._of_shape
        if slots.packed and x_BTH._is_view():  # or there is a graph for what it is a view of
            x_BTH = x_BTH.clone(memory_format=torch.contiguous_format)
        if slots.segments is not None:  # of which every micro-batch has another number
            torch._dynamo.maybe_mark_dynamic(slots.segments.bounds, 0)
        graphs, begun = self.graphs, time.perf_counter()
        try:
            result = run(block, x_BTH, slots, recompute_attention=recompute_attention)
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(getattr(error, "inner_exception", error)) or type(error).__name__
            reason = next(line for line in said.splitlines() if line.strip())
            raise UserError(
                f"PyTorch {torch.__version__} cannot compile the blocks of this model ({reason}); set training.compile "
                "to false"
            ) from error
        if self.graphs > graphs:
            self.seconds += time.perf_counter() - begun
        return result

    def news(self) -> str | None:
        """What has been compiled since this was last asked; None for nothing."""
        (graphs, seconds), self._told = self._told, (self.graphs, self.seconds)
        if self.graphs == graphs:
            return None
        further = "further " if graphs else ""
        return f"{self.graphs - graphs} {further}graphs of blocks compiled in {self.seconds - seconds:.1f} s"

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.graphs += 1
        # Left to itself PyTorch compiles the backward pass when it is first run, where nobody expects it to fail.
        # A signal is for the run to heed once its step is done, not for the C++ compiler to die of.
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True), hold_signals():
            return self._backend(graph, inputs)
