"""A configuration as a whole: its sections, what of them is the model's for good, and what is derived."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_ponder.config.data import DataConfig, TokenizerConfig
from megatron_ponder.config.declarations import is_changeable
from megatron_ponder.config.families import FAMILIES
from megatron_ponder.config.model import ROPE_SCALINGS, ModelConfig
from megatron_ponder.config.parallel import ParallelConfig
from megatron_ponder.config.ponder import InferenceConfig, PonderConfig, PonderTrainingConfig
from megatron_ponder.config.run import (
    IN_PLACE,
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TasksConfig,
    TrainingConfig,
)


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ponder: PonderConfig = field(default_factory=PonderConfig)
    ponder_training: PonderTrainingConfig = field(default_factory=PonderTrainingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)


ARCHITECTURE = ("model", "ponder")


def architecture(config: Config) -> dict[str, Any]:
    """Values, by dotted keys, of all that a checkpoint has been trained with and cannot be used without."""
    return {
        f"{section}.{item.name}": getattr(getattr(config, section), item.name)
        for section in ARCHITECTURE
        for item in fields(getattr(config, section))
        if not is_changeable(item)
    }


def architecture_changes(config: Config, stored: Config) -> dict[str, tuple[Any, Any]]:
    """What of a checkpoint's model a configuration has otherwise, by dotted keys: the checkpoint's value, and its own.

    Args:
        config: resolved.
        stored: that of the checkpoint.
    """
    ours, theirs = architecture(config), architecture(stored)
    return {key: (value, ours[key]) for key, value in theirs.items() if ours[key] != value}


def turns_positions(key: str) -> bool:
    """Whether a dotted key is about how positions are rotated, which a model can be trained to do otherwise."""
    return key.startswith("model.rope_")


def resolve(config: Config) -> Config:
    """Fill in the fields that are derived from others. Idempotent."""
    model, ponder, optimizer = config.model, config.ponder, config.optimizer
    features = {name: usual for name, usual in FAMILIES[model.family].items() if getattr(model, name) is None}
    model = replace(model, **features)
    if model.ffn_hidden_size is None:
        gated = math.ceil(8 * model.hidden_size / 3 / 16) * 16
        ffn = gated if model.gated_ffn else 4 * model.hidden_size
        model = replace(model, ffn_hidden_size=ffn)
    if model.num_kv_heads is None:
        model = replace(model, num_kv_heads=model.num_heads)
    if model.head_size is None and model.hidden_size % model.num_heads == 0:
        model = replace(model, head_size=model.hidden_size // model.num_heads)
    scaling = ROPE_SCALINGS[model.rope_scaling]
    model = replace(model, **{name: usual for name, usual in scaling.items() if getattr(model, name) is None})
    if "rope_attention_factor" in scaling and model.rope_factor and model.rope_attention_factor is None:
        model = replace(model, rope_attention_factor=0.1 * math.log(model.rope_factor) + 1)
    if model.max_position_embeddings is None:
        model = replace(model, max_position_embeddings=config.data.sequence_length)
    if ponder.embedding_scale is None:
        scale = 1.0 if ponder.mode == "vanilla" else math.sqrt(2.5 * model.hidden_size)
        ponder = replace(ponder, embedding_scale=scale)
    replaced = [share for share, number in IN_PLACE.items() if getattr(optimizer, number) is not None]
    optimizer = replace(optimizer, **dict.fromkeys(replaced))
    return replace(config, model=model, ponder=ponder, optimizer=optimizer)
