"""The optimiser of a run, built from its configuration.

What it remembers of every parameter, which checkpoints hold and estimates count, is declared in
`checkpoint/optimizer_state.py`.
"""

import torch
from torch import nn

from megatron_ponder.checkpoint.optimizer_state import is_decayed
from megatron_ponder.config import OptimizerConfig
from megatron_ponder.parallel.sharding import declarations


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that a model declares; its learning rate is set before every step."""
    groups = _parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=True)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """What is decayed, and what is not."""
    parameters = [parameter for _, parameter, *_ in declarations(model)]
    return [
        {"params": [p for p in parameters if is_decayed(p.dim())], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not is_decayed(p.dim())], "weight_decay": 0.0},
    ]
