"""All contact with DeepSpeed: ZeRO, mixed precision and the optimiser step.

DeepSpeed's configuration is generated here from ours. What the rest of the package sees is a module to call, a step
that returns the gradient norm, and whole fp32 tensors by parameter name.
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_ponder.checkpoint.store import FIRST_MOMENT, SECOND_MOMENT, WEIGHT, open_tensors
from megatron_ponder.config import Config
from megatron_ponder.model.router import Pruning
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.objective import Objective

MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)


@dataclass(frozen=True)
class StateTensor:
    """One whole tensor of the training state.

    Attributes:
        kind: the weight, or one of the two moments.
        name: of the parameter.
        tensor: fp32 on the CPU.
    """

    kind: str
    name: str
    tensor: Tensor


class Engine:
    """A model under DeepSpeed.

    Attributes:
        objective: the module that was given; evaluation calls it as it is.
    """

    def __init__(self, objective: Objective, config: Config, mesh: Mesh) -> None:
        """Hand the module to DeepSpeed, which casts it to the training precision and partitions it.

        Args:
            objective: initialised, with fp32 weights.
            config: resolved.
            mesh: the ranks.
        """
        self.objective = objective
        self._mesh = mesh
        self._accumulation = config.training.global_batch_size // (config.training.micro_batch_size * mesh.data.size)
        self._clipping = config.optimizer.gradient_clipping
        self._low_precision = config.training.precision == "bf16"
        self._stage = _effective_stage(config)
        deepspeed = _import_deepspeed(mesh)
        # At each start its bf16 optimiser prints memory figures, whatever the log level.
        with redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=torch.optim.AdamW(
                    _parameter_groups(objective, config.optimizer.weight_decay),
                    lr=0.0,  # set before every step
                    betas=config.optimizer.betas,
                    eps=config.optimizer.epsilon,
                    fused=True,
                ),
                config=deepspeed_config(config, mesh.data.size),
                dist_init_required=False,
            )
        self._create_moments()

    def forward_backward(
        self, tokens: Tensor, refinements: int, pruning: Pruning, penalty: float, scale: float
    ) -> Tensor:
        """Forward and backward of one micro-batch; the last of a step also reduces gradients over the ranks.

        Args:
            tokens: int64 (B, L + 1).
            refinements: R.
            pruning: soft.
            penalty: λ.
            scale: factor on the sum over tokens; 1 / supervised tokens of the whole step, over all ranks.

        Returns:
            Sums of a `Tally` for this micro-batch.
        """
        loss, sums = self._engine(tokens, refinements, pruning, penalty)
        # DeepSpeed averages over data-parallel ranks what has been divided by the global count already
        self._engine.backward(loss * (scale * self._mesh.data.size), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # updates nothing; it counts the micro-batch
        return sums

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, clear the gradients. Returns the global gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_replicated() if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter name, between the last backward and the step; on every rank alike."""
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).clone() for name, parameter, *_ in self._declarations()}

    def state(self) -> Iterator[StateTensor]:
        """Every weight and moment, one after another, whole and in fp32, on every rank alike.

        A collective: every rank must take every item.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter, *_ in self._declarations():
            if self._stage == 0:
                yield StateTensor(WEIGHT, name, parameter.detach().cpu())
                for kind in MOMENTS:
                    yield StateTensor(kind, name, self._engine.basic_optimizer.state[parameter][kind].cpu())
            else:
                yield StateTensor(WEIGHT, name, safe_get_full_fp32_param(parameter).detach().cpu())
                for kind in MOMENTS:
                    yield StateTensor(kind, name, safe_get_full_optimizer_state(parameter, kind).detach().cpu())

    def restore(self, checkpoint: Path, step: int) -> None:
        """Set master weights and moments from a checkpoint whose weights the module was built with; a collective.

        Args:
            checkpoint: its folder.
            step: optimiser steps that it has done, for AdamW's bias correction.
        """
        kinds = (WEIGHT, *MOMENTS) if self._low_precision else MOMENTS
        with open_tensors(checkpoint) as tensors:
            for name, parameter, *_ in self._declarations():
                for kind in kinds:
                    self._set(parameter, kind, tensors.get(kind, name).to(self._mesh.device))
        for state in self._engine.basic_optimizer.state.values():
            state["step"].fill_(step)

    def _declarations(self):
        return declarations(self.objective.model)

    def _clip_replicated(self) -> Tensor:
        """Stage 0 leaves whole gradients on every rank."""
        limit = self._clipping or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.objective.parameters(), limit)

    def _create_moments(self) -> None:
        """Take a step with zero gradients at learning rate 0, which leaves the weights as they are.

        DeepSpeed creates the moments in its first step, and has no public way to ask for them. They are wanted before:
        to restore a checkpoint into, and because between the activations of a first step they would leave the heap in
        pieces.
        """
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._mesh.device)
        pruning = self.objective.model.pruning(hard=False)
        for _ in range(self._accumulation):
            self.forward_backward(tokens, refinements=0, pruning=pruning, penalty=0.0, scale=0.0)
        self.step(learning_rate=0.0)
        optimizer = self._engine.basic_optimizer
        for state in optimizer.state.values():
            state["step"].zero_()
        # Stages 1 and 2 link parameters to moments after the first group's first step, when other groups have none yet.
        for _, parameter, *_ in self._declarations():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
                mapping.set_optim_state_fragment(flat, optimizer.state[flat])

    def _set(self, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self._stage == 0:
            self._engine.basic_optimizer.state[parameter][kind].copy_(whole)
        elif self._stage == 3:
            own = parameter.ds_tensor.numel()
            padded = nn.functional.pad(whole.flatten(), (0, own * self._mesh.data.size - whole.numel()))
            part = padded.narrow(0, own * self._mesh.data.rank, own)
            if kind == WEIGHT:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)


def deepspeed_config(config: Config, data_size: int) -> dict:
    """DeepSpeed's JSON for a run.

    Args:
        config: resolved.
        data_size: data-parallel ranks.
    """
    training = config.training
    stage = _effective_stage(config)
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * data_size),
        "gradient_clipping": config.optimizer.gradient_clipping if stage > 0 else 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            # ours are small and used in every pass; gathering each of them anew would be all latency
            "stage3_param_persistence_threshold": 10_000,
        },
        "zero_allow_untested_optimizer": True,
    }


def _effective_stage(config: Config) -> int:
    """DeepSpeed keeps fp32 master weights for bf16 from stage 1 on only; stage 1 computes what stage 0 would."""
    stage = config.parallel.zero_stage
    return 1 if stage == 0 and config.training.precision == "bf16" else stage


def _parameter_groups(objective: Objective, weight_decay: float) -> list[dict]:
    """Matrices and embeddings are decayed; norms and biases are not."""
    parameters = [parameter for _, parameter, *_ in declarations(objective.model)]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _import_deepspeed(mesh: Mesh):
    """Import DeepSpeed for this device, without its log of every setting and without compiling anything."""
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # A C++ collective for CPU inference that training never calls; building it takes minutes, and a rank killed while
    # it does leaves a lock behind on which all later runs wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
