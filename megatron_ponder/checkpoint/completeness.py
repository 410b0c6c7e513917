"""Comparison of a checkpoint with the whole state of the model that its configuration describes."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.finite import require_finite
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.checkpoint.optimizer_state import WEIGHT, kinds
from megatron_ponder.checkpoint.reader import read_config_of
from megatron_ponder.config import Config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import declarations


def expected_tensors(manifest: Manifest, config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint should hold, by `kind/parameter name` in the model's order.

    One that was converted has weights alone, one that a run has written moments as well.
    """
    held = kinds_of(manifest, kinds(config.optimizer))
    with torch.device("meta"):  # shapes alone, without memory for the values
        shapes = [(name, spec.shape) for name, _, spec, _ in declarations(PonderLM(config.model, config.ponder))]
    return {f"{kind}/{name}": shape for name, shape in shapes for kind in held}


def kinds_of(manifest: Manifest, in_training: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of tensors that a checkpoint should hold of every parameter.

    Args:
        manifest: of the checkpoint.
        in_training: those that a run has.
    """
    weights_only = manifest.state.step == 0 and all(key.startswith(f"{WEIGHT}/") for key in manifest.tensors)
    return (WEIGHT,) if weights_only else in_training


def check_state(folder: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Refuse a verified checkpoint that a run cannot go on from.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        files: those whose values are looked at, all of which must be finite.

    Raises:
        UserError: naming a tensor that is missing or left over, of another shape, or not finite.
    """
    expected = expected_tensors(manifest, read_config_of(folder))
    different = expected.keys() ^ manifest.tensors.keys()
    if different:
        raise UserError(
            f"{folder} and its own configuration differ in {min(different)} and {len(different) - 1} more tensors; "
            "use another checkpoint"
        )
    held = manifest.tensors_by_file()
    for name in held.keys() & set(files):
        with safe_open(folder / name, framework="pt") as file:
            for key in held[name]:
                kind, _, parameter = key.partition("/")
                what, tensor = f"{folder}: the {kind} of {parameter}", file.get_tensor(key)
                if tuple(tensor.shape) != expected[key]:
                    raise UserError(f"{what} has shape {tuple(tensor.shape)} where {expected[key]} belongs")
                require_finite(tensor, what, "use an older checkpoint")
