"""Decoding forwards of few sizes, with inputs and outputs at fixed addresses: what a GPU replays as a captured graph.

A forward is padded to the next size by slots of no sequence, which have a row and a block of their own. What reads
prompts runs as in `Runner`, padded likewise to fewer sizes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ponder.generation.forward import Forward, Outcome
from megatron_ponder.generation.runner import Arrived, Routed, Runner, known_of
from megatron_ponder.generation.slot_numbers import SlotNumbers, upload
from megatron_ponder.model.modes.pondering import LatentReads

SIZES = (1, 2, 4)
STRIDE = 8


def padded_size(slots: int) -> int:
    """1, 2, 4, or the next multiple of 8."""
    return next((size for size in SIZES if slots <= size), -(-slots // STRIDE) * STRIDE)


class Decoded(NamedTuple):
    """What a decoding forward gives.

    Attributes:
        inputs_TH: what entered the first block.
        hidden_TH: hidden states.
        read_TX: what latent slots of the next forward read.
        routed: None where every token takes all steps.
        fused_TH: outputs of the tokens so far.
    """

    inputs_TH: Tensor
    hidden_TH: Tensor
    read_TX: Tensor
    routed: Routed | None
    fused_TH: Tensor


class StaticRunner(Runner):
    """A runner of a whole model whose decoding forwards are replayed: on a GPU as graphs, elsewhere as they are."""

    def __init__(self, *arguments) -> None:
        """Start without any sequence; arguments as of `Runner`, with the number of blocks."""
        super().__init__(*arguments)
        assert self.model.part.is_whole and self.cache.fixed
        self._by_size: dict[int, _Step] = {}
        self._decoded: Decoded | None = None
        hidden_TH = self._hidden_TH.new_zeros(1, self._hidden_TH.shape[1])
        with torch.inference_mode():
            self.read_TX = self._passes.read_by_latents(self.model.back, hidden_TH, None)
        self._hidden_TH = self._inputs_TH = hidden_TH

    @torch.inference_mode()
    def run(self, forward: Forward, received_TH: Tensor | None = None) -> Tensor:
        self._decoded = None
        if not forward or forward.prompts:
            return super().run(forward, received_TH)
        numbers, size = self.cache.prepare(forward), padded_size(len(forward))
        if size not in self._by_size:
            self._by_size[size] = _Step(self, size)
        step = self._by_size[size]
        step.fill(numbers, self.read_TX, self._inputs_TH)
        self._decoded = step.replay()
        return self._decoded.hidden_TH[: len(forward)]

    @torch.inference_mode()
    def finish(self, forward: Forward, hidden_TH: Tensor) -> Outcome:
        if self._decoded is None:
            return super().finish(forward, hidden_TH)
        inputs_TH, _, read_TX, routed, fused_TH = self._decoded
        count = len(forward)
        self._inputs_TH, self._hidden_TH, self.read_TX = inputs_TH[:count], hidden_TH, read_TX[:count]
        routed = None if routed is None else routed.first(count)
        return self._outcome(forward, known_of(routed, [], count, self._steps), fused_TH[:count], [], routed)

    def decode(self, arrived: Arrived, read_TX: Tensor, inputs_TH: Tensor) -> Decoded:
        """Run slots of which each belongs to another sequence, with no wait, and no shape but that of the arguments.

        Args:
            arrived: the slots.
            read_TX, inputs_TH: what the slots before them gave; read where a slot is latent.
        """
        slots, model = arrived.slots, self.model
        self.cache.place_decoding(slots)
        x_TH = model.embed(slots.tokens)
        if self._steps:
            every = torch.arange(len(x_TH), device=x_TH.device)
            latent_TH = self._passes.latent_inputs(model.front, LatentReads(read_TX, inputs_TH, every, slots.steps))
            x_TH = torch.where(slots.steps.unsqueeze(1) > 0, latent_TH, x_TH)
        hidden_TH = model.run_slots(x_TH, slots.positions, self.cache.layers)
        routed = self.route(hidden_TH, slots.steps)
        fused_TH = self.fuse(arrived, hidden_TH, routed)
        read_TX = self._passes.read_by_latents(model.back, hidden_TH, None)
        return Decoded(x_TH, hidden_TH, read_TX, routed, fused_TH)

    def padding(self) -> np.ndarray:
        """The numbers of a slot of no sequence, int64 (10, 1)."""
        return np.array([*self.cache.unused_slot, len(self._fused_rH) - 1])[:, None]

    def rows_of(self, numbers: SlotNumbers) -> np.ndarray:
        """The sequence that each slot belongs to."""
        return numbers.rows // self._lanes


class _Step:
    """Decoding forwards of one size."""

    def __init__(self, runner: StaticRunner, size: int) -> None:
        self._runner, self._padding = runner, runner.padding().repeat(size, 1)
        device = runner.read_TX.device
        self._numbers = torch.from_numpy(self._padding).to(device)
        self._read_TX = runner.read_TX.new_zeros(size, runner.read_TX.shape[1])
        self._inputs_TH = runner._inputs_TH.new_zeros(size, runner._inputs_TH.shape[1])
        self._graph = None
        if device.type == "cuda":
            self._capture()

    def fill(self, numbers: SlotNumbers, read_TX: Tensor, inputs_TH: Tensor) -> None:
        """Put a forward of at most this size in place.

        Args:
            numbers: of its slots.
            read_TX, inputs_TH: what the forward before gave.
        """
        filled, count = self._padding.copy(), len(numbers.rows)
        filled[:, :count] = [*numbers, self._runner.rows_of(numbers)]
        self._numbers.copy_(upload([filled], self._numbers.device)[0])
        sources_n = self._numbers[SlotNumbers._fields.index("sources")]
        for static, given in ((self._read_TX, read_TX), (self._inputs_TH, inputs_TH)):
            torch.index_select(given, 0, sources_n, out=static)

    def replay(self) -> Decoded:
        """Run what was put in place."""
        if self._graph is None:
            return self._compute()
        self._graph.replay()
        return self._decoded

    def _compute(self) -> Decoded:
        *slots, rows = self._numbers.unbind()
        arrived = Arrived(SlotNumbers(*slots), None, None, None, rows)
        return self._runner.decode(arrived, self._read_TX, self._inputs_TH)

    def _capture(self) -> None:
        """Record the kernels of one forward of padding alone, after another in which all of them are compiled."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._decoded = self._compute()
