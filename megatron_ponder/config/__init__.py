"""The configuration of a run: typed sections, YAML and dotted overrides, and the checks that span sections.

`read_config` is what commands call. Fields that are `None` there are derived by `resolve`, and the run folder keeps the
resolved form, so that nothing is ever derived twice.
"""

from megatron_ponder.config.checks import validate
from megatron_ponder.config.data import BlendPart, DataConfig, PhaseConfig, TokenizerConfig
from megatron_ponder.config.layout import (
    check_layout,
    data_parallel_size,
    even_layers,
    largest_tensor,
    micro_batches,
    stage_layers,
)
from megatron_ponder.config.model import ModelConfig
from megatron_ponder.config.parallel import ParallelConfig
from megatron_ponder.config.parsing import load_config, read_config, to_yaml, written_values
from megatron_ponder.config.ponder import InferenceConfig, PonderConfig, PonderTrainingConfig
from megatron_ponder.config.run import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    TasksConfig,
    TrainingConfig,
    TrainingPhaseConfig,
)
from megatron_ponder.config.sections import Config, architecture, resolve
from megatron_ponder.config.training_phases import TrainingPhase, training_phases

__all__ = [
    "BlendPart",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "InferenceConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PonderConfig",
    "PonderTrainingConfig",
    "TasksConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TrainingPhase",
    "TrainingPhaseConfig",
    "architecture",
    "check_layout",
    "data_parallel_size",
    "even_layers",
    "largest_tensor",
    "load_config",
    "micro_batches",
    "read_config",
    "resolve",
    "stage_layers",
    "to_yaml",
    "training_phases",
    "validate",
    "written_values",
]
