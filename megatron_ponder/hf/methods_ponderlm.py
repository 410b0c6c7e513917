"""What the latent steps of a token read, in each mode of PonderLM.

    vanilla, fixed, adaptive   a latent slot for each step, which reads the hidden state of the slot before it
    pause, sps                 a slot for each step, which reads a learned embedding
    loop                       the token's slot runs K + 1 times, and reads what it became
    ponderlm                   the same, and reads the token and the mean embeddings of its predictions

Shape suffixes as in modeling_ponderlm.py. This file and the others named *_ponderlm.py are copied into every exported
model, so they need only torch and transformers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# A prediction is read through its likeliest tokens alone.
CANDIDATES = 100


class Latents:
    """Slots between the tokens, whose hidden states are the inputs of the slots after them."""

    def plan(self, steps: int, refinements: int) -> list[int]:
        """Slots of every token in each pass of `forward` without a cache."""
        return [*range(1, steps + 1), *[steps + 1] * (refinements + 1)] if steps else [1]

    def lanes(self, steps: int) -> int:
        """How many lines of keys a sequence has: one, or one for each step."""
        return 1

    def first(self, model: PreTrainedModel, tokens_BLH: Tensor) -> Tensor:
        """Inputs (B, L, S, H) of the first pass."""
        return tokens_BLH.unsqueeze(2)

    def following(self, model: PreTrainedModel, before: Tensor, hidden: Tensor, slots: int) -> Tensor:
        """Inputs of the next pass, which has so many slots.

        Args:
            model: with embeddings and head.
            before: inputs (B, L, S, H) of this pass.
            hidden: hidden states (B, L, S, H) after it.
            slots: of the next pass.
        """
        return torch.cat([before[:, :, :1], model.latent_scale(hidden[:, :, : slots - 1])], 2)

    def next_step(self, model: PreTrainedModel, step: int, x: Tensor, hidden: Tensor) -> Tensor:
        """The input of a step, from input and hidden state (..., H) of the step before."""
        return model.latent_scale(hidden)


class Pauses(Latents):
    """Slots between the tokens, whose inputs are learned."""

    def plan(self, steps: int, refinements: int) -> list[int]:
        return [steps + 1]

    def first(self, model: PreTrainedModel, tokens_BLH: Tensor) -> Tensor:
        pauses_KH = model.pauses.weight * model.config.embedding_scale
        return torch.cat([tokens_BLH.unsqueeze(2), pauses_KH.expand(*tokens_BLH.shape[:2], -1, -1)], 2)

    def next_step(self, model: PreTrainedModel, step: int, x: Tensor, hidden: Tensor) -> Tensor:
        return (model.pauses.weight[step - 1] * model.config.embedding_scale).expand_as(x)


class Loop(Latents):
    """The same slots again, which see what earlier tokens were in the same step."""

    def plan(self, steps: int, refinements: int) -> list[int]:
        return [1] * (steps + 1)

    def lanes(self, steps: int) -> int:
        return steps + 1

    def following(self, model: PreTrainedModel, before: Tensor, hidden: Tensor, slots: int) -> Tensor:
        return self.next_step(model, 0, before, hidden)


class Predictions(Loop):
    """Each step adds to its input the mean embedding of what the step before predicts."""

    def next_step(self, model: PreTrainedModel, step: int, x: Tensor, hidden: Tensor) -> Tensor:
        table, config = model.model.embed_tokens.weight, model.config
        top = model.lm_head(hidden).topk(min(CANDIDATES, config.vocab_size), -1)
        p = top.values.softmax(-1, dtype=torch.promote_types(top.values.dtype, torch.float32)).to(table)
        ids = top.indices.to(table.device).flatten(0, -2)
        mixed = F.embedding_bag(ids, table, per_sample_weights=p.flatten(0, -2), mode="sum")
        return x + mixed.view(x.shape).to(x) * config.embedding_scale


METHODS = {
    "vanilla": Latents(),
    "fixed": Latents(),
    "adaptive": Latents(),
    "pause": Pauses(),
    "sps": Pauses(),
    "loop": Loop(),
    "ponderlm": Predictions(),
}
