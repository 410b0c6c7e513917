"""Generation for a list of prompts, by one process or by all ranks of a job together."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.request import Generation, Request
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.parallel.mesh import Mesh

OnProgress = Callable[[int, Generation], None]


def generate(
    model: PonderLM,
    prompts: Sequence[str | Sequence[int] | Request],
    max_new_tokens: int = 64,
    rule: Rule | None = None,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnProgress | None = None,
    batching: Batching | None = None,
    *,
    stop_strings: Sequence[str] = (),
    samples: int = 1,
    top_log_probabilities: int = 0,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Continue prompts, many at a time, each forward running the one slot that each sequence needs.

    A continuation does not depend on the others. On several ranks, all of them call this with the same arguments and
    get the same results; copies of the model along the data axis share the prompts.

    Args:
        model: in evaluation mode; this rank's part, as `load_model` gives it.
        prompts: texts, which need the tokenizer; token ids, at least one each; or requests, for which the arguments
            from `max_new_tokens` to `samples` do not hold. An empty text is continued as a document begins.
        max_new_tokens: of each continuation.
        rule: τ, α and the exit; the model's own unless given.
        sampling: greedy unless given; sample i of a prompt draws from its `seed` + i.
        stop_ids: tokens that end a continuation, and are kept as its last.
        on_token: called with the index of the result after each of its tokens and at its end, on the rank that
            schedules it.
        batching: how many at a time, and how prompts are read.
        stop_strings: texts that end a continuation, which ends before them; they need the tokenizer.
        samples: continuations of each prompt.
        top_log_probabilities: likeliest tokens that are reported at each place.
        tokenizer: of the model, for texts.
        mesh: the ranks; a single process unless given.

    Returns:
        `samples` continuations of each prompt, one prompt after another.

    Raises:
        UserError: for an empty prompt, one that leaves no room below the model's longest sequence, or a text without a
            tokenizer.
    """
    mesh, sampling = mesh or Mesh(), sampling or Sampling()
    options = Options(
        max_new_tokens=max_new_tokens,
        samples=samples,
        **vars(sampling),
        stop=tuple(stop_strings),
        stop_tokens=tuple(stop_ids),
        ignore_eod=True,  # unless it is among the stop_ids
        top_log_probabilities=top_log_probabilities,
    )
    requests = []
    for index, prompt in enumerate(prompts):
        try:
            requests += _requests(prompt, options, tokenizer)
        except UserError as error:
            raise UserError(f"prompt {index}: {error}") from None
    results: dict[int, Generation] = {}
    with Generator(model, mesh, rule, batching, tokenizer) as generator:
        if generator.drives:
            for index, request in enumerate(requests):
                try:
                    generator.check(request)
                except UserError as error:
                    raise UserError(f"prompt {index // samples}: {error}") from None
            mine = islice(enumerate(requests), mesh.data.rank, None, mesh.data.size)
            results.update(complete(generator, mine, on_token))
    results = _gathered(results, mesh)
    return [results[index] for index in range(len(requests))]


def complete(
    generator: Generator,
    requests: Iterable[tuple[int, Request]],
    on_token: OnProgress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, Generation]]:
    """Run requests on the rank that schedules, handing them to the generator as it gets to them.

    Args:
        generator: whose block has been entered.
        requests: each with its index.
        on_token: called with the index of a request after each of its tokens and at its end.
        stopped: asked before every forward; when it says so, requests that have not ended are cancelled, and no more
            taken.

    Yields:
        Indices with what they gave, in the order in which they end.

    Raises:
        UserError: a request can never run.
    """
    requests, ended, under_way = iter(requests), deque(), {}

    def note(index: int, generation: Generation) -> None:
        if on_token is not None:
            on_token(index, generation)
        if generation.finish_reason is not None:
            ended.append((index, generation))
            under_way.pop(index, None)

    ahead = 2 * generator.sequences_per_forward * generator.groups
    while True:
        for index, request in islice(requests, max(0, ahead - generator.waiting)):
            sequence = generator.submit(request, partial(note, index))
            if sequence.generation.finish_reason is None:
                under_way[index] = sequence
        if under_way and stopped():
            requests = iter(())
            for sequence in list(under_way.values()):
                generator.cancel(sequence)
        if generator.idle and not ended:
            return
        generator.step()
        while ended:
            yield ended.popleft()


def _requests(prompt: str | Sequence[int] | Request, options: Options, tokenizer: Tokenizer | None) -> list[Request]:
    if isinstance(prompt, Request):
        return [prompt]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("a text needs the model's tokenizer; give it, or token ids")
        prompt = tokenizer.encode(prompt) or [tokenizer.eod_id]
    return options.requests(prompt, None)


def _gathered(results: dict[int, Generation], mesh: Mesh) -> dict[int, Generation]:
    """Results of all copies, on all ranks."""
    if mesh.model.size > 1:
        items = [results]
        dist.broadcast_object_list(items, group=mesh.model.group, group_src=0)
        results = items[0]
    if mesh.data.size > 1:
        parts: list[dict[int, Generation]] = [{}] * mesh.data.size
        dist.all_gather_object(parts, results, group=mesh.data.group)
        results = {index: generation for part in parts for index, generation in part.items()}
    return results
