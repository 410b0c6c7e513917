"""The optimiser decays what it should, and remembers what is declared of it."""

import pytest
import torch

from megatron_ponder.checkpoint.optimizer_state import KINDS, kinds, moment_bytes, moments
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.optimizer import build_optimizer
from tests.models import small_config, small_model


@pytest.mark.parametrize(("name", "of_a_matrix"), [("adamw", 8), ("muon", 4)])
def test_it_remembers_what_is_declared(name, of_a_matrix):
    """Checkpoints, the engine and estimates read the declaration, and would not hear of anything else."""
    model = small_model().float()
    config = small_config(optimizer__name=name, training__precision="fp32", parallel__zero_stage=0)
    optimizer = build_optimizer(model, config, Mesh())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for _, parameter, spec, _ in declarations(model):
        declared = moments(config.optimizer, spec.matrix)
        state = optimizer.state[parameter].items()
        remembered = {name: tensor for name, tensor in state if tensor.shape == parameter.shape}
        assert remembered.keys() == declared.keys()
        assert {name: tensor.element_size() for name, tensor in remembered.items()} == declared
        assert kinds(config.optimizer, spec.matrix) == ("weight", *declared)
        assert {"weight", *declared} <= set(KINDS)
    assert moment_bytes(config.optimizer, matrix=True) == of_a_matrix
    assert moment_bytes(config.optimizer, matrix=False) == 8


def test_matrices_and_embeddings_are_decayed_and_nothing_else_is():
    model = small_model(model__family="gpt_neox")
    decayed, others = build_optimizer(model, small_config(optimizer__weight_decay=0.3), Mesh()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("name", "factors"), [("adamw", [1.0, 0.1, 1.0, 0.1]), ("muon", [1.0, 1.0, 0.1])])
def test_the_router_has_a_learning_rate_of_its_own_in_groups_that_all_pipeline_ranks_have(name, factors):
    """ZeRO adds up the gradient norm group by group, over ranks with and without the router."""
    config = small_config(optimizer__router_learning_rate_factor=0.1, optimizer__name=name)
    with_router, without = small_model(ponder__router_hidden_size=4), small_model()
    without.router = None
    first, second = (build_optimizer(model, config, Mesh()).param_groups for model in (with_router, without))
    assert [group["rate_factor"] for group in first] == factors
    assert [group["rate_factor"] for group in second] == [1.0] * len(factors)
    routers = {id(parameter) for parameter in with_router.router.parameters()}
    slow = [parameter for group in first if group["rate_factor"] == 0.1 for parameter in group["params"]]
    assert {*map(id, slow)} == routers
    for model, groups in ((with_router, first), (without, second)):
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
        assert all(group["params"] for group in groups)
    assert len(build_optimizer(small_model(ponder__mode="fixed"), config, Mesh()).param_groups) == 2
