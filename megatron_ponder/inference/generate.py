"""Generation for a batch of prompts by the sequential definition of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_ponder.errors import UserError
from megatron_ponder.inference.decoder import SlotDecoder
from megatron_ponder.inference.sampling import Sampling, choose
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Pruning


@dataclass
class Generation:
    """One sequence, as far as it has come.

    Attributes:
        prompt: token ids given.
        tokens: token ids generated.
        executed_steps: K̂ of every token that was fed to the model: the prompt, then all generated but the last.
        cached_slots: slots that were run, which is one a token plus its executed steps.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    executed_steps: list[int] = field(default_factory=list)
    cached_slots: int = 0


def generate(
    model: PonderLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pruning: Pruning | None = None,
    sampling: Sampling | None = None,
    stop_id: int | None = None,
    on_token: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue prompts, several at a time, each forward running the one slot that each sequence needs.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: of each sequence.
        pruning: τ and α; the model's own unless given.
        sampling: greedy unless given; every sequence draws from its own generator, so that the result does not depend
            on the others of its batch.
        stop_id: a token that ends its sequence and is kept as its last.
        on_token: called after every new token with the index of the sequence.

    Raises:
        UserError: for an empty prompt, or one that leaves no room below the model's longest sequence.
    """
    sampling = sampling or Sampling()
    limit = model.model_config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty; give at least one token")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for, but the model "
                f"is meant for {limit}; shorten the prompt or ask for fewer"
            )
    results = [Generation(list(prompt)) for prompt in prompts]
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    device = model.embedding.weight.device
    decoder = SlotDecoder(model, pruning or model.pruning(hard=True), len(prompts))
    live = list(range(len(prompts))) if max_new_tokens > 0 else []  # sequence of each row of the decoder
    feed = torch.tensor([result.prompt[0] for result in results], device=device)
    while live:
        complete = decoder.run(feed).tolist()
        finished = []
        for row, index in enumerate(live):
            result = results[index]
            result.cached_slots += 1
            if not complete[row]:
                continue
            result.executed_steps.append(int(decoder.executed_B[row]))
            position = len(result.executed_steps)
            if position < len(result.prompt):
                token = result.prompt[position]
            else:
                with torch.inference_mode():
                    logits = model.head(decoder.output_BH[row])
                token = choose(logits, sampling, generators[index])
                result.tokens.append(token)
                if on_token is not None:
                    on_token(index, result)
                if token == stop_id or len(result.tokens) == max_new_tokens:
                    finished.append(row)
            if model.eod_id is not None and int(feed[row]) == model.eod_id:
                decoder.restart(row)
            feed[row] = token
        if finished:
            staying = [row for row in range(len(live)) if row not in finished]
            rows = torch.tensor(staying, device=device, dtype=torch.long)
            live = [live[row] for row in staying]
            feed = feed[rows]
            decoder.select(rows)
    return results
