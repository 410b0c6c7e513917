"""The state of training as whole fp32 tensors, which belong to no layout: taken out of an engine, and put back."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ParameterSpec, declarations, gathered
from megatron_ponder.training.deepspeed_engine import Engine


@dataclass(frozen=True)
class StateTensor:
    """One whole tensor of the training state.

    Attributes:
        kind: the weight, or what the optimiser remembers.
        name: of the parameter.
        tensor: fp32, on the device of training and perhaps its own memory, until the next one is taken.
    """

    kind: str
    name: str
    tensor: Tensor


def state_of(engine: Engine) -> Iterator[StateTensor]:
    """Weights and moments of this rank's part, one after another, whole, unpadded and in fp32.

    The same on all ranks of a pipeline stage, and a collective of them: every rank must take every item. A tied
    embedding is the first stage's.
    """
    for name, parameter, spec, axis in _own(engine):
        for kind in engine.kinds(parameter):
            yield StateTensor(kind, name, gathered(engine.master(parameter, kind), spec, axis))


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Whole gradients of this rank's part by parameter name, between `forward_backward` and `step`; a collective."""
    return {
        name: gathered(engine.gradient(parameter), spec, axis).clone() for name, parameter, spec, axis in _own(engine)
    }


def _own(engine: Engine) -> Iterator[tuple[str, nn.Parameter, ParameterSpec, Axis]]:
    """Declarations of this rank's part, without what another part has too, and counts there."""
    return (declared for declared in declarations(engine.model) if declared[1] is not engine.model.copied)


def restore(engine: Engine, checkpoint: Path, step: int) -> None:
    """Set master weights and moments from a checkpoint whose weights the module was built with; a collective.

    Args:
        engine: to go on with.
        checkpoint: its folder, verified.
        step: optimiser steps that it has done, without skipped ones, for AdamW's bias correction.
    """
    with open_tensors(checkpoint, verified=True) as tensors:
        for name, parameter, spec, axis in declarations(engine.model):
            for kind in engine.kinds(parameter):
                if kind == WEIGHT and not engine.low_precision:
                    continue
                engine.set_master(parameter, kind, spec.shard(tensors.get(kind, name), axis))
    engine.set_steps(step)
