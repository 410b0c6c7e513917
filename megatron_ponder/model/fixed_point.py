"""The fixed point of the passes, which is the sequential model, by Gauss-Seidel sweeps over latent steps.

A sweep runs, one forward after another, slot 0 of some tokens, slot 1, and so on up to K̂ of each: a latent slot reads
the hidden state that the same sweep gave the slot before it, and all see the newest keys of the slots before them. What
the router prunes, or an exit spares, is not run. A token that a sweep has left as it was, and all that it sees too, is
final: it is not run again, and another takes its place. The first of a segment is final after one sweep, which runs it
as the sequential model does; contraction makes it many. Prompts are read alike (`generation/prompt_pieces.py`), out of
a cache that sequences share; here all slots of a batch lie in place, row after row.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.ends import Back, LatentScale
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.router import Router, Routing, Rule, given_steps, key_log_weights
from megatron_ponder.model.transformer import Transformer

# Tokens that are run together on a GPU, which nobody has measured.
_WINDOW = 2048


class Swept(Protocol):
    """What is asked of a model, which `PonderLM` has.

    Attributes:
        model_config, ponder_config: what it was built from.
        transformer: all of its blocks.
        latent_scale: makes latents of hidden states.
        router: None where every token takes all steps, or those before an exit.
        back: what predicts, for exits.
    """

    model_config: ModelConfig
    ponder_config: PonderConfig
    transformer: Transformer
    latent_scale: LatentScale
    router: Router | None
    back: Back

    def route(self, h_token: Tensor, rule: Rule) -> Routing | None:
        """The routing from what the router reads, (..., H)."""


class Settled(NamedTuple):
    """What the sweeps of a batch came to.

    Attributes:
        hidden_BLSH: hidden states of all slots; zeros where a slot was pruned.
        routing: the newest; None without a router or an exit.
        slots_PB: int64, slots that each sweep ran of each sequence.
    """

    hidden_BLSH: Tensor
    routing: Routing | None
    slots_PB: Tensor


def settle(
    model: Swept, geometry: Geometry, embedded_BLH: Tensor, rule: Rule, tolerance: float, window: int | None = None
) -> Settled:
    """Sweep until no slot changes.

    Args:
        model: whole, whose passes are iterated.
        geometry: positions and segments.
        embedded_BLH: e of every token.
        rule: how a routing is applied; there are latent steps.
        tolerance: largest change of a hidden state, relative to the largest, at which it counts as unchanged.
        window: tokens that are run together; what suits the device unless given.
    """
    sweeps = _Sweeps(model, geometry, embedded_BLH, rule, tolerance)
    window = window or _window(embedded_BLH)
    while len(tokens_n := sweeps.moving(window)):
        sweeps.run(tokens_n)
    return sweeps.settled()


def _window(embedded_BLH: Tensor) -> int:
    """Tokens to run together: few are the sooner final, and many keep a device busy.

    On a CPU what a forward costs beside its products weighs the less the larger these are.
    """
    return _WINDOW if embedded_BLH.is_cuda else max(64, 2**23 // embedded_BLH.shape[2] ** 2)


class _Row(NamedTuple):
    """The slots of a forward that are of one row.

    Attributes:
        own: which they are in the forward.
        keys: places of the slots that any of them may see.
        bias_ms: what is added to their logits; −∞ for what one does not see.
    """

    own: slice
    keys: slice
    bias_ms: Tensor


class _Sweeps:
    """The slots of B · L = N tokens, row after row, each with the newest of what was computed of it.

    Attributes:
        hidden_NSH: hidden states.
        weights_NS: log weight of every slot as a key; −∞ where there is none.
        living_N: int64, slots of every token that there are, from the first on.
        executed_N: int64, latent steps that it is to run by the newest routing, or by the newest prediction.
        final_N: whether it is run no more.
    """

    def __init__(self, model: Swept, geometry: Geometry, embedded_BLH: Tensor, rule: Rule, tolerance: float) -> None:
        """Begin without a slot; arguments as of `settle`."""
        self._model, self._rule, self._tolerance = model, rule, tolerance
        self._shape, self._embedded_NH = embedded_BLH.shape[:2], embedded_BLH.flatten(0, 1)
        embedded_NH = self._embedded_NH
        (tokens, hidden), self.steps = embedded_NH.shape, model.ponder_config.steps
        self._first_N = _first_of_segments(geometry, embedded_BLH)
        angles = geometry.angles(1, model.model_config, embedded_NH.dtype)
        self._angles = [part.expand(self._shape[0], -1, -1, -1).flatten(0, 1) for part in angles]
        self.hidden_NSH = embedded_NH.new_zeros(tokens, self.steps + 1, hidden)
        self.weights_NS = embedded_NH.new_full((tokens, self.steps + 1), -math.inf)
        self.living_N = torch.zeros(tokens, dtype=torch.long, device=embedded_NH.device)
        self.executed_N = torch.full_like(self.living_N, self.steps)
        self.final_N = torch.zeros_like(self.living_N, dtype=torch.bool)
        self._changed_N, self._routing = torch.zeros_like(self.final_N), None
        self._layers = [_LayerKeys(self) for _ in model.transformer.blocks]
        self._largest, self._slots_PB = 0.0, []
        # Of the newest forward: its slots as places among all, and what those of each row see.
        self.places_n, self.rows = self.living_N[:0], []

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
        elif self._rule.exit is not None:
            routing = given_steps(self.executed_N.unflatten(0, self._shape), self.steps, hidden_BLSH.dtype)
        return Settled(hidden_BLSH, routing, torch.stack(self._slots_PB).cpu())

    def _run_step(self, tokens_n: Tensor, step: int) -> None:
        """Slot `step` of some tokens."""
        x_nH = self._embedded_NH[tokens_n]
        if step:
            x_nH = self._model.latent_scale(self.hidden_NSH[tokens_n, step - 1])
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
        if self._rule.exit is not None:
            confident_n = self._rule.exit.confident(self._model.back.logits(h_nH))
            self.executed_N[tokens_n] = torch.where(confident_n, step, self.steps)
            self.weights_NS[tokens_n] = self.weights_NS[tokens_n].where(self._prune(tokens_n), -math.inf)

    def _place(self, tokens_n: Tensor, step: int) -> None:
        """Look where slots are and what they see."""
        slots, weights_P = self.steps + 1, self.weights_NS.flatten()
        self.places_n, first_n = tokens_n * slots + step, self._first_N[tokens_n] * slots
        counts = (tokens_n // self._shape[1]).unique_consecutive(return_counts=True)[1].tolist()
        self.rows, begin = [], 0
        for count in counts:
            own = slice(begin, begin + count)
            firsts_m, places_m, begin = first_n[own], self.places_n[own], begin + count
            keys = slice(int(firsts_m[0]), int(places_m[-1]) + 1)
            places_s = torch.arange(keys.start, keys.stop, device=first_n.device)
            seen_ms = (places_s >= firsts_m.unsqueeze(1)) & (places_s <= places_m.unsqueeze(1))
            self.rows.append(_Row(own, keys, weights_P[keys].where(seen_ms, -math.inf)))

    def _take(self, tokens_n: Tensor, step: int, h_nH: Tensor) -> None:
        """Note hidden states, and which tokens they change."""
        largest = float(vector_norm(h_nH, math.inf))
        if math.isfinite(largest):
            self._largest = max(self._largest, largest)
        change_n = vector_norm(h_nH - self.hidden_NSH[tokens_n, step], math.inf, 1)
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
        weights_nS = key_log_weights(routing, rule).to(self.weights_NS.dtype)
        self.weights_NS[tokens_n] = weights_nS.where(self._prune(tokens_n), -math.inf)

    def _prune(self, tokens_n: Tensor) -> Tensor:
        """Let the slots die that some tokens are not to run; which of theirs there are, (n, K + 1)."""
        living_n = self.living_N[tokens_n].clamp(max=self.executed_N[tokens_n] + 1)
        self._changed_N[tokens_n] |= living_n < self.living_N[tokens_n]
        self.living_N[tokens_n] = living_n
        return self._there(living_n)

    def _there(self, living_n: Tensor) -> Tensor:
        """Which slots there are of tokens that have so many, (n, K + 1)."""
        return torch.arange(self.steps + 1, device=living_n.device) < living_n.unsqueeze(1)


@dataclass
class _LayerKeys:
    """Keys and values of one layer, (heads, all slots, channels) each."""

    sweeps: _Sweeps
    keys: Tensor | None = None
    values: Tensor | None = None

    def attend(self, q_1nND: Tensor, k_1nMD: Tensor, v_1nMD: Tensor, scale: float) -> Tensor:
        """Attend as a `LayerCache`, to all slots of the segment that there are, up to itself."""
        sweeps, grouped = self.sweeps, q_1nND.shape[2] != k_1nMD.shape[2]
        if self.keys is None:
            self.keys, self.values = (
                x.new_zeros(x.shape[2], sweeps.weights_NS.numel(), x.shape[3]) for x in (k_1nMD, v_1nMD)
            )
        self.keys[:, sweeps.places_n] = k_1nMD[0].transpose(0, 1)
        self.values[:, sweeps.places_n] = v_1nMD[0].transpose(0, 1)
        out = []
        for own, keys, bias_ms in sweeps.rows:
            inputs = (q_1nND[:, own].transpose(1, 2), self.keys[None, :, keys], self.values[None, :, keys])
            out.append(F.scaled_dot_product_attention(*inputs, attn_mask=bias_ms, scale=scale, enable_gqa=grouped))
        return torch.cat(out, 2).transpose(1, 2)


def _first_of_segments(geometry: Geometry, embedded_BLH: Tensor) -> Tensor:
    """Of every token, the first of its segment, int64 (N,)."""
    (rows, tokens, _), segments = embedded_BLH.shape, geometry.segments(1)
    if segments is not None:
        return segments.starts.long()
    return (torch.arange(rows, device=embedded_BLH.device) * tokens).repeat_interleave(tokens)


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
