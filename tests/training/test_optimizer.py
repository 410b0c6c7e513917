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
