"""The definition of the model, as plainly as it can be written: one sequence, one slot after another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.model.router import fusion_weights

CANDIDATES = 100


@dataclass
class ListCache:
    """Keys and values of one layer, (1, M, slots, ..), log weights of the keys, and attention written out."""

    keys: Tensor | None = None
    values: Tensor | None = None
    log_w: list[Tensor] = field(default_factory=list)

    def forget(self, slots: int) -> None:
        """Keep so many of the first slots."""
        self.keys, self.values = self.keys[:, :, :slots], self.values[:, :, :slots]
        self.log_w = self.log_w[:slots]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        self.keys = k if self.keys is None else torch.cat([self.keys, k], 2)
        self.values = v if self.values is None else torch.cat([self.values, v], 2)
        repeats = q.shape[2] // k.shape[1]
        keys, values = (x.repeat_interleave(repeats, 1) for x in (self.keys, self.values))
        p = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale + torch.cat(self.log_w)).softmax(-1)
        return (p @ values).transpose(1, 2)


@dataclass
class Sequential:
    """A sequence that has been decoded.

    Attributes:
        outputs: of every token, what the head reads.
        executed: K̂ of every token.
        caches: of every layer; where passes have keys of their own, for each pass.
    """

    outputs: list[Tensor] = field(default_factory=list)
    executed: list[int] = field(default_factory=list)
    caches: dict[int, list[ListCache]] = field(default_factory=dict)
    position: int = 0

    def run(self, model, x: Tensor, log_w: Tensor | None = None, of_pass: int = 0) -> Tensor:
        """The hidden state of one slot of the current token."""
        caches = self.caches.setdefault(of_pass, [ListCache() for _ in model.part.layers])
        for cache in caches:
            cache.log_w.append(torch.zeros(1).double() if log_w is None else log_w)
        return model.run_slots(x, torch.tensor([self.position]), caches)


def latent_scale(model) -> Tensor | float:
    """The factor on hidden states that enter again."""
    scale = model.ponder_config.latent_scale
    return model.latent_scale.log.exp() if scale == "learned" else scale


def sure(p: Tensor, exit) -> bool:
    """Whether probabilities of the next token allow to stop."""
    if exit.measure == "entropy":
        return bool(-(p * p.log()).sum() < exit.threshold)
    first, second = p.sort(descending=True).values[:2]
    return bool(first - second >= exit.threshold)


def fixed(model, rule, state: Sequential, embedded: Tensor) -> tuple[Tensor, int]:
    """Every latent slot reads the slot before it, up to one that is sure enough; no step for `vanilla`."""
    hidden, steps = state.run(model, embedded), model.ponder_config.steps
    for step in range(steps):
        if rule.exit is not None and sure(model.head(hidden)[0].softmax(-1), rule.exit):
            return hidden, step
        hidden = state.run(model, latent_scale(model) * hidden)
    return hidden, steps


def adaptive(model, rule, state: Sequential, embedded: Tensor) -> tuple[Tensor, int]:
    """As many latent slots as the router asks for, as keys and in the output with their weights."""
    hidden = state.run(model, embedded)
    routing = model.route(hidden, rule)
    steps, weights = int(routing.executed), fusion_weights(routing, rule)[0]
    output = weights[0] * hidden
    for step in range(1, steps + 1):
        hidden = state.run(model, latent_scale(model) * hidden, routing.log_w[:, step])
        output = output + weights[step] * hidden
    assert (routing.log_w[0, : steps + 1] > DEAD).all()
    return output, steps


def pause(model, rule, state: Sequential, embedded: Tensor) -> tuple[Tensor, int]:
    """K learned embeddings, scaled like tokens, follow the token."""
    hidden = state.run(model, embedded)
    for pause_H in model.pauses.weight:
        hidden = state.run(model, model.ponder_config.embedding_scale * pause_H.unsqueeze(0))
    return hidden, len(model.pauses.weight)


def loop(model, rule, state: Sequential, embedded: Tensor) -> tuple[Tensor, int]:
    """Every pass reads the one before it, and sees what earlier tokens were in the same pass."""
    hidden, steps = state.run(model, embedded, of_pass=0), model.ponder_config.steps
    for index in range(1, steps + 1):
        hidden = state.run(model, latent_scale(model) * hidden, of_pass=index)
    return hidden, steps


def ponderlm(model, rule, state: Sequential, embedded: Tensor) -> tuple[Tensor, int]:
    """Every pass reads e_t plus the embeddings of all predictions before, each the mean over its 100 likeliest."""
    x, steps = embedded, model.ponder_config.steps
    for index in range(steps + 1):
        hidden = state.run(model, x, of_pass=index)
        if index < steps:
            p = model.head(hidden)[0].softmax(-1)
            kept = p >= p.sort(descending=True).values[:CANDIDATES][-1]
            p = torch.where(kept, p, 0) / p[kept].sum()
            x = x + model.ponder_config.embedding_scale * (p @ model.embedding.weight)
    return hidden, steps


DEFINITIONS = {each.__name__: each for each in (fixed, adaptive, pause, loop, ponderlm)}
DEFINITIONS |= {"vanilla": fixed, "sps": pause}


@torch.no_grad()
def feed(model, rule, state: Sequential, token: int) -> Tensor:
    """Run all slots of one token; its logits."""
    define = DEFINITIONS[model.ponder_config.mode]
    output, steps = define(model, rule, state, model.embed(torch.tensor([token])))
    state.position += 1
    if model.ponder_config.mode == "sps" or model.ponder_config.latent_visibility == "own":
        for cache in state.caches[0]:  # later tokens see its first slot alone
            cache.forget(state.position)
    state.outputs.append(output[0])
    state.executed.append(steps)
    if token == model.eod_id:
        state.caches, state.position = {}, 0
    return model.head(output)[0]


def decode(model, rule, tokens) -> tuple[Tensor, Tensor]:
    """Outputs (L, H) and executed steps (L,) of a sequence."""
    state = Sequential()
    for token in tokens.tolist():
        feed(model, rule, state, token)
    return torch.stack(state.outputs), torch.tensor(state.executed)


@torch.inference_mode()  # in which kernels keep nothing for a backward pass
def continue_greedily(model, rule, prompt, new: int) -> tuple[list[int], list[float], list[int]]:
    """Likeliest tokens, their log-probabilities, and K̂ of all tokens fed."""
    state, tokens, values = Sequential(), [], []
    for token in prompt:
        logits = feed(model, rule, state, token)
    while True:
        log_p = logits.log_softmax(-1)
        tokens.append(int(log_p.argmax()))
        values.append(float(log_p.max()))
        if len(tokens) == new:
            return tokens, values, state.executed
        logits = feed(model, rule, state, tokens[-1])
