"""A model ready to use, from a checkpoint folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ponder.checkpoint.store import WEIGHT, open_tensors, read_config_of, resolve_checkpoint, tokenizer_path
from megatron_ponder.config import Config
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.errors import UserError
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations


@dataclass
class LoadedModel:
    """A trained model and what belongs to it.

    Attributes:
        model: in evaluation mode on its device.
        config: resolved, as it was trained.
        tokenizer: None if the checkpoint has none.
        folder: the checkpoint.
    """

    model: PonderLM
    config: Config
    tokenizer: Tokenizer | None
    folder: Path


def load_model(path: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the model of a run folder (its latest checkpoint) or of one checkpoint.

    Args:
        path: the folder.
        mesh: device and tensor ranks; a single process on the CPU unless given.
        dtype: of the weights.

    Raises:
        UserError: if there is no complete, undamaged checkpoint, or its tokenizer does not fit it.
    """
    mesh = mesh or Mesh()
    folder = resolve_checkpoint(path)
    with open_tensors(folder) as tensors:  # first, because it verifies every file
        config = read_config_of(folder)
        source = tokenizer_path(folder)
        tokenizer = None if source is None else load_tokenizer(source)
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, but the model "
                f"{config.model.vocab_size}; put back the tokenizer that the model was trained with"
            )
        eod_id = tokenizer.eod_id if config.data.reset_at_eod and tokenizer is not None else None
        model = PonderLM(config.model, config.ponder, mesh, eod_id)
        load_weights(model, tensors.of_kind(WEIGHT))
    return LoadedModel(model.to(mesh.device, dtype).eval(), config, tokenizer, folder)


@torch.no_grad()
def load_weights(model: PonderLM, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors into this rank's parts of a model.

    A pipeline rank holds a part of the model, and takes the tensors of its own parameters alone.

    Args:
        model: on this rank.
        weights: whole tensors by parameter name; `TensorReader.of_kind` reads each when it is asked for.

    Raises:
        UserError: if a parameter is missing or of another shape, or, in a whole model, a tensor is left over.
    """
    expected = {name: (parameter, spec, axis) for name, parameter, spec, axis in declarations(model)}
    different = expected.keys() ^ weights.keys() if model.part.is_whole else expected.keys() - weights.keys()
    if different:
        raise UserError(
            f"the checkpoint and the model differ in {min(different)} and {len(different) - 1} more tensors"
        )
    for name, (parameter, spec, axis) in expected.items():
        whole = weights[name]
        if tuple(whole.shape) != spec.shape:
            raise UserError(f"{name} has shape {tuple(whole.shape)}, but the configuration says {spec.shape}")
        parameter.copy_(spec.shard(whole, axis))
