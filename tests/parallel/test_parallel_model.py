"""A whole PonderLM over two tensor ranks equals one process in loss and every gradient."""

import pytest
import torch

from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.loss import vocab_parallel_cross_entropy
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from tests.distributed import run_distributed
from tests.models import random_tokens, small_model
from tests.parallel.gathered import Part, assert_equal_to_one_process, gradients

CASES = {
    "llama, adaptive": {"model__num_kv_heads": 2},
    "llama, fixed": {"ponder__mode": "fixed"},
    "llama, vanilla, tied": {"ponder__mode": "vanilla", "model__tie_embeddings": True},
    "gpt_neox, adaptive": {"model__family": "gpt_neox", "ponder__router_hidden_size": 8},
    "gpt_neox, fixed, sequential residual": {
        "model__family": "gpt_neox",
        "ponder__mode": "fixed",
        "model__parallel_residual": False,
    },
}


def evaluate(mesh: Mesh, overrides: dict) -> dict[str, Part]:
    """Training loss with a penalty, and every gradient."""
    alone = small_model(router_scale=3.0, model__vocab_size=62, **overrides)
    model = PonderLM(alone.model_config, alone.ponder_config, mesh).double()
    with torch.no_grad():
        for name, parameter, spec, axis in declarations(model):
            parameter.copy_(spec.shard(alone.get_parameter(name), axis))
    tokens = random_tokens(2, 13, vocab_size=62)
    result = model.jacobi(tokens[:, :-1], 2, model.pruning(hard=False))
    logits = model.head(result.output_BLH)
    loss = vocab_parallel_cross_entropy(logits, tokens[:, 1:], model.head.axis).sum()
    if result.routing is not None:
        loss = loss + 0.1 * result.routing.log_w[..., 1:].exp().sum()
    loss.backward()
    return {"loss": Part(loss.detach()), "logits": Part(logits.detach(), -1), **gradients(model)}


def all_cases(mesh: Mesh) -> dict[str, dict[str, Part]]:
    """Runs on every rank."""
    return {name: evaluate(mesh, overrides) for name, overrides in CASES.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Part]]]:
    return run_distributed(all_cases, 2, tensor=2)


@pytest.mark.parametrize("case", CASES)
def test_two_tensor_ranks_equal_one_process(two_ranks, case):
    assert_equal_to_one_process([results[case] for results in two_ranks], evaluate(Mesh(), CASES[case]), 1e-10)
