"""All contact with DeepSpeed: ZeRO, mixed precision and the optimiser step.

What the rest of the package sees is a module to call, a step
that returns the gradient norm, and whole fp32 tensors by parameter name.
"""

import gc
import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ponder.checkpoint.optimizer_state import KINDS, MOMENTS, WEIGHT
from megatron_ponder.checkpoint.store import open_tensors
from megatron_ponder.config import Config, micro_batches
from megatron_ponder.config.deepspeed import deepspeed_config, zero_stage
from megatron_ponder.model.router import Rule, RuleKind
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import ParameterSpec, declarations
from megatron_ponder.training.interruption import Interruption
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.pipelined import PipelinedObjective


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


class _ModelParallelUnit:
    """What DeepSpeed asks about the ranks that hold one copy of the model."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_group(self):
        return self._mesh.model.group

    def get_model_parallel_rank(self) -> int:
        return self._mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.model.size

    def get_data_parallel_group(self):
        return self._mesh.data.group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data.size


class Engine:
    """A model, or this rank's part of it, under DeepSpeed.

    DeepSpeed remembers one grid of ranks in a process: of several engines the last one's.
    """

    def __init__(self, objective: Objective, config: Config, mesh: Mesh) -> None:
        """Hand the module to DeepSpeed, which casts it to the training precision and partitions it.

        Args:
            objective: initialised, with fp32 weights.
            config: resolved.
            mesh: the ranks.
        """
        self._objective, self._mesh = objective, mesh
        self._accumulation = micro_batches(config, mesh.data.size)
        self._clipping = config.optimizer.gradient_clipping
        self._low_precision = config.training.precision == "bf16"
        self._stage = zero_stage(config)
        self._pipelined = None
        for _, parameter, spec, _ in self._declarations():
            # These count in the gradient norm on every model-parallel rank, others on the first alone.
            parameter.model_parallel = spec.shard_dim is not None or mesh.tensor.rank == 0
        deepspeed = _import_deepspeed(mesh)
        # An earlier engine of this process imports when it is collected; within the imports below, that would break
        # the import lock of Python before 3.12 with a KeyError.
        gc.collect()
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
                config=deepspeed_config(config, mesh.data.size, mesh.device.type),
                mpu=_ModelParallelUnit(mesh),
                dist_init_required=False,
            )
        if mesh.pipeline.size > 1:
            self._engine.pipeline_parallelism = True
            dtype = torch.bfloat16 if self._low_precision else torch.float32
            self._pipelined = PipelinedObjective(objective, mesh, dtype, config.parallel.pipeline_schedule)
        self._create_moments()

    def allow(self, interruption: Interruption) -> None:
        """Let steps be given up at points between passes, forward and backward."""
        if self._pipelined is not None:
            self._pipelined.interruption = interruption
            return

        def point(*_) -> None:
            interruption.point()

        def before_backward(_module, _inputs, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(point)

        transformer = self._objective.model.transformer
        transformer.register_forward_pre_hook(point)
        transformer.register_forward_hook(before_backward)

    def rule(self, kind: RuleKind) -> Rule:
        """The model's rule with α = 0, as training and validation use it."""
        return self._objective.model.rule(kind, bias=0.0)

    def forward_backward(
        self, micro_batches: Sequence[Tensor], refinements: int, rule: Rule, penalty: float, scale: float
    ) -> Tensor:
        """Forward and backward of this rank's micro-batches of a step; gradients are reduced over the data ranks.

        Args:
            micro_batches: int64 (B, L + 1) each.
            refinements: R.
            rule: how a routing is applied.
            penalty: λ.
            scale: factor on the sum over tokens; 1 / supervised tokens of the whole step, over all ranks.

        Returns:
            Sums of a `Tally` for these micro-batches, (width,).
        """
        # DeepSpeed averages over data-parallel ranks what has been divided by the global count already
        scale = scale * self._mesh.data.size
        if self._pipelined is not None:
            sums = self._pipelined.forward_backward(micro_batches, refinements, rule, penalty, scale)
            self._engine.allreduce_gradients()
            return sums
        total = 0
        for tokens in micro_batches:
            loss, sums = self._engine(tokens, refinements, rule, penalty)
            self._engine.backward(loss * scale, scale_wrt_gas=False)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # updates nothing; it counts the micro-batch
            total = total + sums.sum(0)
        return total

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[Tensor], rounds: int, refinements: int, rule: Rule, each_step: bool
    ) -> Tensor:
        """Sums of a `Tally` over micro-batches, without gradients.

        Args:
            micro_batches: int64 (at most B, L + 1) each.
            rounds: the most micro-batches that any data-parallel rank has.
            refinements: R.
            rule: how a routing is applied.
            each_step: measure also what every step predicts by itself.
        """
        if self._pipelined is not None:
            return self._pipelined.evaluate(micro_batches, refinements, rule, each_step)
        width = Tally.width(self._objective.model.ponder_config.steps)
        total = torch.zeros(width, dtype=torch.float64, device=self._mesh.device)
        for tokens in micro_batches:
            total += self._objective(tokens, refinements, rule, each_step=each_step)[1].sum(0)
        # Under ZeRO-3 every rank must run every forward, so that ranks with fewer micro-batches repeat one uncounted.
        for _ in range(rounds - len(micro_batches)):
            idle = torch.zeros(1, 2, dtype=torch.long, device=self._mesh.device)
            self._objective(idle, refinements, rule, each_step=each_step)
        return total

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, clear the gradients.

        Returns:
            The global gradient norm before clipping, the same on all ranks. If it is not finite, the step has been
            skipped on all of them: weights, moments and their count of steps are as before.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._clip_replicated() if self._stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients of this rank's part by parameter name, between `forward_backward` and `step`."""
        from deepspeed.utils import safe_get_full_grad

        return {
            name: self._whole(safe_get_full_grad(parameter), spec).clone()
            for name, parameter, spec, _ in self._declarations()
        }

    def differing_replicas(self) -> list[str]:
        """Parameters that tensor ranks should hold bit for bit alike, and do not; a collective of the tensor ranks."""
        replicated = [(name, parameter) for name, parameter, spec, _ in self._declarations() if spec.shard_dim is None]
        checksums = torch.stack([_checksum(self._held(parameter)) for _, parameter in replicated])
        everyones = [torch.empty_like(checksums) for _ in range(self._mesh.tensor.size)]
        dist.all_gather(everyones, checksums, group=self._mesh.tensor.group)
        differs = (torch.stack(everyones) != checksums).any(0).tolist()
        return [name for (name, _), different in zip(replicated, differs, strict=True) if different]

    def state(self) -> Iterator[StateTensor]:
        """Weights and moments of this rank's part, one after another, whole, unpadded and in fp32.

        The same on all ranks of a pipeline stage, and a collective of them: every rank must take every item.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter, spec, _ in self._declarations():
            if self._stage == 0:
                moments = self._engine.basic_optimizer.state[parameter]
                parts = [parameter.detach(), *(moments[kind] for kind in MOMENTS)]
            else:
                parts = [safe_get_full_fp32_param(parameter).detach()]
                parts += [safe_get_full_optimizer_state(parameter, kind).detach() for kind in MOMENTS]
            for kind, part in zip(KINDS, parts, strict=True):
                yield StateTensor(kind, name, self._whole(part, spec).cpu())

    def restore(self, checkpoint: Path, step: int) -> None:
        """Set master weights and moments from a checkpoint whose weights the module was built with; a collective.

        Args:
            checkpoint: its folder, verified.
            step: optimiser steps that it has done, without skipped ones, for AdamW's bias correction.
        """
        kinds = KINDS if self._low_precision else MOMENTS
        with open_tensors(checkpoint, verified=True) as tensors:
            for name, parameter, spec, axis in self._declarations():
                for kind in kinds:
                    self._set(parameter, kind, spec.shard(tensors.get(kind, name), axis).to(self._mesh.device))
        for state in self._engine.basic_optimizer.state.values():
            state["step"].fill_(step)

    def _declarations(self):
        return declarations(self._objective.model)

    def _whole(self, part: Tensor, spec: ParameterSpec) -> Tensor:
        """A logical tensor from the parts of all tensor ranks."""
        axis = self._mesh.tensor
        if spec.shard_dim is None or axis.size == 1:
            return spec.unshard([part])
        parts = [torch.empty_like(part) for _ in range(axis.size)]
        dist.all_gather(parts, part.contiguous(), group=axis.group)
        return spec.unshard(parts)

    def _held(self, parameter: nn.Parameter) -> Tensor:
        """What this rank keeps of a parameter between steps; data-parallel ranks share it at stage 3, padded."""
        if self._stage < 3:
            return parameter.detach()
        part = parameter.ds_tensor
        return part[: max(0, parameter.ds_numel - part.numel() * self._mesh.data.rank)]

    def _clip_replicated(self) -> Tensor:
        """Stage 0 leaves gradients whole on every data-parallel rank, and their norm to us."""
        parameters = [parameter for _, parameter, *_ in self._declarations()]
        counted = [p.grad for p in parameters if self._mesh.model.rank == 0 or p.model_parallel]
        square = torch.nn.utils.get_total_norm(counted).square()
        if self._mesh.model.size > 1:
            dist.all_reduce(square, group=self._mesh.model.group)
        norm = square.sqrt()
        if not norm.isfinite():
            for parameter in parameters:
                parameter.grad = None  # which the optimiser passes over; later stages skip such a step by themselves
            return norm
        torch.nn.utils.clip_grads_with_norm_(parameters, self._clipping or float("inf"), norm)
        return norm

    def _create_moments(self) -> None:
        """Take a step with zero gradients at learning rate 0, which leaves the weights as they are.

        DeepSpeed creates the moments in its first step, and has no public way to ask for them. They are wanted before:
        to restore a checkpoint into, and because between the activations of a first step they would leave the heap in
        pieces.
        """
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._mesh.device)
        micro_batches = [tokens] * self._accumulation
        # Zero even where a weight is no number, because a step that is skipped creates nothing.
        hooks = [parameter.register_hook(torch.zeros_like) for _, parameter, *_ in self._declarations()]
        self.forward_backward(micro_batches, refinements=0, rule=self.rule("soft"), penalty=0.0, scale=0.0)
        self.step(learning_rate=0.0)
        for hook in hooks:
            hook.remove()
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


def _parameter_groups(objective: Objective, weight_decay: float) -> list[dict]:
    """Matrices and embeddings are decayed; norms and biases are not."""
    parameters = [parameter for _, parameter, *_ in declarations(objective.model)]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, int64, in which a single flipped bit shows."""
    bits = tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
    return bits.sum(dtype=torch.int64)


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
