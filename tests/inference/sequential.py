"""The definition of the model, as plainly as it can be written: one sequence, one slot after another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ponder.model.attention import DEAD
from megatron_ponder.model.router import fusion_weights


@dataclass
class ListCache:
    """Keys and values of one layer, (1, M, slots, ..), and attention written out."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        repeats = q.shape[2] // k.shape[1]
        keys, values = (x.repeat_interleave(repeats, 1) for x in (self.keys, self.values))
        p = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).softmax(-1)
        return (p @ values).transpose(1, 2)


@dataclass
class Sequential:
    """A sequence that has been decoded.

    Attributes:
        outputs: of every token, what the head reads.
        executed: K̂ of every token.
        caches: of every layer.
    """

    outputs: list[Tensor] = field(default_factory=list)
    executed: list[int] = field(default_factory=list)
    caches: list[ListCache] = field(default_factory=list)
    position: int = 0


@torch.no_grad()
def feed(model, pruning, state: Sequential, token: int) -> Tensor:
    """Run all slots of one token; its logits."""
    if not state.caches:
        state.caches, state.position = [ListCache() for _ in model.part.layers], 0
    position = torch.tensor([state.position])
    hidden = model.run_slots(model.embed(torch.tensor([token])), position, torch.zeros(1).double(), state.caches)
    routing = model.route(hidden, pruning)
    if routing is None:
        steps = model.ponder_config.steps
        for _ in range(steps):
            hidden = model.run_slots(hidden, position, torch.zeros(1).double(), state.caches)
        output = hidden
    else:
        steps, weights = int(routing.executed), fusion_weights(routing, pruning)[0]
        output = weights[0] * hidden
        for step in range(1, steps + 1):
            hidden = model.run_slots(hidden, position, routing.log_w[:, step], state.caches)
            output = output + weights[step] * hidden
        assert (routing.log_w[0, : steps + 1] > DEAD).all()
    state.position += 1
    state.outputs.append(output[0])
    state.executed.append(steps)
    if token == model.eod_id:
        state.caches = []
    return model.head(output)[0]


def decode(model, pruning, tokens) -> tuple[Tensor, Tensor]:
    """Outputs (L, H) and executed steps (L,) of a sequence."""
    state = Sequential()
    for token in tokens.tolist():
        feed(model, pruning, state, token)
    return torch.stack(state.outputs), torch.tensor(state.executed)


def continue_greedily(model, pruning, prompt, new: int) -> tuple[list[int], list[float], list[int]]:
    """Likeliest tokens, their log-probabilities, and K̂ of all tokens fed."""
    state, tokens, values = Sequential(), [], []
    for token in prompt:
        logits = feed(model, pruning, state, token)
    while True:
        log_p = logits.log_softmax(-1)
        tokens.append(int(log_p.argmax()))
        values.append(float(log_p.max()))
        if len(tokens) == new:
            return tokens, values, state.executed
        logits = feed(model, pruning, state, tokens[-1])
