"""The same chain of passes for a model whose blocks are spread over pipeline ranks: one stage for one pass of one rank.

What travels between the ranks of a pass is the residual stream with the log weights of its slots; from the last rank
back to the first, what one pass hands to the next.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_ponder.config import PonderConfig
from megatron_ponder.model.passes import PassState, enter_pass, interleaving, pass_slots
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.router import Pruning
from megatron_ponder.parallel.pipeline import pack, packed_size, unpack

Finish = Callable[[PonderOutput, Tensor], Tensor]
Shape = tuple[int, ...]


class PassShapes:
    """Shapes of what travels, for micro-batches of one size."""

    def __init__(self, ponder: PonderConfig, refinements: int, batch: int, tokens: int, hidden_size: int) -> None:
        """Describe `jacobi(refinements)`.

        Args:
            ponder: mode and steps.
            refinements: R.
            batch: sequences of a micro-batch.
            tokens: of a sequence in the residual stream of one rank.
            hidden_size: H.
        """
        self.plan = pass_slots(ponder.steps, refinements)
        self._routed = ponder.mode == "adaptive"
        self._sizes = (batch, tokens, hidden_size)

    def within(self, index: int) -> tuple[Shape, Shape | None]:
        """The residual stream and log w of its slots, between two ranks of pass `index`."""
        batch, tokens, hidden_size = self._sizes
        slots = tokens * self.plan[index]
        return (batch, slots, hidden_size), (batch, slots) if self._routed and index > 0 else None

    def after(self, index: int) -> tuple[Shape, Shape | None]:
        """Latents and log w that pass `index` hands to the next."""
        batch, tokens, hidden_size = self._sizes
        slots = self.plan[index + 1]
        return (batch, tokens, slots - 1, hidden_size), (batch, tokens, slots) if self._routed else None

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
        pruning: soft mask or hard rule.
    """

    def __init__(self, model: PonderLM, index: int, shapes: PassShapes, pruning: Pruning, finish: Finish) -> None:
        """Prepare one stage.

        Args:
            model: this rank's part; stages of all passes share it.
            index: of the pass.
            shapes: of what travels.
            pruning: soft mask or hard rule.
            finish: makes the last stage's result of the model's output and the tokens.
        """
        super().__init__()
        self.model, self.pruning = model, pruning
        self._index, self._shapes, self._finish = index, shapes, finish

    def forward(self, received: Tensor, tokens: Tensor) -> Tensor:
        """Run the stage.

        Args:
            received: the packed tensor of the stage before; ignored by the first stage of all.
            tokens: int64 (B, L + 1), the micro-batch with its labels.

        Returns:
            The packed tensor for the next stage, or what `finish` returns.
        """
        model, index, plan = self.model, self._index, self._shapes.plan
        layout = interleaving(tokens[:, :-1], model.eod_id)
        if model.part.first:
            state = PassState() if index == 0 else PassState(*unpack(received, *self._shapes.after(index - 1)))
            x, log_w = enter_pass(model.embed(tokens[:, :-1]), state)
        else:
            x, log_w = unpack(received, *self._shapes.within(index))
        x = model.run_blocks(x, log_w, layout, index, plan)
        if not model.part.last:
            return pack(x, log_w)
        hidden, routing = model.end_pass(x, layout, self.pruning)
        if index + 1 < len(plan):
            state = model.next_state(hidden, routing, self.pruning, plan[index + 1])
            return pack(state.latents, state.log_w)
        return self._finish(model.output(hidden, routing, self.pruning, layout, len(plan)), tokens)
