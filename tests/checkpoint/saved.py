"""Small checkpoints with the whole state of a run, and manifests that are changed afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ponder.base.files import checksum
from megatron_ponder.checkpoint.folders import MANIFEST
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.checkpoint.optimizer_state import kinds
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.writer import staged, write_description
from megatron_ponder.parallel.sharding import declarations
from tests.models import small_config, small_model

FILES = ("tensors-00000-of-00002.safetensors", "tensors-00001-of-00002.safetensors")
WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([0.1, -0.2]), "scalar": torch.tensor(3.0)}
TOKENIZER_FILES = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'}
LAYOUT = {"tensor": 2, "pipeline": 1, "data": 3, "zero_stage": 1, "precision": "bf16"}


def tensors_of_a_run(seed: int = 0, **overrides) -> dict[str, torch.Tensor]:
    """Weights and moments of a small model."""
    model, config = small_model(seed, **overrides).float(), small_config(**overrides)
    return {
        f"{kind}/{name}": parameter.detach().clone()
        for name, parameter, spec, _ in declarations(model)
        for kind in kinds(config.optimizer, spec.matrix)
    }


def save(
    folder: Path, tensors: dict[str, torch.Tensor], step: int = 7, tokenizer: Path | None = None, **overrides
) -> Path:
    """A complete checkpoint of two files, as training writes it."""
    keys = list(tensors)
    parts = dict(zip(FILES, (keys[::2], keys[1::2]), strict=True))
    manifest = Manifest(
        RunState(step, 8 * step, 512 * step),
        "datafingerprint",
        None,
        {k: file for file in parts for k in parts[file]},
        layout=LAYOUT,
    )
    with staged(folder) as aside:
        files = {file: write_tensors(aside, file, {key: tensors[key] for key in part}) for file, part in parts.items()}
        config = small_config(training__precision="bf16", **overrides)
        write_description(aside, replace(manifest, files=files), config, tokenizer)
    return folder


def fields_of(folder: Path) -> dict:
    """What the manifest of a checkpoint says, without its checksum."""
    fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    fields.pop("checksum", None)
    return fields


def put(folder: Path, fields: dict) -> None:
    """Let the manifest say something else, with a checksum that fits, as nothing but intent can."""
    (folder / MANIFEST).write_text(json.dumps(fields | {"checksum": checksum(fields)}), encoding="utf-8")


def put_without_checksum(folder: Path, fields: dict) -> None:
    """Write the manifest as it was written before it had a checksum: the fields, indented, of format 1."""
    (folder / MANIFEST).write_text(json.dumps(fields | {"format": 1}, indent=1), encoding="utf-8")
