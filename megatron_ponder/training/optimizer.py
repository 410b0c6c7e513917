"""The optimiser of a run, built from its configuration.

What it remembers of every parameter, which checkpoints hold and estimates count, is declared in
`checkpoint/optimizer_state.py`.
"""

import torch
from torch import nn

from megatron_ponder.checkpoint.optimizer_state import group_of
from megatron_ponder.config import Config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.muon import MuonWithAdamW


def build_optimizer(model: nn.Module, config: Config, mesh: Mesh) -> torch.optim.Optimizer:
    """The optimiser of the parameters that a model declares.

    The learning rate is set before every step, of a group that has a `rate_factor` to so many times that of others.

    Args:
        model: on this rank.
        config: resolved.
        mesh: the ranks.
    """
    settings, groups = config.optimizer, ([], [])
    for _, parameter, spec, _ in declarations(model):
        groups[group_of(settings, parameter.dim(), spec.matrix)].append((parameter, spec))
    if settings.name == "muon":
        return MuonWithAdamW(*groups, config, mesh)
    decays = (settings.weight_decay, 0.0)
    decayed = [
        {"params": [parameter for parameter, _ in group], "weight_decay": decay}
        for group, decay in zip(groups, decays, strict=True)
    ]
    return torch.optim.AdamW(decayed, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True)
