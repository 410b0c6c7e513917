"""The fixed point of the passes, which is the sequential model, by Gauss-Seidel sweeps over latent steps.

A sweep runs, one forward after another, slot 0 of some tokens, slot 1, and so on up to K̂ of each: a latent slot reads
the hidden state that the same sweep gave the slot before it, and all see the newest keys of the slots before them. What
the router prunes is not run. A token that a sweep has left as it was, and all that it sees too, is final: it is not run
again, and another takes its place. The first of a segment is final after one sweep, which runs it as the sequential
model does; contraction makes it many. Prompts are read alike (`generation/prompt_pieces.py`), out of a cache that
sequences share; here all slots of a batch lie in place, row after row.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.router import Routing, Rule, key_log_weights

if TYPE_CHECKING:  # which has a method for it
    from megatron_ponder.model.ponder import Batch, PonderLM

# Tokens that are run together, by type of device: as few as keep it busy, since each is then the sooner final. Measured
# on a CPU alone.
_WINDOWS = {"cpu": 128}
_WINDOW = 2048


class Settled(NamedTuple):
    """What the sweeps of a batch came to.

    Attributes:
        hidden_BLSH: hidden states of all slots; zeros where a slot was pruned.
        routing: the newest; None without a router.
        slots_PB: int64, slots that each sweep ran of each sequence.
    """

    hidden_BLSH: Tensor
    routing: Routing | None
    slots_PB: Tensor


def settle(model: "PonderLM", batch: "Batch", rule: Rule, tolerance: float, window: int | None = None) -> Settled:
    """Sweep until no slot changes.

    Args:
        model: whole, whose passes are iterated.
        batch: with its embeddings.
        rule: how a routing is applied; there are latent steps.
        tolerance: largest change of a hidden state, relative to the largest, at which it counts as unchanged.
        window: tokens that are run together; what suits the device unless given.
    """
    sweeps = _Sweeps(model, batch, rule, tolerance)
    window = window or _WINDOWS.get(batch.embedded_BLH.device.type, _WINDOW)
    while len(tokens_n := sweeps.moving(window)):
        sweeps.run(tokens_n)
    return sweeps.settled()


class _Sweeps:
    """The slots of B · L = N tokens, row after row, each with the newest of what was computed of it.

    Attributes:
        hidden_NSH: hidden states.
        weights_NS: log weight of every slot as a key; −∞ where there is none.
        living_N: int64, slots of every token that there are, from the first on.
        executed_N: int64, latent steps that it is to run by the newest routing.
        final_N: whether it is run no more.
    """

    def __init__(self, model: "PonderLM", batch: "Batch", rule: Rule, tolerance: float) -> None:
        """Begin without a slot; arguments as of `settle`."""
        self._model, self._rule, self._tolerance = model, rule, tolerance
        self._embedded_NH = embedded_NH = batch.embedded_BLH.flatten(0, 1)
        (tokens, hidden), self.steps = embedded_NH.shape, model.ponder_config.steps
        self._shape = batch.embedded_BLH.shape[:2]
        self._first_N = _first_of_segments(batch)
        angles = batch.geometry.angles(1, model.model_config, embedded_NH.dtype)
        self._angles = [part.expand(self._shape[0], -1, -1, -1).flatten(0, 1) for part in angles]
        self.hidden_NSH = embedded_NH.new_zeros(tokens, self.steps + 1, hidden)
        self.weights_NS = embedded_NH.new_full((tokens, self.steps + 1), -math.inf)
        self.living_N = torch.zeros(tokens, dtype=torch.long, device=embedded_NH.device)
        self.executed_N = torch.full_like(self.living_N, self.steps)
        self.final_N = torch.zeros_like(self.living_N, dtype=torch.bool)
        self._changed_N, self._routing = torch.zeros_like(self.final_N), None
        self._layers = [_Layer(self) for _ in model.transformer.blocks]
        self._largest, self._slots_PB = 0.0, []
        # Of the newest forward: its slots as places among all, the keys that any may see, and what each adds to logits.
        self.places_n, self.keys, self.bias_ns = self.living_N[:0], slice(0), self.weights_NS[:0]

    def moving(self, window: int) -> Tensor:
        """The first tokens that are not final, int64 (n,)."""
        return (~self.final_N).nonzero().squeeze(1)[:window]

    def run(self, tokens_n: Tensor) -> None:
        """One sweep over some tokens, before which there are none but final ones in their segments."""
        slots_N = torch.zeros_like(self.living_N)
        self._changed_N[tokens_n] = False
        for step in range(self.steps + 1):
            running_n = tokens_n[self.executed_N[tokens_n] >= step] if step else tokens_n
            if not len(running_n):
                break
            self._run_step(running_n, step)
            slots_N[running_n] += 1
        self._slots_PB.append(slots_N.view(self._shape).sum(1))
        self.final_N[tokens_n] = _unmoved(self._changed_N[tokens_n], self._first_N[tokens_n])

    def settled(self) -> Settled:
        """What it came to, when all tokens are final."""
        there_NS = self._there(self.living_N)
        hidden_BLSH = self.hidden_NSH.where(there_NS.unsqueeze(2), 0).unflatten(0, self._shape)
        routing = None
        if self._routing is not None:
            routing = Routing(*(part.unflatten(0, self._shape) for part in self._routing))
        return Settled(hidden_BLSH, routing, torch.stack(self._slots_PB).cpu())

    def _run_step(self, tokens_n: Tensor, step: int) -> None:
        """Slot `step` of some tokens."""
        x_nH = self.hidden_NSH[tokens_n, step - 1] if step else self._embedded_NH[tokens_n]
        if step == 0 or self._routing is None:
            self.weights_NS[tokens_n, step] = 0
        else:
            self.weights_NS[tokens_n, step] = self._routing.log_w[tokens_n, step].to(x_nH.dtype)
        self._place(tokens_n, step)
        angles = Rotation(*(part[tokens_n].unsqueeze(0) for part in self._angles))
        h_nH = self._model.transformer(x_nH.unsqueeze(0), Slots(len(tokens_n), angles), caches=self._layers).squeeze(0)
        self._take(tokens_n, step, h_nH)
        if step == 0 and self._model.router is not None:
            self._route(tokens_n, x_nH if self._model.ponder_config.routes_by_token else h_nH)

    def _place(self, tokens_n: Tensor, step: int) -> None:
        """Look where slots are and what they see."""
        slots = self.steps + 1
        self.places_n, first_n = tokens_n * slots + step, self._first_N[tokens_n] * slots
        self.keys = slice(int(first_n[0]), int(self.places_n[-1]) + 1)
        places_s = torch.arange(self.keys.start, self.keys.stop, device=first_n.device)
        seen_ns = (places_s >= first_n.unsqueeze(1)) & (places_s <= self.places_n.unsqueeze(1))
        self.bias_ns = self.weights_NS.flatten()[self.keys].where(seen_ns, -math.inf)

    def _take(self, tokens_n: Tensor, step: int, h_nH: Tensor) -> None:
        """Note hidden states, and which tokens they change."""
        self._largest = max(self._largest, float(h_nH.nan_to_num(0, 0, 0).abs().max()))
        change_n = (h_nH - self.hidden_NSH[tokens_n, step]).abs().amax(1)
        new_n = self.living_N[tokens_n] == step  # what is not a number stays so, however often it is run
        self._changed_N[tokens_n] |= new_n | (change_n > self._tolerance * self._largest)
        self.living_N[tokens_n] += new_n
        self.hidden_NSH[tokens_n, step] = h_nH

    def _route(self, tokens_n: Tensor, read_nH: Tensor) -> None:
        """Route tokens, and let the slots die that are pruned."""
        rule = self._rule
        if rule.executed is not None:
            rule = replace(rule, executed=rule.executed.flatten()[tokens_n])
        routing = self._model.route(read_nH, rule)
        if self._routing is None:
            self._routing = Routing(*(part.new_zeros(len(self.final_N), *part.shape[1:]) for part in routing))
        for every, part in zip(self._routing, routing, strict=True):
            every[tokens_n] = part
        if rule.kind == "hard":
            self.executed_N[tokens_n] = routing.executed
        living_n = self.living_N[tokens_n].clamp(max=self.executed_N[tokens_n] + 1)
        self._changed_N[tokens_n] |= living_n < self.living_N[tokens_n]
        self.living_N[tokens_n] = living_n
        weights_nS = key_log_weights(routing, rule).to(self.weights_NS.dtype)
        self.weights_NS[tokens_n] = weights_nS.where(self._there(living_n), -math.inf)

    def _there(self, living_n: Tensor) -> Tensor:
        """Which slots there are of tokens that have so many, (n, K + 1)."""
        return torch.arange(self.steps + 1, device=living_n.device) < living_n.unsqueeze(1)


@dataclass
class _Layer:
    """Keys and values of one layer, (heads, all slots, channels) each."""

    sweeps: _Sweeps
    keys: Tensor | None = None
    values: Tensor | None = None

    def attend(self, q_1nND: Tensor, k_1nMD: Tensor, v_1nMD: Tensor, scale: float) -> Tensor:
        """As `LayerCache`: to all slots of the segment that there are, up to itself."""
        sweeps, seen = self.sweeps, self.sweeps.keys
        if self.keys is None:
            self.keys, self.values = (
                x.new_zeros(x.shape[2], sweeps.weights_NS.numel(), x.shape[3]) for x in (k_1nMD, v_1nMD)
            )
        self.keys[:, sweeps.places_n] = k_1nMD[0].transpose(0, 1)
        self.values[:, sweeps.places_n] = v_1nMD[0].transpose(0, 1)
        inputs = (q_1nND.transpose(1, 2), self.keys[None, :, seen], self.values[None, :, seen])
        grouped = q_1nND.shape[2] != k_1nMD.shape[2]
        out = F.scaled_dot_product_attention(*inputs, attn_mask=sweeps.bias_ns, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)


def _first_of_segments(batch: "Batch") -> Tensor:
    """Of every token, the first of its segment, int64 (N,)."""
    rows, tokens = batch.embedded_BLH.shape[:2]
    segments = batch.geometry.segments(1)
    if segments is not None:
        return segments.starts.long()
    return (torch.arange(rows, device=batch.embedded_BLH.device) * tokens).repeat_interleave(tokens)


def _unmoved(changed_n: Tensor, first_n: Tensor) -> Tensor:
    """Whether tokens are final: unchanged, as all before them in their segment, or the first there that were not.

    Args:
        changed_n: bool.
        first_n: of each, the first token of its segment; rising.
    """
    begins_n = torch.ones_like(changed_n)
    begins_n[1:] = first_n.diff() != 0
    count_n = changed_n.long().cumsum(0)
    before_n = torch.where(begins_n, count_n - changed_n.long(), 0).cummax(0).values
    return (count_n == before_n) | begins_n
