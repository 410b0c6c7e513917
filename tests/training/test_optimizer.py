"""The optimiser decays what it should, and remembers what is declared of it."""

import torch

from megatron_ponder.checkpoint.optimizer_state import KINDS, kinds, moment_bytes, moments
from megatron_ponder.config import OptimizerConfig
from megatron_ponder.training.optimizer import build_optimizer
from tests.models import small_model


def test_it_remembers_what_is_declared():
    """Checkpoints, the engine and estimates read the declaration, and would not hear of anything else."""
    model, config = small_model().float(), OptimizerConfig()
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, state in optimizer.state.items():
        remembered = {name: tensor for name, tensor in state.items() if tensor.shape == parameter.shape}
        assert remembered.keys() == moments(config).keys()
        assert {name: tensor.element_size() for name, tensor in remembered.items()} == moments(config)
    assert kinds(config) == ("weight", *moments(config))
    assert set(kinds(config)) <= set(KINDS)
    assert moment_bytes(config) == 8


def test_matrices_and_embeddings_are_decayed_and_nothing_else_is():
    model = small_model(model__family="gpt_neox")
    decayed, others = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
