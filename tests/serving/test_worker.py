"""Jobs that are handed over from another thread, on several ranks."""

import threading
import time

import pytest

from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.serving.prometheus import Metrics
from megatron_ponder.serving.worker import Progress, QueueFullError, RequestGroup, UnavailableError, Worker
from tests.distributed import run_distributed
from tests.models import random_tokens, small_model

PROMPTS = [random_tokens(1, 3 + 5 * index, seed=index)[0].tolist() for index in range(6)]
LAYERS = {1: [range(3)], 2: [range(2), range(2, 3)]}


def served_on(mesh: Mesh) -> tuple[list[list[int]], list[list[int]], int] | None:
    """Serve short jobs, which finish, and long ones, which are cancelled once they have begun.

    Returns:
        Tokens of the short jobs, of the long ones, and slots left in the cache; None on ranks that follow.
    """
    whole = small_model(model__num_layers=3, model__max_position_embeddings=4096, inference__threshold=0.3).eval()
    axis = mesh.pipeline
    part = ModelPart(LAYERS[axis.size][axis.rank], axis.rank == 0, axis.rank == axis.size - 1)
    model = (
        PonderLM(whole.model_config, whole.ponder_config, mesh, part=part, inference=whole.inference).double().eval()
    )
    load_weights(model, whole.state_dict())
    generator = Generator(model, mesh, batching=Batching(max_sequences=2))
    with generator:
        if not generator.drives:
            return None
        worker = Worker(2 * len(PROMPTS), Metrics().observe)
        received: dict[int, list[Progress]] = {index: [] for index in range(2 * len(PROMPTS))}
        ended = threading.Semaphore(0)

        def job(index: int) -> RequestGroup:
            long = index % 2 == 1

            def post(events: list[Progress]) -> None:
                if long and not received[index]:
                    worker.cancel(jobs[index])
                received[index] += events
                if events[-1].finish_reason is not None:
                    ended.release()

            return RequestGroup([Request(tuple(PROMPTS[index // 2]), 4000 if long else 10)], True, post)

        jobs = [job(index) for index in received]

        def client() -> None:
            while worker.state != "ready":
                time.sleep(0.01)
            for job in jobs:
                worker.submit(job)
            for _ in jobs:
                ended.acquire(timeout=60)
            worker.stop(0)

        thread = threading.Thread(target=client)
        thread.start()
        worker.serve(generator)
        thread.join()
    tokens = [[token for progress in received[index] for token in progress.tokens] for index in received]
    assert {received[index][-1].finish_reason for index in range(1, len(jobs), 2)} == {"cancelled"}
    assert (worker.state, generator.live, generator.waiting) == ("stopped", [], 0)
    return tokens[::2], tokens[1::2], sum(runner.cache.reserved for runner in generator._runners)


def check(result: tuple[list[list[int]], list[list[int]], int]) -> None:
    finished, cancelled, reserved = result
    model = small_model(model__num_layers=3, model__max_position_embeddings=4096, inference__threshold=0.3).eval()
    want = [generation.tokens for generation in generate(model, PROMPTS, 10)]
    assert finished == want
    for tokens, right in zip(cancelled, want, strict=True):
        assert 0 < len(tokens) < 4000
        assert tokens[:10] == right[: len(tokens)]
    assert reserved == 0


def test_one_process():
    check(served_on(Mesh()))


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_ranks(tensor, pipeline):
    first, *others = run_distributed(served_on, 2, tensor=tensor, pipeline=pipeline)
    assert others == [None]
    check(first)


def test_jobs_that_are_not_taken():
    worker = Worker(2, Metrics().observe)
    job = RequestGroup([Request((1,), 2)], False, lambda events: None)
    with pytest.raises(UnavailableError, match="the server is loading"):
        worker.submit(job)
    worker.state = "ready"
    worker.submit(job)
    worker.submit(job)
    with pytest.raises(QueueFullError, match="2 sequences run or wait already; try again later"):
        worker.submit(job)
