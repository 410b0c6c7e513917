"""Checks that a configuration can work; every message says what to write instead."""

import math
from collections.abc import Sequence
from dataclasses import fields

from megatron_ponder.base.durations import parse_duration
from megatron_ponder.base.errors import UserError
from megatron_ponder.config.data import DataConfig
from megatron_ponder.config.declarations import check_ranges, range_of
from megatron_ponder.config.evaluation_checks import validate_blend, validate_evaluation
from megatron_ponder.config.layout import even_layers, largest_context, largest_tensor
from megatron_ponder.config.model import ROPE_SCALINGS, ModelConfig
from megatron_ponder.config.parallel import DIVIDED, ParallelConfig
from megatron_ponder.config.run import CheckpointConfig, OptimizerConfig, TrainingConfig
from megatron_ponder.config.saving_checks import validate_saving
from megatron_ponder.config.schedule_checks import validate_schedules
from megatron_ponder.config.sections import Config


def validate(config: Config) -> Config:
    """Refuse what cannot work, saying what to write instead.

    Raises:
        UserError: for the first contradiction found.
    """
    check_ranges(config)
    _validate_model(config.model)
    _validate_ponder(config)
    _validate_parallel(config.parallel)
    _validate_divided(config)
    if config.parallel.pipeline > 1:
        _validate_pipeline(config)
    _validate_offload(config.parallel)
    _validate_optimizer(config)
    _validate_recompute(config.training)
    _validate_compile(config)
    _validate_data(config.data)
    _validate_profile(config.training)
    validate_schedules(config)
    _validate_start(config.checkpoint)
    validate_evaluation(config)
    _validate_run(config)
    validate_saving(config)
    return config


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _validate_model(model: ModelConfig) -> None:
    _require(
        model.head_size is not None,
        f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; choose a "
        f"multiple, for example {math.ceil(model.hidden_size / model.num_heads) * model.num_heads}, or set "
        "model.head_size",
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads {model.num_kv_heads}; "
        "set model.num_kv_heads to a divisor of model.num_heads",
    )
    rotated = model.head_size * model.rotary_fraction
    _require(
        rotated >= 2 and rotated % 2 == 0,
        f"model.rotary_fraction {model.rotary_fraction} of a head of {model.head_size} channels is {rotated:g}; "
        "it must be a positive even number of them",
    )
    _validate_rope(model)


def _validate_rope(model: ModelConfig) -> None:
    wanted = ROPE_SCALINGS[model.rope_scaling]
    for name in ROPE_SCALINGS["yarn"]:
        value = getattr(model, name)
        _require(
            name in wanted or value is None,
            f"model.{name} {value} has no meaning with model.rope_scaling {model.rope_scaling}; leave it out",
        )
        _require(
            name not in wanted or value is not None,
            f"model.rope_scaling {model.rope_scaling} needs model.{name}; give it, as the model was trained with",
        )
    _require(
        model.rope_low_turns is None or model.rope_low_turns < model.rope_high_turns,
        f"model.rope_low_turns {model.rope_low_turns} must be below model.rope_high_turns {model.rope_high_turns}",
    )


def _validate_ponder(config: Config) -> None:
    ponder, training = config.ponder, config.ponder_training
    _require(
        ponder.mode == "vanilla" or ponder.latent_steps >= 1,
        f"ponder.mode {ponder.mode} needs ponder.latent_steps of at least 1, not {ponder.latent_steps}; "
        "for a model without latent steps set ponder.mode to vanilla",
    )
    _require(
        ponder.latent_scale == 1 or ponder.reads_hidden,
        f"ponder.latent_scale {ponder.latent_scale} has no meaning with ponder.mode {ponder.mode}, where no hidden "
        "state enters again; leave it out",
    )
    _require(
        ponder.initial_latent_scale == 1 or ponder.latent_scale == "learned",
        f"ponder.initial_latent_scale {ponder.initial_latent_scale} has no meaning with ponder.latent_scale "
        f"{ponder.latent_scale}; leave it out, or set that to learned",
    )
    weights = training.jacobi_iterations.values() if isinstance(training.jacobi_iterations, dict) else ()
    _require(
        len(training.refinement_choices) > 0 and 0 not in weights,
        f"ponder_training.jacobi_iterations is {training.jacobi_iterations}; give a number from 0 up, a list to draw "
        "from, or numbers with the weight of each, from 1 up",
    )
    _require(
        ponder.latent_visibility == "all" or ponder.mode in ("fixed", "adaptive"),
        f"ponder.latent_visibility {ponder.latent_visibility} has no meaning with ponder.mode {ponder.mode}; leave it "
        "out, and for pause embeddings that no other token sees set ponder.mode to sps",
    )
    _require(
        training.latent_start == 0 or ponder.mode not in ("pause", "sps"),
        f"ponder_training.latent_start {training.latent_start} has no meaning with ponder.mode {ponder.mode}, whose "
        "output is read from its pauses; leave it out",
    )
    warm = training.latent_start + training.latent_warmup
    _require(
        training.latent_warmup == 0 or warm <= training.router_start,
        f"ponder_training.latent_warmup {training.latent_warmup} ends after ponder_training.router_start "
        f"{training.router_start}, from which the router gives latent steps their weight; set that to at least {warm}",
    )


def _validate_parallel(parallel: ParallelConfig) -> None:
    _require(
        parallel.pipeline > 1 or parallel.pipeline_schedule == "1f1b",
        "parallel.pipeline_schedule zero_bubble needs parallel.pipeline of at least 2; "
        "leave parallel.pipeline_schedule out",
    )
    _require(
        parallel.pipeline > 1 or parallel.pipeline_layers is None,
        "parallel.pipeline_layers divides blocks over parallel.pipeline ranks, but that is 1; "
        f"set parallel.pipeline to {max(2, len(parallel.pipeline_layers or []))} or leave parallel.pipeline_layers out",
    )
    _require(
        not parallel.sequence_parallel or parallel.tensor > 1,
        "parallel.sequence_parallel needs parallel.tensor of at least 2; set it to false",
    )


def _validate_divided(config: Config) -> None:
    model, parallel = config.model, config.parallel
    for key, axes in DIVIDED.items():
        section, name = key.split(".")
        number = getattr(getattr(config, section), name)
        split = [axis for axis in axes if getattr(parallel, axis) > 1]
        ranks = math.prod(getattr(parallel, axis) for axis in split)
        grouped = name == "num_kv_heads" and model.num_kv_heads < model.num_heads
        reason = ", and grouped-query heads are not replicated" if grouped else ""
        _require(
            number % ranks == 0,
            f"{' × '.join(f'parallel.{axis}' for axis in split)} {ranks} does not divide {key} {number}{reason}; "
            f"the largest that works is {_largest(config, split)}{_or_length(key, number, ranks)}",
        )


def _or_length(key: str, number: int, ranks: int) -> str:
    """The length nearest to this one that so many ranks divide, which a user chooses more freely than heads."""
    if key != "data.sequence_length":
        return ""
    return f"; or set {key} to {max(1, (2 * number + ranks - 1) // (2 * ranks)) * ranks}"


def _largest(config: Config, split: Sequence[str]) -> str:
    """The most ranks along one of these axes that divide what they have to, as a key and its value."""
    parallel = config.parallel
    tensor = largest_tensor(config.model, parallel.tensor)
    if tensor < parallel.tensor or "context" not in split:
        return f"parallel.tensor {tensor}"
    return f"parallel.context {largest_context(config, tensor, parallel.context)}"


def _validate_pipeline(config: Config) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, counts = parallel.pipeline, parallel.pipeline_layers
    _require(
        pipeline <= layers,
        f"parallel.pipeline {pipeline} leaves ranks without a block, as model.num_layers is {layers}; "
        f"set parallel.pipeline to {layers} or less",
    )
    if counts is not None:
        _require(
            len(counts) == pipeline and sum(counts) == layers,
            f"parallel.pipeline_layers {counts} must be {pipeline} numbers from 1 up, one for each of "
            f"parallel.pipeline, whose sum is model.num_layers {layers}; {even_layers(layers, pipeline)} is",
        )
    _require(
        parallel.zero_stage <= 1,
        f"parallel.zero_stage {parallel.zero_stage} cannot be used with parallel.pipeline {pipeline}: gradients of "
        "several passes and micro-batches are in flight on a rank, so that they cannot be partitioned before the "
        "step; set parallel.zero_stage to 1, or parallel.pipeline to 1",
    )
    _require(
        not config.ponder.routes_by_token,
        f"ponder.router_input token cannot be used with parallel.pipeline {pipeline}: embedding and router are on "
        "different ranks; set ponder.router_input to hidden, or parallel.pipeline to 1",
    )
    _require(
        config.ponder_training.gradient_passes is None,
        f"ponder_training.gradient_passes cannot be used with parallel.pipeline {pipeline}: every pass must hand a "
        "gradient back to the one before; leave ponder_training.gradient_passes out, or set parallel.pipeline to 1",
    )
    _require(
        config.training.precision == "fp32" or parallel.pipeline_schedule != "zero_bubble",
        "parallel.pipeline_schedule zero_bubble adds up gradients in the type of the weights, which would lose them in "
        "bf16; leave parallel.pipeline_schedule out, or set training.precision to fp32",
    )
    _require(
        config.training.recompute != "block" or parallel.pipeline_schedule != "zero_bubble",
        "training.recompute block saves nothing with parallel.pipeline_schedule zero_bubble, which keeps all that it "
        "has computed again; set parallel.pipeline_schedule to 1f1b, or training.recompute to attention",
    )


def _validate_offload(parallel: ParallelConfig) -> None:
    where, stage = parallel.offload_optimizer, parallel.zero_stage
    _require(
        where != "cpu" or stage >= 1,
        "parallel.offload_optimizer cpu moves what ZeRO has partitioned; set parallel.zero_stage to 1, 2 or 3",
    )
    _require(
        where != "nvme" or stage == 3,
        f"parallel.offload_optimizer nvme needs parallel.zero_stage 3, not {stage}; set it to 3, or offload to cpu",
    )
    _require(
        where != "nvme" or bool(parallel.offload_nvme_path),
        "parallel.offload_optimizer nvme needs a folder on a fast disk of every node; set parallel.offload_nvme_path",
    )
    _require(
        where == "nvme" or parallel.offload_nvme_path is None,
        f"parallel.offload_nvme_path is not used with parallel.offload_optimizer {where}; "
        "leave it out, or set parallel.offload_optimizer to nvme",
    )


def _validate_optimizer(config: Config) -> None:
    optimizer, stage = config.optimizer, config.parallel.zero_stage
    if optimizer.name != "muon":
        for item in fields(OptimizerConfig):
            value = getattr(optimizer, item.name)
            _require(
                not item.name.startswith("muon_") or value == item.default,
                f"optimizer.{item.name} {value} has no meaning with optimizer.name {optimizer.name}; leave it out, or "
                "set optimizer.name to muon",
            )
        return
    _require(
        stage < 3,
        f"optimizer.name muon cannot be used with parallel.zero_stage {stage}, which cuts every matrix over all data "
        "ranks; set parallel.zero_stage to 1 or 2, or optimizer.name to adamw",
    )
    _require(
        optimizer.muon_scaling != "original" or optimizer.muon_learning_rate is not None,
        "optimizer.muon_scaling original needs a learning rate of its own, because its updates are far smaller than "
        "those of AdamW at the same one; set optimizer.muon_learning_rate, for example to 0.02",
    )


def _validate_recompute(training: TrainingConfig) -> None:
    passes = training.recompute_passes
    _require(
        passes is None or training.recompute != "none",
        f"training.recompute_passes {passes} recomputes nothing while training.recompute is none; "
        "set training.recompute to block or attention, or leave training.recompute_passes out",
    )


def _validate_compile(config: Config) -> None:
    parallel, compiled = config.parallel, config.training.compile
    _require(
        not compiled or parallel.zero_stage < 3,
        "training.compile cannot be used with parallel.zero_stage 3, which fetches the weights of a block while it "
        "runs; set parallel.zero_stage to 2, or training.compile to false",
    )
    _require(
        not compiled or parallel.pipeline_schedule != "zero_bubble",
        "training.compile computes all gradients of a block at once, and parallel.pipeline_schedule zero_bubble those "
        "of weights later; set parallel.pipeline_schedule to 1f1b, or training.compile to false",
    )
    packs = config.ponder_training.packed and config.ponder_training.prune_start is not None
    _require(
        not (compiled and packs and parallel.context > 1),
        "training.compile cannot compile packed passes of parallel.context ranks, which exchange another number of "
        "slots in every pass; set training.compile to false, or ponder_training.packed to false, which masks slots in "
        "place of leaving them out",
    )


def _validate_data(data: DataConfig) -> None:
    for name in ("path", "valid_path", "test_path"):
        validate_blend(f"data.{name}", getattr(data, name) or "")
    first = 0
    for phase in data.phases:
        _require(
            phase.first_sample > first,
            f"data.phases has a phase from sample {phase.first_sample} on after one from {first} on; "
            "give phases in rising order, after the one of data.path, which starts at 0",
        )
        first = phase.first_sample
        _require(bool(phase.path), f"the phase from sample {first} on in data.phases has no path; give it one")
        validate_blend(f"the path of the phase from sample {first} on", phase.path)


def _validate_profile(training: TrainingConfig) -> None:
    steps = training.profile_steps
    _require(
        steps is None or (len(steps) == 2 and steps[0] <= steps[1] <= training.steps),
        f"training.profile_steps {steps} must be the first and the last step to trace, such as [10, 13], of the "
        f"training.steps {training.steps}",
    )
    _require(
        steps is not None or training.profile_ranks is None,
        f"training.profile_ranks {training.profile_ranks} trace nothing without training.profile_steps; set it to the "
        "first and the last step to trace, such as [10, 13]",
    )
    _require(training.profile_ranks != [], "training.profile_ranks is empty; name ranks, or leave it out")


def _validate_start(checkpoint: CheckpointConfig) -> None:
    branch = checkpoint.branch_from
    _require(
        branch is None or checkpoint.initialize_from is None,
        f"checkpoint.branch_from {branch} goes on from a run, and checkpoint.initialize_from "
        f"{checkpoint.initialize_from} takes weights alone; leave one of them out",
    )
    _require(
        branch is None or checkpoint.resume in ("auto", "none"),
        f"checkpoint.branch_from {branch} and checkpoint.resume {checkpoint.resume} are two checkpoints to go on from; "
        "leave one of them out",
    )


def _validate_run(config: Config) -> None:
    data, training = config.data, config.training
    _require(
        not (training.eval_interval or training.eval_at_start) or training.eval_samples >= 1,
        "training.eval_samples must be at least 1; to train without validation set training.eval_interval to 0",
    )
    if training.time_limit is not None:
        limits = next(range_of(item) for item in fields(TrainingConfig) if item.name == "time_limit")
        _require(
            parse_duration(training.time_limit) / 60 in limits,
            f"training.time_limit is {training.time_limit}; its range is {limits} minutes",
        )
    _require(
        config.model.max_position_embeddings >= data.sequence_length,
        f"data.sequence_length {data.sequence_length} is longer than model.max_position_embeddings "
        f"{config.model.max_position_embeddings}; lower the one or raise the other",
    )
