"""The sections about a run: its optimiser, its loop, what it saves and what it says."""

from dataclasses import MISSING, dataclass, field
from typing import Literal

from megatron_ponder.config.data import BlendPart, DataConfig
from megatron_ponder.config.declarations import SECONDS, STEPS, like, number_field, path_field
from megatron_ponder.config.model import ModelConfig, RopeScaling

ScheduleKind = Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"]
DecayShape = Literal["linear", "1-sqrt", "cosine"]
RecomputeKind = Literal["none", "block", "attention"]
OptimizerName = Literal["adamw", "muon"]
MuonScaling = Literal["match_rms_adamw", "original"]
AttentionKernel = Literal["auto", "sdpa", "varlen", "triton", "value_side"]
# Of Muon, after which the singular values of an update are about 1: as many as PyTorch takes.
MUON_ITERATIONS = 5

# Shares in the optimiser's section, each with the number that may be given in its place.
IN_PLACE = {"warmup_fraction": "warmup_steps", "min_learning_rate_fraction": "min_learning_rate"}


@dataclass(frozen=True)
class OptimizerConfig:
    """What updates the weights, and its schedule."""

    name: OptimizerName = "adamw"
    """`muon` updates the matrices of blocks by [Muon](training.md#optimisers), and everything else by AdamW."""
    learning_rate: float = number_field(3e-4, 1e-30, 1e30)
    """Peak of the learning rate."""
    schedule: ScheduleKind = "cosine"
    """How the learning rate [goes on](training.md#the-learning-rate) from its peak: `cosine` and `linear` fall to the
    lowest at the end of the run, `wsd` falls in the last `decay_steps` alone, `constant` stays, `inverse_sqrt` falls
    with the root of the step."""
    warmup_fraction: float | None = number_field(0.02, 0, 1, below=True)
    """Share of the steps spent on the linear warm-up."""
    warmup_steps: int | None = number_field(None, 0, STEPS)
    """Optimiser steps of it, in place of `warmup_fraction`."""
    min_learning_rate_fraction: float | None = number_field(0.1, 0, 1)
    """Lowest learning rate after the warm-up, as a share of the peak."""
    min_learning_rate: float | None = number_field(None, 0, 1e30)
    """That rate itself, in place of `min_learning_rate_fraction`."""
    decay_steps: int | None = number_field(None, 0, STEPS)
    """With `wsd`, optimiser steps at the end of the run in which the learning rate falls; 0 for none."""
    decay_shape: DecayShape | None = None
    """With `wsd`, how it falls: `linear`, by `1-sqrt` of the share of the decay that is done, or as half a `cosine`;
    `linear` unless given."""
    router_learning_rate_factor: float = number_field(1.0, 0, 1000)
    """Factor on the learning rate of the router's weights; unused without a router, so that one configuration serves
    every mode."""
    betas: tuple[float, float] = number_field((0.9, 0.95), 0, 1, below=True)
    """Decay rates of the two moments."""
    epsilon: float = number_field(1e-8, 1e-20, 1)
    """Added to the root of the second moment."""
    weight_decay: float = number_field(0.1, 0, 1e3)
    """Decoupled decay of matrices and embeddings; norms and biases have none."""
    muon_momentum: float = number_field(0.95, 0, 1, below=True)
    """Decay rate of Muon's average of gradients."""
    muon_scaling: MuonScaling = "match_rms_adamw"
    """Factor on Muon's updates. `match_rms_adamw`: 0.2 √max(rows, columns), with which their numbers are as large as
    those of AdamW, whose learning rate and weight decay then fit; `original`: √max(1, rows / columns)."""
    muon_learning_rate: float | None = number_field(None, 1e-30, 1e30)
    """Peak of the learning rate of Muon's matrices, on the same schedule; `learning_rate` unless given."""
    gradient_clipping: float = number_field(1.0, 1e-6, 1e9, or_zero=True)
    """Largest global gradient norm; 0 turns clipping off."""

    def warmup(self, steps: int) -> int:
        """Optimiser steps of the warm-up of a run of so many."""
        return round(self.warmup_fraction * steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def lowest_share(self) -> float:
        """Lowest learning rate after the warm-up, as a share of the peak."""
        if self.min_learning_rate is None:
            return self.min_learning_rate_fraction
        return self.min_learning_rate / self.learning_rate


@dataclass(frozen=True)
class BatchRampConfig:
    """A global batch that grows until it has its size."""

    start: int = number_field(MISSING, 1, 2**30)
    """Sequences of the first optimiser steps."""
    increment: int = number_field(MISSING, 1, 2**30)
    """Sequences that are added each time."""
    samples: int = number_field(MISSING, 1, STEPS)
    """Samples of the run over which it grows; every size but the last has an equal part of them."""


@dataclass(frozen=True)
class TrainingConfig:
    """The loop."""

    run_dir: str = path_field("runs/default")
    """The run's folder."""
    steps: int = number_field(50_000, 1, STEPS)
    """Optimiser steps."""
    global_batch_size: int = number_field(256, 1, 2**30)
    """Sequences of one optimiser step, over all ranks."""
    batch_size_ramp: BatchRampConfig | None = None
    """`{start, increment, samples}`, by which the global batch [grows](training.md#a-batch-that-grows) to
    `global_batch_size`; it has that from the beginning unless given."""
    micro_batch_size: int = number_field(8, 1, 2**20)
    """Sequences of one forward pass on one rank; the rest is gradient accumulation."""
    phases: "list[TrainingPhaseConfig]" = field(default_factory=list)
    """List of `{first_step, KEY: VALUE, ...}`: what is otherwise from an optimiser step on, such as longer sequences,
    other data and positions, see [training.md](training.md#phases)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of activations and of the weights that compute; master weights and moments are always fp32."""
    seed: int = number_field(1234, 0, 2**63 - 1)
    """Of initial weights, data order and the drawn number of refinements."""
    deterministic: bool = False
    """On GPUs too, the same run on the same machines gives the same numbers bit for bit, as runs on CPUs always do:
    only algorithms that add up in a fixed order. What that costs has not been measured."""
    recompute: RecomputeKind = "none"
    """`block` keeps only the inputs of blocks and computes the rest again in the backward pass; `attention` does so
    with attention alone."""
    recompute_passes: int | None = number_field(None, 1, 1000)
    """Recompute in the first so many passes only; in all of them unless given."""
    attention_kernel: AttentionKernel = "auto"
    """Which [kernel](performance.md#attention) computes attention: the first that can, or one by name."""
    compile: bool = False
    """Compile blocks with `torch.compile` where they are trained; the first step takes longer by it, see
    [performance.md](performance.md#compiled-blocks)."""
    eval_interval: int = number_field(1000, 0, STEPS)
    """Optimiser steps between validations; 0 for none."""
    eval_samples: int = number_field(512, 0, STEPS)
    """Validation sequences of each set, at most what it holds."""
    exact_samples: int = number_field(16, 0, STEPS)
    """The first so many of these are evaluated by `exact` too when the run ends, as the [model
    decodes](training.md#a-validation-by-exact); 0 for none."""
    eval_at_start: bool | None = None
    """Validate before the first step too; unless given where a run starts from `checkpoint.initialize_from`, whose
    weights it tells about."""
    time_limit: str | int | None = number_field(None, 1, 10**6)
    """Minutes or H:MM:SS from the start on, before whose end the run saves and stops by itself; under SLURM the end of
    the job counts as well, see [resilience.md](resilience.md#preemption)."""
    step_timeout: int = number_field(600, 0, SECONDS)
    """Seconds without the end of a step, or ten times the longest step if that is more, after which a rank shows where
    its threads are and ends; saves do not count, nor what comes before the first step ends; 0 = never."""
    skipped_steps_budget: int = number_field(10, 0, STEPS)
    """Steps of the last `skipped_steps_window` that may be skipped because their loss or gradients are not finite; one
    more ends the run."""
    skipped_steps_window: int = number_field(1000, 1, 10**6)
    """See `skipped_steps_budget`."""
    profile_steps: list[int] | None = number_field(None, 1, STEPS)
    """First and last optimiser step of which a trace is written to `profile/` in the run folder, such as `[10, 13]`;
    see [performance.md](performance.md#a-trace-of-some-steps)."""
    profile_ranks: list[int] | None = number_field(None, 0, 2**20)
    """Ranks that write one; the first alone unless given."""
    allow_memory_overcommit: bool = False
    """Start although the expected peak of a rank is more than three times the memory of its GPU, or of its share of the
    host; from 0.9 times on there is a warning."""


@dataclass(frozen=True)
class TrainingPhaseConfig:
    """What is otherwise from some optimiser step on, by the names that keys have in their sections; None as before."""

    first_step: int = number_field(MISSING, 1, STEPS)
    """Optimiser steps of the run before this phase."""
    path: list[BlendPart] | str | None = like(DataConfig, "path")
    sequence_length: int | None = like(DataConfig, "sequence_length")
    max_position_embeddings: int | None = like(ModelConfig, "max_position_embeddings")
    rope_theta: float | None = like(ModelConfig, "rope_theta")
    rope_scaling: RopeScaling | None = None
    rope_factor: float | None = like(ModelConfig, "rope_factor")
    rope_original_length: int | None = like(ModelConfig, "rope_original_length")
    rope_low_turns: float | None = like(ModelConfig, "rope_low_turns")
    rope_high_turns: float | None = like(ModelConfig, "rope_high_turns")
    rope_attention_factor: float | None = like(ModelConfig, "rope_attention_factor")
    global_batch_size: int | None = like(TrainingConfig, "global_batch_size")
    micro_batch_size: int | None = like(TrainingConfig, "micro_batch_size")
    recompute: RecomputeKind | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = number_field(1000, 1, STEPS)
    """Optimiser steps between checkpoints; one is always written at the end."""
    keep: int = number_field(2, 1, 10**6)
    """Newest checkpoints that are kept."""
    keep_every: int = number_field(0, 0, STEPS)
    """Checkpoints of steps that are multiples of this are kept for ever, beside the newest; a multiple of `interval`, 0
    for none."""
    resume: str = path_field("none")
    """`none` starts anew, `auto` goes on from the run folder's latest checkpoint if there is one, anything else is the
    folder of a checkpoint to go on from."""
    initialize_from: str | None = path_field(None)
    """Run, checkpoint, or [folder of a Hugging Face model](huggingface.md#train-from-a-folder) whose weights a new run
    starts from, with a fresh optimiser at step 0; what is left out of `model` and `ponder` is theirs."""
    branch_from: str | None = path_field(None)
    """Run or checkpoint folder that a new run goes on from with all that there is: weights, optimiser, step and place
    in the data; what its own folder holds comes first with `resume: auto`."""
    allow_data_change: bool = False
    """Resume although dataset, split, sequence length or seed are not the checkpoint's."""
    export_hf: Literal["none", "float32", "bfloat16"] = "none"
    """Export every checkpoint for Hugging Face too, into its folder `hf/`, with weights of this type; see
    [training.md](training.md#checkpoints)."""
    allow_rope_change: bool = False
    """Go on from a checkpoint, or from its weights, although `rope_theta`, `rope_scaling` or what belongs to it is not
    the checkpoint's, as models are [trained for longer sequences](training.md#longer-sequences)."""
    asynchronous: bool = False
    """Write while training goes on, at the cost of host memory for one copy of this rank's share."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes about itself."""

    interval: int = number_field(10, 1, STEPS)
    """Optimiser steps between plain progress lines, in `train.log` and where there is no terminal for a bar."""
    own_losses_interval: int = number_field(100, 0, STEPS)
    """Optimiser steps between measurements of what each latent step of a routed model predicts by itself; 0 = never."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""
    spike_threshold: float = number_field(10.0, 0, 1e6)
    """Say so, with its samples, when a loss lies so many standard deviations above the median of the 100 before; 0 =
    never."""
    straggler_interval: int = number_field(100, 0, STEPS)
    """Optimiser steps between comparisons of the ranks' times; 0 = never."""
    straggler_factor: float = number_field(1.3, 1, 1e6, above=True)
    """A rank is reported that takes this many times the median."""


@dataclass(frozen=True)
class TasksConfig:
    """Public tasks during training, by lm-evaluation-harness (the extra `eval`)."""

    names: list[str] = field(default_factory=list)
    """Tasks, groups, or patterns such as `arc_*`, which are [evaluated in the course of the
    run](training.md#tasks); none by default."""
    interval: int = number_field(1000, 1, STEPS)
    """Optimiser steps between evaluations of the tasks, each after a checkpoint; and at the end."""
    path: str | None = path_field(None)
    """Folder with `.yaml` files of tasks of your own."""
    limit: int | None = number_field(None, 1, STEPS)
    """The first so many documents of each task; all unless given."""
    num_fewshot: int | None = number_field(None, 0, 10**6)
    """Solved examples before each question; the task's own number unless given."""
    forward_batch_size: int = number_field(8, 1, 10**6)
    """Sequences in a forward."""
