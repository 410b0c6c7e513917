"""Comparison of a checkpoint with the whole state of the model that its configuration describes."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_ponder.base.counts import first_of
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
    with torch.device("meta"):  # shapes alone, without memory for the values
        specs = [(name, spec) for name, _, spec, _ in declarations(PonderLM(config.model, config.ponder))]
    alone = holds_weights_alone(manifest)
    return {
        f"{kind}/{name}": spec.shape
        for name, spec in specs
        for kind in ((WEIGHT,) if alone else kinds(config.optimizer, spec.matrix))
    }


def holds_weights_alone(manifest: Manifest) -> bool:
    """Whether a checkpoint is to hold nothing that an optimiser remembers, because it was converted."""
    return manifest.state.step == 0 and all(key.startswith(f"{WEIGHT}/") for key in manifest.tensors)


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
            f"{folder} and its own configuration differ in {first_of(different, 'tensor')}; use another checkpoint"
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
