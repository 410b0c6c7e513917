"""A whole PonderLM over tensor ranks equals one process in loss and every gradient, also where they split tokens."""

import pytest
import torch

from megatron_ponder.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from tests.distributed import run_distributed
from tests.models import LEARNED, MIXED, random_tokens, small_model
from tests.parallel.gathered import Part, assert_equal_to_one_process, gradients

CASES = {
    "llama, adaptive": {"model__num_kv_heads": 2},
    "llama, fixed": {"ponder__mode": "fixed"},
    "llama, vanilla, tied": {"ponder__mode": "vanilla", "model__tie_embeddings": True},
    "features of no family, adaptive": MIXED,
    "gpt_neox, adaptive": {"model__family": "gpt_neox", "ponder__router_hidden_size": 8},
    "gpt_neox, fixed, sequential residual": {
        "model__family": "gpt_neox",
        "ponder__mode": "fixed",
        "model__residual": "sequential",
    }
    | LEARNED,
}


def evaluate(mesh: Mesh, overrides: dict) -> dict[str, Part]:
    """Training loss with a penalty, and every gradient."""
    alone = small_model(router_scale=3.0, **overrides)
    model = PonderLM(alone.model_config, alone.ponder_config, mesh, vocab_multiple=mesh.tensor.size).double()
    with torch.no_grad():
        for name, parameter, spec, axis in declarations(model):
            parameter.copy_(spec.shard(alone.get_parameter(name), axis))
    with torch.no_grad():
        for table in (model.embedding.weight, model.head.weight):
            axis, vocabulary = model.axis, model.model_config.vocab_size
            table[max(0, vocabulary - axis.rank * len(table)) :] = 100  # whatever padding holds must not matter
    tokens = random_tokens(2, 14)
    result = model.jacobi(tokens[:, :-1], 2, model.rule("soft"))
    logits = model.head(result.output_BLH)
    loss = vocab_parallel_cross_entropy(logits, tokens[:, 1:], model.axis, model.model_config.vocab_size).sum()
    if result.routing is not None:
        loss = loss + 0.1 * result.routing.log_w[..., 1:].exp().sum()
    loss.backward()
    return {"loss": Part(loss.detach()), **gradients(model)}


def all_cases(mesh: Mesh) -> dict[str, dict[str, Part]]:
    """Runs on every rank."""
    return {
        name: evaluate(mesh, overrides)
        for name, overrides in CASES.items()
        if overrides.get("model__num_kv_heads", mesh.tensor.size) >= mesh.tensor.size
    }


@pytest.fixture(scope="module", params=[False, True], ids=["whole sequence", "split sequence"])
def two_ranks(request) -> list[dict[str, dict[str, Part]]]:
    """13 tokens and 61 words, which two ranks cannot share evenly."""
    return run_distributed(all_cases, 2, tensor=2, sequence_parallel=request.param)


@pytest.mark.parametrize("case", CASES)
def test_two_tensor_ranks_equal_one_process(two_ranks, case):
    assert_equal_to_one_process([results[case] for results in two_ranks], evaluate(Mesh(), CASES[case]), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["whole sequence", "split sequence"])
def test_four_tensor_ranks_equal_one_process(split):
    ranks = run_distributed(all_cases, 4, tensor=4, sequence_parallel=split)
    for case in ranks[0]:  # those with as many key heads as ranks
        assert_equal_to_one_process([results[case] for results in ranks], evaluate(Mesh(), CASES[case]), 1e-10)
