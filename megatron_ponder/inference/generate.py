"""Generation for a list of prompts by one process."""

from collections.abc import Callable, Sequence

from megatron_ponder.errors import UserError
from megatron_ponder.inference.engine import Engine
from megatron_ponder.inference.request import Generation, Request
from megatron_ponder.inference.sampling import Sampling
from megatron_ponder.inference.scheduler import Batching
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Pruning


def generate(
    model: PonderLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    pruning: Pruning | None = None,
    sampling: Sampling | None = None,
    stop_id: int | None = None,
    on_token: Callable[[int, Generation], None] | None = None,
    batching: Batching | None = None,
) -> list[Generation]:
    """Continue prompts, many at a time, each forward running the one slot that each sequence needs.

    Args:
        model: in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: of each sequence.
        pruning: τ and α; the model's own unless given.
        sampling: greedy unless given; every sequence draws its own random numbers, so that its tokens do not depend on
            the others.
        stop_id: a token that ends its sequence and is kept as its last.
        on_token: called with the index of the sequence after each of its tokens and at its end.
        batching: how many at a time, and how prompts are read.

    Raises:
        UserError: for an empty prompt, or one that leaves no room below the model's longest sequence.
    """
    stop_ids = frozenset() if stop_id is None else frozenset([stop_id])
    with Engine(model, pruning=pruning, batching=batching) as engine:
        sequences = []
        for index, prompt in enumerate(prompts):
            notify = None if on_token is None else lambda generation, index=index: on_token(index, generation)
            try:
                request = Request(tuple(prompt), max_new_tokens, sampling or Sampling(), stop_ids)
                sequences.append(engine.submit(request, notify))
            except UserError as error:
                raise UserError(f"prompt {index}: {error}") from None
        engine.run()
    return [sequence.generation for sequence in sequences]
