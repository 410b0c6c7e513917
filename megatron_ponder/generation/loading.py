"""A generator from a checkpoint folder, on the ranks of a job: first checked by one of them, then loaded by all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_ponder.base.launch import Launch
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import read_config_of, tokenizer_path, verify
from megatron_ponder.config import Config
from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.ranks import build_ranks, check_sizes
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.scheduler import Scheduler
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.exits import Exit
from megatron_ponder.model.router import Rule, rule_of
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What a user wants of a generator.

    Attributes:
        checkpoint: run folder or checkpoint folder.
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        threshold: τ; the trained model's unless given.
        router_bias: α, of which a positive one buys more steps; the trained model's unless given.
        confidence_exit: of a model of mode `fixed`: a token's steps end where its prediction has fewer than X nats, by
            `entropy:X`, or where the likeliest next token leads by a probability of X, by `margin:X`; none end unless
            given.
        precision: of the computation; that of training on a GPU, and fp32 on a CPU, unless given.
        batching: how many at a time, and how prompts are read.
    """

    checkpoint: Path
    tensor: int = number_field(1, 1, 1 << 16)
    pipeline: int = number_field(1, 1, 1 << 16)
    threshold: float | None = number_field(None, 0, 1)
    router_bias: float | None = number_field(None, -1000, 1000)
    confidence_exit: str | None = None
    precision: Literal["fp32", "bf16"] | None = None
    batching: Batching = field(default_factory=Batching)

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def exit(self) -> Exit | None:
        """What `confidence_exit` says.

        Raises:
            UserError: it is none.
        """
        return None if self.confidence_exit is None else Exit.read(self.confidence_exit)


@dataclass(frozen=True)
class CheckedSetup:
    """A setup that can work, with all that was left open in it.

    Attributes:
        setup: as it was wanted.
        folder: the checkpoint, whose files are undamaged.
        config: of the model.
        rule: τ, α and the exit.
        precision: a name of `PRECISIONS`.
    """

    setup: Setup
    folder: Path
    config: Config
    rule: Rule
    precision: str

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's; None if it has none."""
        source = tokenizer_path(self.folder)
        return None if source is None else load_tokenizer(source)

    def request_check(self, tokenizer: Tokenizer | None) -> Callable[[Request], None]:
        """What refuses requests that the generator could never run, before there is a generator."""
        return Scheduler(self.config.model, self.config.ponder, self.setup.batching, tokenizer).check


def check_setup(setup: Setup, launch: Launch, device: torch.device, copies: bool) -> CheckedSetup:
    """Find the checkpoint, verify its files, and refuse ranks and numbers that cannot be; on one rank for all.

    Args:
        setup: wanted.
        launch: the ranks.
        device: on which they compute.
        copies: whether ranks beyond one copy of the model are welcome.

    Raises:
        UserError: what is wrong.
    """
    folder = resolve_checkpoint(setup.checkpoint)
    verify(folder, read_manifest(folder))
    config = read_config_of(folder)
    check_sizes(config.model, setup.tensor, setup.pipeline, launch.world_size, copies)
    if setup.exit is not None:
        setup.exit.check(config.ponder)
    rule = rule_of(config.inference, "hard", setup.threshold, setup.router_bias, setup.exit)
    precision = setup.precision or (config.training.precision if device.type == "cuda" else "fp32")
    return CheckedSetup(setup, folder, config, rule, precision)


def load_generator(checked: CheckedSetup, launch: Launch, device: torch.device) -> tuple[Generator, LoadedModel, Mesh]:
    """Load this rank's part of the model; on all ranks together.

    Args:
        checked: the setup.
        launch: the ranks.
        device: of this one.

    Returns:
        The generator, the model, and the grid of ranks.

    Raises:
        UserError: some rank cannot read the checkpoint; on every rank.
    """
    mesh = build_ranks(device, launch, checked.setup.tensor, checked.setup.pipeline)
    loaded = together(lambda: load_model(checked.folder, mesh, PRECISIONS[checked.precision], verified=True))
    return Generator(loaded.model, mesh, checked.rule, checked.setup.batching, loaded.tokenizer), loaded, mesh
