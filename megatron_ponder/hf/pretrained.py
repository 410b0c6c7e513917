"""Import of Hugging Face folders: plain llama and gpt_neox models, and our own exports."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.config import Config, read_config
from megatron_ponder.errors import UserError
from megatron_ponder.hf.pretrained_config import settings
from megatron_ponder.hf.weights import from_export, from_gpt_neox, from_llama
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import initialize


def import_pretrained(model_dir: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Tensor], Config]:
    """A Hugging Face model as PonderLM's weights and configuration.

    A plain model gets embedding scale 1, so that without additional steps it computes what it computed before. A router
    or pause embeddings that the folder lacks, or has in other sizes, are initialised as for training.

    Args:
        model_dir: folder of a `LlamaForCausalLM`, a `GPTNeoXForCausalLM` or an export, with safetensors.
        overrides: `--section.key value ...` as on the command line, for instance `--ponder.mode fixed`.

    Returns:
        Whole fp32 tensors by PonderLM's parameter names, and the resolved configuration.

    Raises:
        UserError: if the folder lacks something or the model has a feature that PonderLM does not have.
    """
    theirs = read_json(model_dir / "config.json")
    config = read_config([*settings(theirs), *overrides])
    weights = read_safetensors(model_dir)
    if theirs["model_type"] == "gpt_neox":
        weights = from_gpt_neox(weights, config.model.num_heads)
    else:
        weights = (from_llama if theirs["model_type"] == "llama" else from_export)(weights)
    if config.model.tie_embeddings:
        weights.pop("head.weight", None)
    model = PonderLM(config.model, config.ponder)
    initialize(model, config.training.seed)
    for part in ("router.", "pauses."):
        fresh = {name: tensor.detach() for name, tensor in model.named_parameters() if name.startswith(part)}
        trained = {name: tensor for name, tensor in weights.items() if name.startswith(part)}
        if _shapes(fresh) != _shapes(trained):
            weights = {name: tensor for name, tensor in weights.items() if name not in trained} | fresh
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    load_weights(model, weights)
    return weights, config


def tokenizer_of(model_dir: Path) -> Path | None:
    """The folder, if it holds a tokenizer that this package reads; else None."""
    return model_dir if any((model_dir / f"tokenizer.{ending}").is_file() for ending in ("model", "json")) else None


def read_json(path: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        UserError: if there is none.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; give the folder of a downloaded Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return content


def read_safetensors(model_dir: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Raises:
        UserError: if there are none, or a file is missing or damaged.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
    elif (model_dir / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif any(model_dir.glob("*.bin")):
        raise UserError(
            f"{model_dir} has its weights in pickled .bin files, and loads never execute pickled code; load it with "
            "transformers where you trust it and save it again, which writes safetensors"
        )
    else:
        raise UserError(f"{model_dir} has no model.safetensors; give the folder of a downloaded Hugging Face model")
    tensors: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name or not (model_dir / name).is_file():
            raise UserError(f"{index} names {name}, which is not in {model_dir}; download the model again")
        try:
            tensors |= load_file(model_dir / name)
        except SafetensorError as error:
            raise UserError(f"{model_dir / name} is damaged ({error}); download it again") from None
    return tensors


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
