"""The configuration of a run: typed sections, YAML and dotted overrides, and the checks that span sections.

`read_config` is what commands call. Fields that are `None` here are derived: `resolve` fills them in, and the run
folder keeps the resolved form, so that nothing is ever derived twice.
"""

import difflib
import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import yaml

from megatron_ponder.errors import UserError

Family = Literal["llama", "gpt_neox"]
Mode = Literal["vanilla", "fixed", "adaptive"]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer.

    Attributes:
        family: `llama` (RMSNorm, SwiGLU, grouped-query heads) or `gpt_neox` (LayerNorm, GELU, partial rotary, biases).
        hidden_size: width H of the residual stream.
        num_layers: number of blocks.
        num_heads: number of query heads; must divide hidden_size.
        num_kv_heads: number of key and value heads; num_heads unless given.
        ffn_hidden_size: width of the feed-forward layer; 8/3 H rounded up to 16 for llama, 4 H for gpt_neox.
        vocab_size: number of tokens; the tokenizer's unless given.
        max_position_embeddings: longest sequence in tokens that the model is meant for; the training sequence length
            unless given.
        norm_epsilon: added to the variance in the norms.
        rope_theta: base of the rotary frequencies.
        rotary_fraction: share of each head's channels that are rotated; 1 for llama, 0.25 for gpt_neox.
        parallel_residual: gpt_neox only: attention and feed-forward read the same input.
        tie_embeddings: use the input embedding as output head.
        init_std: standard deviation of the initial weights of linear layers.
    """

    family: Family = "llama"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rotary_fraction: float | None = None
    parallel_residual: bool = True
    tie_embeddings: bool = False
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class PonderConfig:
    """Additional latent steps.

    Attributes:
        mode: `vanilla` (none), `fixed` (max_steps for every token) or `adaptive` (a router decides for each token).
        max_steps: K, the most additional steps of a token.
        jacobi_iterations: R, refinement passes in training; a list is drawn from uniformly, once per optimiser step.
        threshold: tau, a step is executed at inference while its weight w is at least this.
        router_bias: alpha, added k times to the router's logit of step k at inference; positive buys more steps.
        router_hidden_size: width of a hidden layer in the router; 0 for a linear router.
        router_initial_bias: initial bias of the router for step K, so that training starts near `fixed`.
        penalty_weight: lambda, weight of the mean sum of w over additional steps in the loss; unused without a router,
            so that one configuration serves every mode.
        penalty_start: optimiser step from which the penalty is warmed up linearly.
        penalty_end: optimiser step from which the penalty has its full weight.
        embedding_scale: c, factor on token embeddings; sqrt(2.5 H) unless given, and 1 for vanilla.
        gradient_passes: let gradients flow through the last so many passes only; all of them unless given.
    """

    mode: Mode = "adaptive"
    max_steps: int = 3
    jacobi_iterations: int | list[int] = field(default_factory=lambda: [2, 3])
    threshold: float = 1e-4
    router_bias: float = 0.0
    router_hidden_size: int = 0
    router_initial_bias: float = 2.0
    penalty_weight: float = 0.0
    penalty_start: int = 0
    penalty_end: int = 0
    embedding_scale: float | None = None
    gradient_passes: int | None = None

    @property
    def steps(self) -> int:
        """Most additional steps of a token in this mode: max_steps, or 0 for vanilla."""
        return 0 if self.mode == "vanilla" else self.max_steps

    @property
    def refinement_choices(self) -> tuple[int, ...]:
        """The set that R is drawn from in training."""
        choices = self.jacobi_iterations
        return (choices,) if isinstance(choices, int) else tuple(choices)

    @property
    def evaluation_refinements(self) -> int:
        """R where one number is needed, in evaluation and export: the largest that training used."""
        return max(self.refinement_choices)


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over ranks.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        sequence_parallel: split norms and the residual stream over the tensor ranks.
        zero_stage: DeepSpeed ZeRO stage over the data-parallel ranks, 0 to 3.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 1


@dataclass(frozen=True)
class DataConfig:
    """The indexed dataset.

    Attributes:
        path: prefix of the dataset, the path of its .bin file without the ending.
        split: weights of the train, valid and test parts, by documents.
        sequence_length: L, tokens of one training sequence.
        num_workers: loader processes on each rank; 0 reads in the training process.
        reset_at_eod: confine attention to the document and restart positions after each end-of-document token.
    """

    path: str = ""
    split: str = "969,30,1"
    sequence_length: int = 2048
    num_workers: int = 1
    reset_at_eod: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        path: a SentencePiece .model file, a tokenizer.json, or a folder that holds one of them.
    """

    path: str = ""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: the peak.
        min_learning_rate_fraction: the end of the cosine, as a share of the peak.
        warmup_fraction: share of the steps spent on the linear warm-up.
        betas: decay rates of the two moments.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled decay of matrices and embeddings; norms and biases have none.
        gradient_clipping: largest global gradient norm; 0 turns clipping off.
    """

    learning_rate: float = 3e-4
    min_learning_rate_fraction: float = 0.1
    warmup_fraction: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clipping: float = 1.0


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Attributes:
        run_dir: the run's folder.
        steps: optimiser steps.
        global_batch_size: sequences of one optimiser step, over all ranks.
        micro_batch_size: sequences of one forward pass on one rank; the rest is gradient accumulation.
        precision: of activations and of the weights that compute; master weights and moments are always fp32.
        seed: of initial weights, data order and the drawn number of refinements.
        recompute: `block` keeps only the inputs of blocks and computes the rest again in the backward pass.
        eval_interval: optimiser steps between validations; 0 for none.
        eval_samples: validation sequences, at most what the split holds.
    """

    run_dir: str = "runs/default"
    steps: int = 50_000
    global_batch_size: int = 256
    micro_batch_size: int = 8
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 1234
    recompute: Literal["none", "block"] = "none"
    eval_interval: int = 1000
    eval_samples: int = 512


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming.

    Attributes:
        interval: optimiser steps between checkpoints; one is always written at the end.
        keep: newest checkpoints that are kept.
        resume: `none` starts anew, `auto` goes on from the run folder's latest checkpoint if there is one, anything
            else is the folder of a checkpoint to go on from.
        initialize_from: run or checkpoint folder whose weights a new run starts from, with a fresh optimiser at step 0.
        allow_data_change: resume although the dataset is not the one that the checkpoint was trained on.
    """

    interval: int = 1000
    keep: int = 2
    resume: str = "none"
    initialize_from: str | None = None
    allow_data_change: bool = False


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes about itself.

    Attributes:
        interval: optimiser steps between plain progress lines where there is no terminal for a bar.
        tensorboard: write TensorBoard events into the run folder.
        wandb_project: also log to this Weights & Biases project (needs the extra `wandb`).
    """

    interval: int = 10
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    ponder: PonderConfig = field(default_factory=PonderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def read_config(arguments: Sequence[str]) -> Config:
    """The resolved and validated configuration that a command line names.

    Args:
        arguments: `--config FILE.yaml` and any number of `--section.key value`; later ones win.

    Raises:
        UserError: on anything unknown, mistyped or contradictory. Every rank raises the same.
    """
    try:
        return validate(resolve(_parse(arguments)))
    except UserError as error:
        error.shared = True
        raise


def load_config(path: Path) -> Config:
    """The resolved configuration that a run folder or a checkpoint keeps as `config.yaml`."""
    return read_config(["--config", str(path)])


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `read_config` accepts."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    return yaml.safe_dump(plain, sort_keys=False)


def resolve(config: Config) -> Config:
    """Fill in the fields that are derived from others. Idempotent."""
    model, ponder = config.model, config.ponder
    llama = model.family == "llama"
    if model.ffn_hidden_size is None:
        ffn = math.ceil(8 * model.hidden_size / 3 / 16) * 16 if llama else 4 * model.hidden_size
        model = replace(model, ffn_hidden_size=ffn)
    if model.num_kv_heads is None:
        model = replace(model, num_kv_heads=model.num_heads)
    if model.rotary_fraction is None:
        model = replace(model, rotary_fraction=1.0 if llama else 0.25)
    if model.max_position_embeddings is None:
        model = replace(model, max_position_embeddings=config.data.sequence_length)
    if ponder.embedding_scale is None:
        scale = 1.0 if ponder.mode == "vanilla" else math.sqrt(2.5 * model.hidden_size)
        ponder = replace(ponder, embedding_scale=scale)
    return replace(config, model=model, ponder=ponder)


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
        0 <= optimizer.warmup_fraction < 1 and 0 <= optimizer.min_learning_rate_fraction <= 1,
        "optimizer.warmup_fraction and optimizer.min_learning_rate_fraction are shares between 0 and 1",
    )
    _require(
        config.model.max_position_embeddings >= data.sequence_length,
        f"data.sequence_length {data.sequence_length} is longer than model.max_position_embeddings "
        f"{config.model.max_position_embeddings}; lower the one or raise the other",
    )


def _parse(arguments: Sequence[str]) -> Config:
    """Type-checked parsing by jsonargparse, after our own look at the keys, whose message names the nearest one."""
    import argparse

    import jsonargparse

    arguments = list(arguments)
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            _check_file(Path(arguments[position + 1]))
        elif argument.startswith("--config="):
            _check_file(Path(argument.partition("=")[2]))
        elif argument.startswith("--") and argument not in ("--help", "--config"):
            _check_key(argument[2:].partition("=")[0], "on the command line")
    parser = _parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations that jsonargparse announces to library authors
            namespace = parser.parse_args(arguments)
            sections = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(namespace)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise UserError(_one_line(str(error))) from error
    return Config(**{section.name: getattr(sections, section.name) for section in fields(Config)})


@functools.cache
def _parser():
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, description="Sections and keys, with their defaults:")
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(Config, nested_key=None, fail_untyped=True)
    return parser


def _one_line(message: str) -> str:
    return " ".join(message.replace("Parser key", "configuration key").split())


def _check_file(path: Path) -> None:
    """Refuse a configuration file that is missing, is no mapping, or has a key that no section knows."""
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}; check the path given with --config")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `model:` with keys below them")
    for section, keys in content.items():
        if not isinstance(keys, dict):
            _check_key(f"{section}", f"in {path}", section_only=True)
            raise UserError(f"section `{section}` in {path} must hold keys below it")
        for key in keys:
            _check_key(f"{section}.{key}", f"in {path}")


def _check_key(key: str, where: str, section_only: bool = False) -> None:
    """Refuse a dotted key, or a section, that does not exist, naming the nearest one that does."""
    keys = [f"{section.name}.{item.name}" for section in fields(Config) for item in fields(section.default_factory)]
    sections = [section.name for section in fields(Config)]
    names = sections if section_only else keys
    if key in names:
        return
    elsewhere = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0) or difflib.get_close_matches(key, names, n=1)
    if nearest and section_only and "." in nearest[0]:
        hint = "put `{2}` below `{0}:`".format(*nearest[0].partition("."))
    else:
        hint = f"did you mean {nearest[0]}?" if nearest else f"sections are {', '.join(sections)}"
    raise UserError(f"unknown configuration {'section' if section_only else 'key'} {key} {where}; {hint}")
