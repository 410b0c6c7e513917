"""The same chain of passes for a model whose blocks are spread over pipeline ranks: one stage for one pass of one rank.

What travels between the ranks of a pass is its stream; from the last rank back to the first, what one pass hands to the
next.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_ponder.config import PonderConfig
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.modes.pondering import Shape, Sizes
from megatron_ponder.model.ponder import Batch, PonderLM, PonderOutput
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.pipeline import pack, packed_size, unpack

Finish = Callable[[PonderOutput, Tensor], Tensor]


class PassShapes:
    """Shapes of what travels, for micro-batches of one size."""

    def __init__(self, ponder: PonderConfig, refinements: int, sizes: Sizes, latents: bool = True) -> None:
        """Describe `jacobi(refinements)`.

        Args:
            ponder: mode and steps.
            refinements: R.
            sizes: of a micro-batch.
            latents: whether there are latent steps.
        """
        self._passes, self._sizes = passes_of(ponder), sizes
        self.plan = self._passes.plan(refinements, latents)

    def within(self, index: int) -> tuple[Shape, Shape | None]:
        """The stream between two ranks of pass `index`."""
        return self._passes.stream_shapes(self._sizes, index, self.plan)

    def after(self, index: int) -> tuple[Shape, Shape | None]:
        """What pass `index` hands to the next."""
        return self._passes.state_shapes(self._sizes, index, self.plan)

    def carried(self, ranks: int, dtype: torch.dtype) -> list[int]:
        """Numbers in the packed tensor between consecutive stages, over all passes and pipeline ranks."""
        shapes = []
        for index in range(len(self.plan)):
            shapes += [self.within(index)] * (ranks - 1)
            shapes += [self.after(index)] if index + 1 < len(self.plan) else []
        return [packed_size(*pair, dtype) for pair in shapes]


class PassStage(nn.Module):
    """One pass through this rank's part of the model.

    Attributes:
        model: this rank's part.
        rule: how a routing is applied.
    """

    def __init__(self, model: PonderLM, index: int, shapes: PassShapes, rule: Rule, finish: Finish) -> None:
        """Prepare one stage.

        Args:
            model: this rank's part; stages of all passes share it.
            index: of the pass.
            shapes: of what travels.
            rule: how a routing is applied.
            finish: makes the last stage's result of the model's output and the tokens.
        """
        super().__init__()
        self.model, self.rule = model, rule
        self._index, self._shapes, self._finish = index, shapes, finish

    def forward(self, received: Tensor, tokens: Tensor) -> Tensor:
        """Run the stage.

        Args:
            received: the packed tensor of the stage before; ignored by the first stage of all.
            tokens: int64 (B, L + 1), the micro-batch with its labels.

        Returns:
            The packed tensor for the next stage, or what `finish` returns.
        """
        embeds = self.model.part.first and (self._index == 0 or self.model.passes.interleaved)
        batch = self.model.read(tokens[:, :-1], embeds, first=self._index == 0)
        result = self._run(batch, received, tokens[:, :-1])
        return self._finish(result, tokens) if isinstance(result, PonderOutput) else result

    def _run(self, batch: Batch, received: Tensor, tokens_BL: Tensor) -> Tensor | PonderOutput:
        """What is sent on; behind the last stage of all the output."""
        model, passes, index, plan = self.model, self.model.passes, self._index, self._shapes.plan
        if not model.part.first:
            stream = passes.unpack_stream(*unpack(received, *self._shapes.within(index)))
        else:
            state = passes.state_type(*unpack(received, *self._shapes.after(index - 1))) if index > 0 else None
            stream = passes.enter(model.front, batch.embedded_BLH, state)
        stream = model.run_blocks(stream, batch.geometry, index, plan)
        if not model.part.last:
            return pack(*passes.pack_stream(stream))
        result = model.end_pass(stream, batch, self.rule)
        if index + 1 < len(plan):
            return pack(*model.next_state(result, self.rule, plan[index + 1]))
        return model.output(result, self.rule, plan)
