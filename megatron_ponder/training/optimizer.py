"""The optimiser of a run, built from its configuration.

What it remembers of every parameter, which checkpoints hold and estimates count, is declared in
`checkpoint/optimizer_state.py`.
"""

import torch

from megatron_ponder.checkpoint.optimizer_state import group_of
from megatron_ponder.config import Config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.muon import Declared, MuonWithAdamW


def build_optimizer(model: PonderLM, config: Config, mesh: Mesh) -> torch.optim.Optimizer:
    """The optimiser of the parameters that a model declares.

    The learning rate is set before every step, of a group to `rate_factor` times that of the step.

    Args:
        model: on this rank.
        config: resolved.
        mesh: the ranks.
    """
    settings, groups = config.optimizer, ([], [])
    for _, parameter, spec, _ in declarations(model):
        groups[group_of(settings, parameter.dim(), spec.matrix)].append((parameter, spec))
    routed = {group_of(settings, dimensions, matrix=False) for dimensions in (1, 2)}  # that the router's weights are in
    factor = settings.router_learning_rate_factor if model.passes.routed else 1.0
    parts = [_by_factor(model, group, factor if index in routed else 1.0) for index, group in enumerate(groups)]
    if settings.name == "muon":
        return MuonWithAdamW(groups[0], parts[1], config, mesh)
    decayed = [
        {"params": [parameter for parameter, _ in members], "weight_decay": decay, "rate_factor": own}
        for decay, part in zip((settings.weight_decay, 0.0), parts, strict=True)
        for own, members in part
    ]
    return torch.optim.AdamW(decayed, lr=0.0, betas=settings.betas, eps=settings.epsilon, fused=True)


def _by_factor(model: PonderLM, group: Declared, factor: float) -> list[tuple[float, Declared]]:
    """A group in two where the router has a learning rate of its own, each with the factor on that of the step.

    Ranks of a pipeline need as many groups as each other, because ZeRO adds up the gradient norm group by group: where
    the router is another's, some parameter stands in for it at the learning rate of all.
    """
    if factor == 1:
        return [(1.0, group)]
    here = model.router is not None
    apart = {id(parameter) for parameter in model.router.parameters()} if here else {id(group[0][0])}
    rest, own = ([item for item in group if (id(item[0]) in apart) == inside] for inside in (False, True))
    return [(1.0, rest), (factor if here else 1.0, own)]
