"""The model of a run with the weights that it begins with: from the seed, a checkpoint, or a Hugging Face folder."""

from pathlib import Path
from typing import Any

from megatron_ponder.checkpoint.folders import is_hugging_face
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors, read_config_of
from megatron_ponder.config import Config, architecture, read_config
from megatron_ponder.hf.pretrained import implied
from megatron_ponder.hf.pretrained_weights import PretrainedWeights
from megatron_ponder.hf.starting_point import fixed_by, require_same
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import declarations, initialize
from megatron_ponder.training.setup import RunParts


def build_model(config: Config, parts: RunParts, mesh: Mesh, source: Path | None) -> PonderLM:
    """Build this rank's part of the model in fp32, with the weights that it begins with.

    Args:
        config: resolved, with a vocabulary size.
        parts: of the run.
        mesh: the ranks.
        source: a verified checkpoint or a Hugging Face folder whose weights to take; None for those from the seed.

    Raises:
        UserError: if the source is of another model, or damaged.
    """
    model = build_part(config, mesh, parts.eod_id)
    if source is None:
        initialize(model, config.training.seed)
    elif is_hugging_face(source):
        _load_pretrained(model, config, source, first=mesh.model.rank == mesh.copies.rank == 0)
    else:
        require_same(_settings(config), architecture(read_config_of(source)), source)
        with open_tensors(source, verified=True) as tensors:
            load_weights(model, tensors.of_kind(WEIGHT))
    return model


def _load_pretrained(model: PonderLM, config: Config, folder: Path, first: bool) -> None:
    ours = _settings(config)
    require_same(ours, fixed_by(read_config(implied(folder)), ours), folder)
    weights = PretrainedWeights(folder, config)
    if first:
        weights.require_tied()
    load_weights(model, weights)
    for name, parameter, *_ in declarations(model):
        weights.require_finite(name, parameter.detach())


def _settings(config: Config) -> dict[str, Any]:
    return architecture(config) | {"checkpoint.allow_rope_change": config.checkpoint.allow_rope_change}


def said_of(folder: Path, config: Config) -> str:
    """What a Hugging Face folder says, in words: its keys, with the values that the run has."""
    sections = {section: vars(values) for section, values in vars(config).items()}
    keys = [name.removeprefix("--").split(".") for name in implied(folder)[::2]]
    return ", ".join(f"{section}.{name} {sections[section][name]}" for section, name in keys)
