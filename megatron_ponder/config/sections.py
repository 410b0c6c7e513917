"""The typed sections of a configuration, and the fields that are derived from others."""

import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from megatron_ponder.config.declarations import SECONDS, STEPS, changeable, is_changeable, number_field, path_field
from megatron_ponder.config.families import FAMILIES, Family
from megatron_ponder.config.ponder import InferenceConfig, PonderConfig, PonderTrainingConfig

RecomputeKind = Literal["none", "block", "attention"]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. A feature that is not given is the family's.

    Attributes:
        family: name of a set of features: `llama` or `gpt_neox`.
        hidden_size: width H of the residual stream.
        num_layers: number of blocks.
        num_heads: number of query heads; must divide hidden_size.
        num_kv_heads: number of key and value heads; num_heads unless given.
        ffn_hidden_size: width of the feed-forward layer; 8/3 H rounded up to 16 if it is gated, 4 H if not.
        vocab_size: number of tokens; the tokenizer's unless given.
        max_position_embeddings: longest sequence in tokens that the model is meant for; the training sequence length
            unless given.
        norm: `rms` (RMSNorm) or `layer` (LayerNorm).
        norm_epsilon: added to the variance in the norms.
        gated_ffn: the feed-forward layer multiplies what is activated by a second projection, as SwiGLU does.
        activation: of the feed-forward layer, `silu` or `gelu`, which is the exact one.
        biases: linear layers that have one: `none` or `all`, output head aside.
        rope_theta: base of the rotary frequencies.
        rotary_fraction: share of each head's channels that are rotated.
        residual: `sequential` (the feed-forward layer reads what attention has changed) or `parallel` (both read the
            same).
        tie_embeddings: use the input embedding as output head.
        init_std: standard deviation of the initial weights of linear layers.
    """

    family: Family = "llama"
    hidden_size: int = number_field(768, 1, 2**20)
    num_layers: int = number_field(12, 1, 10_000)
    num_heads: int = number_field(12, 1, 2**16)
    num_kv_heads: int | None = number_field(None, 1, 2**16)
    ffn_hidden_size: int | None = number_field(None, 1, 2**22)
    vocab_size: int | None = number_field(None, 2, 2**24)
    max_position_embeddings: int | None = changeable(number_field(None, 1, 2**24))
    norm: Literal["rms", "layer"] | None = None
    norm_epsilon: float = number_field(1e-5, 1e-12, 0.1)
    gated_ffn: bool | None = None
    activation: Literal["silu", "gelu"] | None = None
    biases: Literal["none", "all"] | None = None
    rope_theta: float = number_field(10000.0, 1, 1e12)
    rotary_fraction: float | None = number_field(None, 0, 1, above=True)
    residual: Literal["sequential", "parallel"] | None = None
    tie_embeddings: bool = False
    init_std: float = changeable(number_field(0.02, 1e-6, 10))

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def qkv_biases(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.biases == "all"

    @property
    def other_biases(self) -> bool:
        """Whether all other linear layers of a block have one."""
        return self.biases == "all"

    @property
    def residual_std(self) -> float:
        """Standard deviation of the initial weights of layers whose output is added to the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @property
    def description(self) -> str:
        """The family, and in what the model differs from it."""
        own = [
            f"{name} {getattr(self, name)}"
            for name, usual in FAMILIES[self.family].items()
            if getattr(self, name) != usual
        ]
        return f"{self.family} with {', '.join(own)}" if own else self.family


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over ranks.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        sequence_parallel: split norms and the residual stream over the tensor ranks.
        zero_stage: DeepSpeed ZeRO stage over the data-parallel ranks, 0 to 3; at most 1 with a pipeline.
        pipeline_layers: blocks on each pipeline rank, first to last; divided as evenly as possible unless given.
        pipeline_schedule: order of forward and backward passes of a step on the pipeline ranks: `1f1b` (interleaved
            one-forward-one-backward) or `zero_bubble` (computes gradients of weights where a rank would wait).
        vocab_multiple: rows of the vocabulary on each tensor rank are padded to a multiple of this; padded ids exist
            in memory only, in no checkpoint and in no loss.
        offload_optimizer: where master weights and moments are kept: `none` (with the weights), `cpu` (host memory;
            zero_stage 1 to 3) or `nvme` (files below offload_nvme_path; zero_stage 3).
        offload_nvme_path: folder on a fast disk of every node.
        offload_pin_memory: offload through page-locked host memory, which is faster and cannot be swapped out.
        replica_check_interval: optimiser steps between comparisons of the checksums of what tensor ranks hold
            replicated; 0 = never.
        start_timeout: seconds that ranks wait for each other at the start.
    """

    tensor: int = number_field(1, 1, 2**12)
    pipeline: int = number_field(1, 1, 2**12)
    sequence_parallel: bool = False
    zero_stage: int = number_field(1, 0, 3)
    pipeline_layers: list[int] | None = number_field(None, 1, 10_000)
    pipeline_schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    vocab_multiple: int = number_field(1, 1, 2**16)
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_nvme_path: str | None = path_field(None)
    offload_pin_memory: bool = False
    replica_check_interval: int = number_field(100, 0, STEPS)
    start_timeout: int = number_field(300, 1, SECONDS)


@dataclass(frozen=True)
class BlendPart:
    """One dataset of a blend.

    Attributes:
        path: prefix of the dataset.
        weight: its share of the samples is this, divided by the sum of the weights.
        split: weights of its train, valid and test parts, in place of `data.split`.
    """

    path: str = path_field(MISSING)
    weight: float = number_field(1.0, 1e-9, 1e12)
    split: list[int | float] | str | None = number_field(None, 0, 1e12)


@dataclass(frozen=True)
class PhaseConfig:
    """What to train on from some sample on.

    Attributes:
        first_sample: samples of the run before this phase.
        path: prefix of the dataset, or a blend.
    """

    first_sample: int = number_field(MISSING, 1, STEPS)
    path: list[BlendPart] | str = path_field(MISSING)


@dataclass(frozen=True)
class DataConfig:
    """The indexed datasets.

    Attributes:
        path: prefix of the dataset, the path of its .bin file without the ending; or a blend, as a list of {path,
            weight, split}.
        valid_path: prefix or blend for validation; as path unless given.
        test_path: prefix or blend for testing; as path unless given.
        phases: list of {first_sample, path} that replace path for training from a sample of the run on.
        split: weights of the train, valid and test parts of each dataset, by documents.
        sequence_length: L, tokens of one training sequence.
        num_workers: loader processes on each rank; 0 reads in the training process.
        cache_path: folder where processes share the order of the samples through memory-mapped files; in the memory of
            each process unless given.
        reset_at_eod: confine attention to the document and restart positions after each end-of-document token.
    """

    path: list[BlendPart] | str = path_field("")
    valid_path: list[BlendPart] | str | None = path_field(None)
    test_path: list[BlendPart] | str | None = path_field(None)
    phases: list[PhaseConfig] = field(default_factory=list)
    split: list[int | float] | str = number_field([969, 30, 1], 0, 1e12)
    sequence_length: int = number_field(2048, 1, 2**24)
    num_workers: int = number_field(1, 0, 256)
    cache_path: str | None = path_field(None)
    reset_at_eod: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        path: a SentencePiece .model file, a tokenizer.json, or a folder that holds one of them.
    """

    path: str = path_field("")


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

    learning_rate: float = number_field(3e-4, 1e-30, 1e30)
    min_learning_rate_fraction: float = number_field(0.1, 0, 1)
    warmup_fraction: float = number_field(0.02, 0, 1, below=True)
    betas: tuple[float, float] = number_field((0.9, 0.95), 0, 1, below=True)
    epsilon: float = number_field(1e-8, 1e-20, 1)
    weight_decay: float = number_field(0.1, 0, 1e3)
    gradient_clipping: float = number_field(1.0, 1e-6, 1e9, or_zero=True)


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
        recompute: `block` keeps only the inputs of blocks and computes the rest again in the backward pass;
            `attention` does so with attention alone.
        recompute_passes: recompute in the first so many passes only; in all of them unless given.
        eval_interval: optimiser steps between validations; 0 for none.
        eval_samples: validation sequences, at most what the split holds.
        time_limit: minutes or H:MM:SS from the start on, before whose end the run saves and stops by itself; under
            SLURM the end of the job counts as well.
        allow_memory_overcommit: start although the expected peak of a rank is more than three times its memory.
    """

    run_dir: str = path_field("runs/default")
    steps: int = number_field(50_000, 1, STEPS)
    global_batch_size: int = number_field(256, 1, 2**30)
    micro_batch_size: int = number_field(8, 1, 2**20)
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = number_field(1234, 0, 2**63 - 1)
    recompute: RecomputeKind = "none"
    recompute_passes: int | None = number_field(None, 1, 1000)
    eval_interval: int = number_field(1000, 0, STEPS)
    eval_samples: int = number_field(512, 0, STEPS)
    time_limit: str | int | None = number_field(None, 1, 10**6)
    step_timeout: int = number_field(600, 0, SECONDS)
    skipped_steps_budget: int = number_field(10, 0, STEPS)
    skipped_steps_window: int = number_field(1000, 1, 10**6)
    allow_memory_overcommit: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming.

    Attributes:
        interval: optimiser steps between checkpoints; one is always written at the end.
        keep: newest checkpoints that are kept.
        resume: `none` starts anew, `auto` goes on from the run folder's latest checkpoint if there is one, anything
            else is the folder of a checkpoint to go on from.
        initialize_from: run or checkpoint folder whose weights a new run starts from, with a fresh optimiser at step 0.
        allow_data_change: resume although dataset, split, sequence length or seed are not the checkpoint's.
        asynchronous: write while training goes on, at the cost of host memory for one copy of this rank's share.
    """

    interval: int = number_field(1000, 1, STEPS)
    keep: int = number_field(2, 1, 10**6)
    resume: str = path_field("none")
    initialize_from: str | None = path_field(None)
    allow_data_change: bool = False
    asynchronous: bool = False


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes about itself.

    Attributes:
        interval: optimiser steps between plain progress lines, in `train.log` and where there is no terminal for a bar.
        own_losses_interval: optimiser steps between measurements of what each latent step of a routed model predicts by
            itself; 0 = never.
        tensorboard: write TensorBoard events into the run folder.
        wandb_project: also log to this Weights & Biases project (needs the extra `wandb`).
        spike_threshold: say so, with its samples, when a loss lies so many standard deviations above the median of the
            100 before; 0 = never.
        straggler_interval: optimiser steps between comparisons of the ranks' times; 0 = never.
        straggler_factor: a rank is reported that takes this many times the median.
    """

    interval: int = number_field(10, 1, STEPS)
    own_losses_interval: int = number_field(100, 0, STEPS)
    tensorboard: bool = True
    wandb_project: str | None = None
    spike_threshold: float = number_field(10.0, 0, 1e6)
    straggler_interval: int = number_field(100, 0, STEPS)
    straggler_factor: float = number_field(1.3, 1, 1e6, above=True)


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


ARCHITECTURE = ("model", "ponder")


def architecture(config: Config) -> dict[str, Any]:
    """Values, by dotted keys, of all that a checkpoint has been trained with and cannot be used without."""
    return {
        f"{section}.{item.name}": getattr(getattr(config, section), item.name)
        for section in ARCHITECTURE
        for item in fields(getattr(config, section))
        if not is_changeable(item)
    }


def resolve(config: Config) -> Config:
    """Fill in the fields that are derived from others. Idempotent."""
    model, ponder = config.model, config.ponder
    features = {name: usual for name, usual in FAMILIES[model.family].items() if getattr(model, name) is None}
    model = replace(model, **features)
    if model.ffn_hidden_size is None:
        gated = math.ceil(8 * model.hidden_size / 3 / 16) * 16
        ffn = gated if model.gated_ffn else 4 * model.hidden_size
        model = replace(model, ffn_hidden_size=ffn)
    if model.num_kv_heads is None:
        model = replace(model, num_kv_heads=model.num_heads)
    if model.max_position_embeddings is None:
        model = replace(model, max_position_embeddings=config.data.sequence_length)
    if ponder.embedding_scale is None:
        scale = 1.0 if ponder.mode == "vanilla" else math.sqrt(2.5 * model.hidden_size)
        ponder = replace(ponder, embedding_scale=scale)
    return replace(config, model=model, ponder=ponder)
