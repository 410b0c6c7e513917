"""Checks that a configuration can work; every message says what to write instead."""

import math

from megatron_ponder.config.sections import Config, ModelConfig, ParallelConfig, PonderConfig
from megatron_ponder.errors import UserError


def validate(config: Config) -> Config:
    """Refuse what cannot work, saying what to write instead.

    Raises:
        UserError: for the first contradiction found.
    """
    _validate_model(config.model)
    _validate_ponder(config.ponder)
    _validate_parallel(config.parallel)
    _validate_run(config)
    return config


def data_parallel_size(config: Config, world_size: int) -> int:
    """Number of data-parallel ranks; checks that the layout and the batch fit the number of ranks.

    Raises:
        UserError: when they do not.
    """
    parallel, training = config.parallel, config.training
    shared = parallel.tensor * parallel.pipeline
    if world_size % shared:
        raise UserError(
            f"{world_size} ranks cannot be divided into groups of parallel.tensor × parallel.pipeline = {shared}; "
            f"start a multiple of {shared} ranks or change the two"
        )
    size = world_size // shared
    unit = training.micro_batch_size * size
    if training.global_batch_size % unit:
        fits = max(unit, round(training.global_batch_size / unit) * unit)
        raise UserError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} × {size} data-parallel ranks; set training.global_batch_size to {fits}, or a "
            f"smaller training.micro_batch_size"
        )
    return size


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _validate_model(model: ModelConfig) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_hidden_size"):
        _require(getattr(model, name) >= 1, f"model.{name} is {getattr(model, name)}; it must be at least 1")
    _require(
        model.hidden_size % model.num_heads == 0,
        f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}; "
        f"choose a multiple, for example {math.ceil(model.hidden_size / model.num_heads) * model.num_heads}",
    )
    _require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads {model.num_heads} is not divisible by model.num_kv_heads {model.num_kv_heads}; "
        "set model.num_kv_heads to a divisor of model.num_heads",
    )
    _require(
        model.family == "llama" or model.num_kv_heads == model.num_heads,
        "the gpt_neox family has no grouped-query heads; leave out model.num_kv_heads or set model.family to llama",
    )
    rotated = model.head_size * model.rotary_fraction
    _require(
        0 < model.rotary_fraction <= 1 and rotated == int(rotated) and int(rotated) % 2 == 0,
        f"model.rotary_fraction {model.rotary_fraction} of a head of {model.head_size} channels is {rotated:g}; "
        "it must be a positive even number of them",
    )
    _require(
        model.family == "gpt_neox" or model.rotary_fraction == 1,
        "the llama family rotates whole heads; leave out model.rotary_fraction or set model.family to gpt_neox",
    )
    _require(
        model.vocab_size is None or model.vocab_size >= 2,
        f"model.vocab_size is {model.vocab_size}; leave it out to take the tokenizer's",
    )


def _validate_ponder(ponder: PonderConfig) -> None:
    _require(
        ponder.mode == "vanilla" or ponder.max_steps >= 1,
        f"ponder.mode {ponder.mode} needs ponder.max_steps of at least 1, not {ponder.max_steps}; "
        "for a model without additional steps set ponder.mode to vanilla",
    )
    choices = ponder.refinement_choices
    _require(
        len(choices) > 0 and min(choices) >= 0,
        f"ponder.jacobi_iterations is {ponder.jacobi_iterations}; give a number from 0 up, or a list to draw from",
    )
    _require(
        0 <= ponder.threshold <= 1,
        f"ponder.threshold {ponder.threshold} is not a weight; choose it between 0 (every step runs) and 1",
    )
    _require(ponder.router_hidden_size >= 0, "ponder.router_hidden_size must be 0 (a linear router) or positive")
    _require(ponder.penalty_weight >= 0, "ponder.penalty_weight must not be negative; 0 turns the penalty off")
    _require(
        0 <= ponder.penalty_start <= ponder.penalty_end,
        f"ponder.penalty_start {ponder.penalty_start} must lie between 0 and ponder.penalty_end {ponder.penalty_end}",
    )
    _require(
        ponder.gradient_passes is None or ponder.gradient_passes >= 1,
        "ponder.gradient_passes must be at least 1; leave it out to let gradients flow through every pass",
    )
    _require(ponder.embedding_scale > 0, f"ponder.embedding_scale is {ponder.embedding_scale}; it must be positive")


def _validate_parallel(parallel: ParallelConfig) -> None:
    _require(
        0 <= parallel.zero_stage <= 3,
        f"parallel.zero_stage is {parallel.zero_stage}; DeepSpeed has stages 0, 1, 2 and 3",
    )
    for name in ("tensor", "pipeline"):
        _require(
            getattr(parallel, name) == 1,
            f"parallel.{name} is {getattr(parallel, name)}, but this version trains data-parallel only; "
            f"set parallel.{name} to 1 and use parallel.zero_stage to save memory",
        )
    _require(
        not parallel.sequence_parallel,
        "parallel.sequence_parallel needs parallel.tensor of at least 2; set it to false",
    )


def _validate_run(config: Config) -> None:
    data, training, optimizer = config.data, config.training, config.optimizer
    positive = {
        "data.sequence_length": data.sequence_length,
        "training.steps": training.steps,
        "training.global_batch_size": training.global_batch_size,
        "training.micro_batch_size": training.micro_batch_size,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep": config.checkpoint.keep,
        "logging.interval": config.logging.interval,
    }
    for name, value in positive.items():
        _require(value >= 1, f"{name} is {value}; it must be at least 1")
    _require(data.num_workers >= 0, f"data.num_workers is {data.num_workers}; it must be 0 or more")
    _require(training.eval_interval >= 0, "training.eval_interval must be 0 (never) or a number of steps")
    _require(
        training.eval_interval == 0 or training.eval_samples >= 1,
        "training.eval_samples must be at least 1; to train without validation set training.eval_interval to 0",
    )
    _require(optimizer.learning_rate > 0, f"optimizer.learning_rate is {optimizer.learning_rate}; it must be positive")
    _require(
        all(0 <= beta < 1 for beta in optimizer.betas) and optimizer.epsilon > 0,
        "optimizer.betas must lie between 0 and 1, and optimizer.epsilon above 0",
    )
    _require(
        optimizer.weight_decay >= 0 and optimizer.gradient_clipping >= 0,
        "optimizer.weight_decay and optimizer.gradient_clipping must not be negative; 0 turns them off",
    )
    _require(
        0 <= optimizer.warmup_fraction < 1 and 0 <= optimizer.min_learning_rate_fraction <= 1,
        "optimizer.warmup_fraction and optimizer.min_learning_rate_fraction are shares between 0 and 1",
    )
    _require(
        config.model.max_position_embeddings >= data.sequence_length,
        f"data.sequence_length {data.sequence_length} is longer than model.max_position_embeddings "
        f"{config.model.max_position_embeddings}; lower the one or raise the other",
    )
