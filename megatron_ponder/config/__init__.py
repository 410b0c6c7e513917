"""Floor 1: the configuration of a run: typed sections, YAML and dotted overrides, and the checks that span sections.

`read_config` is what commands call. Fields that are `None` there are derived by `resolve`, and the run folder keeps the
resolved form, so that nothing is ever derived twice.
"""

from megatron_ponder.config.parsing import load_config, read_config, to_yaml
from megatron_ponder.config.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PonderConfig,
    TokenizerConfig,
    TrainingConfig,
    resolve,
)
from megatron_ponder.config.validation import data_parallel_size, validate

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PonderConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "data_parallel_size",
    "load_config",
    "read_config",
    "resolve",
    "to_yaml",
    "validate",
]
