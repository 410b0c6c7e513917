"""A model ready to use, from a checkpoint folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from megatron_ponder.base.counts import first_of
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors, read_config_of, tokenizer_path
from megatron_ponder.config import Config, even_layers
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations


@dataclass
class LoadedModel:
    """A trained model and what belongs to it.

    Attributes:
        model: in evaluation mode on its device; this rank's part.
        config: resolved, as it was trained.
        tokenizer: None if the checkpoint has none.
        folder: the checkpoint.
    """

    model: PonderLM
    config: Config
    tokenizer: Tokenizer | None
    folder: Path


def load_model(
    path: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32, verified: bool = False
) -> LoadedModel:
    """Load the model of a run folder (its latest checkpoint) or of one checkpoint.

    Args:
        path: the folder.
        mesh: device, tensor and pipeline ranks, of which each loads its own part, whatever layout the model was
            trained in; a single process on the CPU unless given.
        dtype: of the weights.
        verified: the checkpoint's files have been verified already, so that they need not be read twice.

    Raises:
        UserError: if there is no complete, undamaged checkpoint, or its tokenizer does not fit it.
    """
    mesh = mesh or Mesh()
    folder = resolve_checkpoint(path)
    with open_tensors(folder, verified) as tensors:  # first, because it verifies every file
        config = read_config_of(folder)
        source = tokenizer_path(folder)
        tokenizer = None if source is None else load_tokenizer(source)
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, but the model "
                f"{config.model.vocab_size}; put back the tokenizer that the model was trained with"
            )
        eod_id = tokenizer.eod_id if config.data.reset_at_eod and tokenizer is not None else None
        part = even_part(config.model.num_layers, mesh.pipeline)
        model = PonderLM(config.model, config.ponder, mesh, eod_id, part, inference=config.inference)
        load_weights(model, tensors.of_kind(WEIGHT))
    return LoadedModel(model.to(mesh.device, dtype).eval(), config, tokenizer, folder)


def even_part(num_layers: int, axis: Axis) -> ModelPart:
    """The part that this rank holds of a stack of layers that is spread evenly over the pipeline ranks."""
    ends = list(accumulate(even_layers(num_layers, axis.size), initial=0))
    layers = range(ends[axis.rank], ends[axis.rank + 1])
    return ModelPart(layers, first=axis.rank == 0, last=axis.rank == axis.size - 1)


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
        raise UserError(f"the weights and the model differ in {first_of(different, 'tensor')}")
    for name, (parameter, spec, axis) in expected.items():
        whole = weights[name]
        if tuple(whole.shape) != spec.shape:
            raise UserError(f"{name} has shape {tuple(whole.shape)}, but the configuration says {spec.shape}")
        parameter.copy_(spec.shard(whole, axis))
