"""The optimiser of a run, built from its configuration.

What it remembers of every parameter, which checkpoints hold and estimates count, is declared in
`checkpoint/optimizer_state.py`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_ponder.checkpoint.optimizer_state import group_of
from megatron_ponder.config import Config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import ParameterSpec, declarations
from megatron_ponder.training.muon import MUON, MuonWithAdamW

Declared = Sequence[tuple[nn.Parameter, ParameterSpec]]


# In a group of parameters: the factor on the learning rate of a step.
FACTOR = "learning_rate_factor"


def build_optimizer(model: nn.Module, config: Config, mesh: Mesh) -> torch.optim.Optimizer:
    """The optimiser of the parameters that a model declares; its learning rate is set before every step.

    Args:
        model: on this rank.
        config: resolved.
        mesh: the ranks.
    """
    settings, groups = config.optimizer, ([], [])
    for _, parameter, spec, _ in declarations(model):
        groups[group_of(settings, parameter.dim(), spec.matrix)].append((parameter, spec))
    if settings.name == "muon":
        return _muon(*groups, config, mesh)
    decayed = [
        {"params": [parameter for parameter, _ in group], "weight_decay": decay, FACTOR: 1.0}
        for group, decay in zip(groups, (settings.weight_decay, 0.0), strict=True)
    ]
    return torch.optim.AdamW(decayed, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True)


def _muon(matrices: Declared, others: Declared, config: Config, mesh: Mesh) -> MuonWithAdamW:
    """Muon, whose matrices may have a learning rate of their own, with AdamW for the others."""
    usual, own = config.optimizer.learning_rate, config.optimizer.muon_learning_rate
    groups = [
        {
            "params": [parameter for parameter, _ in group],
            "specs": [spec for _, spec in group],
            MUON: muon,
            FACTOR: factor,
        }
        for group, muon, factor in ((matrices, True, (own or usual) / usual), (others, False, 1.0))
    ]
    return MuonWithAdamW(groups, config, mesh)
