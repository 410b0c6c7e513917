"""All contact with DeepSpeed: ZeRO, mixed precision and the optimiser step.

What the rest of the package sees is a module to call, a step that returns the gradient norm, and the fp32 tensors of
each parameter.
"""

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from megatron_ponder.checkpoint.optimizer_state import WEIGHT, kinds, takes_whole
from megatron_ponder.config import Config, micro_batches
from megatron_ponder.config.deepspeed import (
    BUCKET,
    deepspeed_config,
    keeps_gradients,
    optimizer_wrapper,
    overlaps_reduction,
    zero_stage,
)
from megatron_ponder.model.router import Rule, RuleKind
from megatron_ponder.model.spans import span
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh, ends_of
from megatron_ponder.parallel.replicated import replicated_parameters, sum_gradients, sum_in_backward
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.clipping import clip_gradients
from megatron_ponder.training.interruption import Interruption
from megatron_ponder.training.objective import Objective, PenaltyWeights
from megatron_ponder.training.optimizer import build_optimizer
from megatron_ponder.training.pipelined import PipelinedObjective


class Engine:
    """A model, or this rank's part of it, under DeepSpeed.

    DeepSpeed remembers one grid of ranks in a process: of several engines the last one's.

    Attributes:
        model: the language model, or this rank's part of it.
        mesh: the ranks.
        tied: ranks that hold the same part of an embedding that is the head too, at both ends of a pipeline; on those
            between as well. None without such an embedding.
        low_precision: the module computes in bf16, and its fp32 weights are kept beside it.
        description: how DeepSpeed takes a step, in words.
    """

    def __init__(self, objective: Objective, config: Config, mesh: Mesh) -> None:
        """Hand the module to DeepSpeed, which casts it to the training precision and partitions it.

        Args:
            objective: initialised, with fp32 weights.
            config: resolved.
            mesh: the ranks.
        """
        self._objective, self.model, self.mesh = objective, objective.model, mesh
        self._micro_batches = micro_batches(config, mesh.data.size)
        self._clipping = config.optimizer.gradient_clipping
        self.low_precision = config.training.precision == "bf16"
        self._stage = zero_stage(config)
        self._pipelined = None
        self._kinds = {}
        for _, parameter, spec, _ in declarations(self.model):
            self._kinds[parameter] = kinds(config.optimizer, spec.matrix)
            # These count in the gradient norm on every model-parallel rank, others on the first alone.
            shared = spec.shard_dim is None and mesh.tensor.rank > 0
            parameter.model_parallel = not shared and parameter is not self.model.copied
        deepspeed = _import_deepspeed(mesh)
        # An earlier engine of this process imports when it is collected; within the imports below, that would break
        # the import lock of Python before 3.12 with a KeyError.
        gc.collect()
        with _zero_at_every_stage(deepspeed.DeepSpeedEngine):
            self._engine, *_ = deepspeed.initialize(
                model=objective,
                optimizer=build_optimizer(self.model, config, mesh),
                config=deepspeed_config(config, mesh.data.size, mesh.device.type),
                mpu=_model_parallel_unit(mesh),
                dist_init_required=False,
            )
        self._check_wrapper(config)
        self.description = _description(config, mesh) + _taken_whole(config, self.model)
        if mesh.pipeline.size > 1:
            self._engine.pipeline_parallelism = True
            dtype = torch.bfloat16 if self.low_precision else torch.float32
            self._pipelined = PipelinedObjective(objective, mesh, dtype, config.parallel.pipeline_schedule)
        self.tied = ends_of(mesh) if mesh.pipeline.size > 1 and config.model.tie_embeddings else None
        self._summed_at_end = self._sum_replicated(keeps_gradients(config))
        self._create_moments()

    def allow(self, interruption: Interruption) -> None:
        """Let steps be given up at points between passes, forward and backward."""
        if self._pipelined is not None:
            self._pipelined.interruption = interruption
            return

        def point(*_) -> None:
            interruption.point()

        def before_backward(_module, _inputs, output: Tensor | tuple[Tensor, list]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # keys and values beside it, of slots run once
            if hidden.requires_grad:
                hidden.register_hook(point)

        transformer = self.model.transformer
        transformer.register_forward_pre_hook(point)
        transformer.register_forward_hook(before_backward)

    def rule(self, kind: RuleKind) -> Rule:
        """The model's rule with α = 0, as training and validation use it."""
        return self.model.rule(kind, bias=0.0)

    def forward_backward(
        self, micro_batches: Sequence[Tensor], refinements: int, rule: Rule, penalty: PenaltyWeights, scale: float
    ) -> Tensor:
        """Forward and backward of this rank's micro-batches of a step; gradients are summed over the copies of it.

        Args:
            micro_batches: int64 (B, L + 1) each.
            refinements: R.
            rule: how a routing is applied.
            penalty: as in `Objective.measure`.
            scale: factor on the sum over tokens; 1 / supervised tokens of the whole step, over all ranks.

        Returns:
            Sums of a `Tally` for these micro-batches, (width,).
        """
        # DeepSpeed averages over the copies of a parameter what has been divided by the global count already
        scale = scale * self.mesh.copies.size
        if self._pipelined is not None:
            sums = self._pipelined.forward_backward(micro_batches, refinements, rule, penalty, scale)
            self._sum_at_end()
            self._engine.allreduce_gradients()
            return sums
        total = 0
        for index, tokens in enumerate(micro_batches):
            # DeepSpeed counts on its own to a number that never changes, and a growing batch has others.
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, sums = self._engine(tokens, refinements, rule, penalty)
            with span("backward"):
                self._engine.backward(loss * scale, scale_wrt_gas=False)
            if not self._engine.is_gradient_accumulation_boundary():
                self._engine.step()  # updates nothing; it counts the micro-batch
            total = total + sums.sum(0)
        self._sum_at_end()
        return total

    def _sum_replicated(self, at_end: bool) -> list[nn.Parameter]:
        """See that gradients of replicated parameters are summed over tensor ranks; those that wait for the end."""
        parameters = replicated_parameters(self.model)
        if at_end:
            return parameters
        sum_in_backward(parameters, self.mesh.tensor)
        return []

    def _sum_at_end(self) -> None:
        # Where ZeRO adds them up beside the parameter, in bf16, the name is another.
        own = "grad" if self._stage == 0 or not self.low_precision else "grad_accum"
        if self._summed_at_end:
            sum_gradients([getattr(parameter, own) for parameter in self._summed_at_end], self.mesh.tensor)
        if self.model.tied is not None:
            # Over the copies of the model too, whose mean DeepSpeed takes: it adds up in another order at either end,
            # unless all are alike.
            gradient = getattr(self.model.tied, own)
            sum_gradients([gradient], self.tied)
            gradient.div_(self.mesh.copies.size)

    @torch.no_grad()
    def evaluate(
        self, micro_batches: Sequence[Tensor], rounds: int, refinements: int | None, rule: Rule, each_step: bool
    ) -> Tensor:
        """Sums of a `Tally` over micro-batches, without gradients.

        Args:
            micro_batches: int64 (at most B, L + 1) each.
            rounds: the most micro-batches that any data-parallel rank has.
            refinements: R; None for `exact`, where the model is `whole`.
            rule: how a routing is applied.
            each_step: measure also what every step predicts by itself.
        """
        if self._pipelined is not None:
            return self._pipelined.evaluate(micro_batches, refinements, rule, each_step)
        width = Tally.width(self.model.ponder_config.steps)
        total = torch.zeros(width, dtype=torch.float64, device=self.mesh.device)
        for tokens in micro_batches:
            total += self._objective(tokens, refinements, rule, each_step=each_step)[1].sum(0)
        # Under ZeRO-3 every rank must run every forward, so that ranks with fewer micro-batches repeat one uncounted.
        for _ in range(rounds - len(micro_batches)):
            self._objective(self._nothing(), refinements, rule, each_step=each_step)
        return total

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, clear the gradients.

        Args:
            learning_rate: of all parameters whose group has no factor of its own.

        Returns:
            The global gradient norm before clipping, the same on all ranks. If it is not finite, the step has been
            skipped on all of them: weights, moments and their count of steps are as before.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_factor"]
        with span("optimizer"):
            norm = self._clip() if self._stage == 0 else None
            self._engine.step()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """The kinds of tensors that there are of a parameter that the model declares."""
        return self._kinds[parameter]

    def master(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The fp32 weight or moment of a parameter, whole over the data-parallel ranks; a collective of them.

        Args:
            parameter: that the model declares.
            kind: one of its `kinds`.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return parameter.detach() if kind == WEIGHT else self._engine.basic_optimizer.state[parameter][kind]
        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, kind).detach()

    def set_master(self, parameter: nn.Parameter, kind: str, content: Tensor) -> None:
        """Set what `master` gives."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        content = content.to(self.mesh.device)
        if self._stage == 0:
            self.master(parameter, kind).copy_(content)
        elif self._stage == 3:
            self._set_own(parameter, kind, content)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, content)
        else:
            safe_set_full_optimizer_state(parameter, content, kind)

    def _set_own(self, parameter: nn.Parameter, kind: str, content: Tensor) -> None:
        """Set this data-parallel rank's share, which is all that it holds at stage 3."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        own = parameter.ds_tensor.numel()
        padded = nn.functional.pad(content.flatten(), (0, own * self.mesh.copies.size - content.numel()))
        part = padded.narrow(0, own * self.mesh.copies.rank, own)
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)

    def set_steps(self, count: int) -> None:
        """Let the optimiser take itself for so many steps old, if it counts them."""
        for state in self._engine.basic_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(count)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of a parameter, whole over the data-parallel ranks, before `step`; a collective of them."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    @property
    def shares_weights(self) -> bool:
        """Whether each data-parallel rank keeps a share of every weight, and not all of it."""
        return self._stage == 3

    @property
    def keeps_state_whole(self) -> bool:
        """Whether each data-parallel rank keeps all that the optimiser remembers, and not a share of it."""
        return self._stage == 0

    def held(self, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that this rank keeps: all of it, or its share at stage 3, without padding."""
        if self._stage < 3:
            return parameter.detach()
        part = parameter.ds_tensor
        return part[: max(0, parameter.ds_numel - part.numel() * self.mesh.copies.rank)]

    def _nothing(self) -> Tensor:
        """The smallest micro-batch, of one token."""
        return torch.zeros(1, 2, dtype=torch.long, device=self.mesh.device)

    def _check_wrapper(self, config: Config) -> None:
        wrapper, given = optimizer_wrapper(config), self._engine.optimizer
        wanted = type(self._engine.basic_optimizer).__name__ if wrapper is None else wrapper
        assert type(given).__name__ == wanted, f"DeepSpeed gives {type(given).__name__} and not {wanted}"

    def _clip(self) -> Tensor:
        parameters = [parameter for _, parameter, *_ in declarations(self.model)]
        counted = [p for p in parameters if self.mesh.model.rank == 0 or p.model_parallel]
        return clip_gradients(parameters, counted, self._clipping, self.mesh.model)

    def _create_moments(self) -> None:
        """Take a step with zero gradients at learning rate 0, which leaves the weights as they are.

        DeepSpeed creates the moments in its first step, and has no public way to ask for them. They are wanted before:
        to restore a checkpoint into, and because between the activations of a first step they would leave the heap in
        pieces.
        """
        empty = [self._nothing()] * self._micro_batches
        # Zero even where a weight is no number, because a step that is skipped creates nothing.
        hooks = [parameter.register_hook(torch.zeros_like) for _, parameter, *_ in declarations(self.model)]
        self.forward_backward(empty, refinements=0, rule=self.rule("soft"), penalty=0.0, scale=0.0)
        self.step(learning_rate=0.0)
        for hook in hooks:
            hook.remove()
        self.set_steps(0)
        optimizer = self._engine.basic_optimizer
        # Stages 1 and 2 link parameters to moments after the first group's first step, when other groups have none yet.
        for _, parameter, *_ in declarations(self.model):
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
                mapping.set_optim_state_fragment(flat, optimizer.state[flat])


@contextmanager
def _zero_at_every_stage(engine_class: type) -> Iterator[None]:
    """Let engines that are made within take ZeRO's optimiser where `optimizer_wrapper` says so.

    Which one it takes, DeepSpeed asks this method of an engine, and offers no setting.
    """
    choose = engine_class._do_optimizer_sanity_check

    def choose_zero(engine, optimizer) -> str:
        return "zero_optimization" if engine.zero_optimization() else choose(engine, optimizer)

    engine_class._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        engine_class._do_optimizer_sanity_check = choose


def _description(config: Config, mesh: Mesh) -> str:
    """Return what the log says of a step."""
    wrapper = optimizer_wrapper(config)
    if wrapper is None:
        return "DeepSpeed without ZeRO: gradients are reduced after the backward pass"
    when = "during" if overlaps_reduction(config, mesh.device.type) else "after"
    return (
        f"DeepSpeed's {wrapper} at stage {zero_stage(config)}: gradients are summed in fp32, and reduced {when} the "
        f"backward pass in buckets of {BUCKET / 1e6:.0f} million"
    )


def _taken_whole(config: Config, model: nn.Module) -> str:
    """Return what the log says besides where not everything is AdamW's."""
    matrices = sum(takes_whole(config.optimizer, spec.matrix) for *_, spec, _ in declarations(model))
    return f"; Muon moves {matrices} matrices of this rank's blocks, AdamW everything else" if matrices else ""


def _model_parallel_unit(mesh: Mesh) -> SimpleNamespace:
    """Answers to what DeepSpeed asks about the ranks that hold one copy of the model, and those that hold the same."""
    return SimpleNamespace(
        get_model_parallel_group=lambda: mesh.model.group,
        get_model_parallel_rank=lambda: mesh.model.rank,
        get_model_parallel_world_size=lambda: mesh.model.size,
        get_data_parallel_group=lambda: mesh.copies.group,
        get_data_parallel_rank=lambda: mesh.copies.rank,
        get_data_parallel_world_size=lambda: mesh.copies.size,
    )


def _import_deepspeed(mesh: Mesh):
    """Import DeepSpeed for this device, without its log of every setting, compiling nothing and looking for nothing."""
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # At the first question which of its extensions could be built, DeepSpeed runs a compiler for each of them, on
    # every rank. Training uses none; one for collectives on a CPU would then be built, which takes minutes, and a rank
    # killed while it does leaves a lock behind on which all later runs wait.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
