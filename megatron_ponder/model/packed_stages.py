"""Packed passes whose blocks are spread over pipeline ranks.

A message has room for every slot of its plan, so that nothing has to be agreed on, and what is run stands at its front.
How many that is every rank reads in the log weights, which say what is dead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config import PonderConfig
from megatron_ponder.model.modes.pondering import Shape, Sizes
from megatron_ponder.model.packed import PackedPasses, PackedState, PackedStream, Packing, start
from megatron_ponder.model.ponder import Batch, PonderLM, PonderOutput
from megatron_ponder.model.router import Rule, executed_before
from megatron_ponder.model.stages import Finish, PassShapes, PassStage
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.pipeline import pack, unpack
from megatron_ponder.parallel.regions import all_tokens, gather_parts, own_part


class PackedShapes(PassShapes):
    """Shapes of what travels: room for slots, and beside log weights how many slots each pass ran of each sequence."""

    def __init__(self, ponder: PonderConfig, refinements: int, sizes: Sizes, axis: Axis) -> None:
        """Describe `packed_jacobi(refinements)`.

        Args:
            ponder: with a router.
            refinements: R.
            sizes: of a micro-batch.
            axis: the tensor ranks.
        """
        super().__init__(ponder, refinements, sizes)
        self._axis = axis

    def within(self, index: int) -> tuple[Shape, Shape | None]:
        """The stream between two ranks of pass `index`."""
        return self._room(self.plan[index]), self._wide(index) if index > 0 else None

    def after(self, index: int) -> tuple[Shape, Shape | None]:
        """What pass `index` hands to the next."""
        return self._room(self.plan[index + 1] - 1), self._wide(index + 1)

    def log_weights(self, index: int) -> Shape:
        """Log weights with which slots enter pass `index`."""
        return 1, self._share(1), self.plan[index]

    def counts(self, index: int) -> Shape:
        """Slots that the passes before pass `index` ran of each sequence."""
        return index, self._sizes.batch

    def _room(self, slots: int) -> Shape:
        return 1, self._share(slots), self._sizes.hidden_size

    def _wide(self, index: int) -> Shape:
        return (torch.Size(self.log_weights(index)).numel() + torch.Size(self.counts(index)).numel(),)

    def _share(self, slots: int) -> int:
        return self._axis.share(self._sizes.batch * self._sizes.tokens * slots)


class PackedStage(PassStage):
    """One packed pass through this rank's part of the model."""

    def __init__(self, model: PonderLM, index: int, shapes: PackedShapes, rule: Rule, finish: Finish) -> None:
        super().__init__(model, index, shapes, rule, finish)
        self._passes = PackedPasses(model, rule, shapes.plan)

    def _run(self, batch: Batch, received: Tensor, tokens_BL: Tensor) -> Tensor | PonderOutput:
        part, passes, index = self.model.part, self._passes, self._index
        if part.first:
            state = self._state(received, tokens_BL.numel()) if index > 0 else start(tokens_BL)
            stream = passes.enter(passes.embedded(batch), state)
        else:
            stream = self._stream(received, tokens_BL)
        stream, kept = passes.run(stream, batch, index)
        if not part.last:
            return self._pack(stream.x_1TH, self._shapes.within(index)[0], stream)
        result = passes.end(stream, kept)
        if index + 1 == len(passes.plan):
            return passes.output(result)
        state = passes.hand_over(result, index)
        return self._pack(own_part(state.latents_1ZH, self.model.axis), self._shapes.after(index)[0], state)

    def _pack(self, x_1TH: Tensor, room: Shape, of: PackedState | PackedStream) -> Tensor:
        """A message: slots with zeros behind them, log weights, counts."""
        full = F.pad(x_1TH, (0, 0, 0, room[1] - x_1TH.shape[1]))
        if of.log_w_1NS is None:
            return pack(full, None)
        return pack(full, torch.cat([of.log_w_1NS.flatten(), of.slots_PB.flatten().to(of.log_w_1NS.dtype)]))

    def _state(self, received: Tensor, tokens: int) -> PackedState:
        """What the last rank sends the first."""
        x_1TH, wide = unpack(received, *self._shapes.after(self._index - 1))
        packing, slots_PB, log_w_1NS = self._read(wide, tokens)
        axis, latents = self.model.axis, len(packing.token_T) - tokens
        return PackedState(packing, slots_PB, log_w_1NS, gather_parts(x_1TH[:, : axis.share(latents)], axis, latents))

    def _stream(self, received: Tensor, tokens_BL: Tensor) -> PackedStream:
        """What a rank sends the next one."""
        x_1TH, wide = unpack(received, *self._shapes.within(self._index))
        if wide is None:
            packing, slots_PB, log_w_1NS, _ = start(tokens_BL)
        else:
            packing, slots_PB, log_w_1NS = self._read(wide, tokens_BL.numel())
        share = self.model.axis.share(len(packing.token_T))
        return PackedStream(packing, slots_PB, log_w_1NS, x_1TH[:, :share])

    def _read(self, wide: Tensor, tokens: int) -> tuple[Packing, Tensor, Tensor]:
        """Which slots there are, how many there have been, and log weights."""
        shape, counts = self._shapes.log_weights(self._index), self._shapes.counts(self._index)
        log_w, slots = wide.split([torch.Size(shape).numel(), torch.Size(counts).numel()])
        log_w_1NS = log_w.view(shape)
        own_1N = executed_before(log_w_1NS.detach().flatten(1), shape[:2], wide.device)
        ran_N = all_tokens(own_1N, self.model.axis, tokens).squeeze(0)
        return Packing.of(ran_N), slots.detach().view(counts).long(), log_w_1NS
