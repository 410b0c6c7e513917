"""Import of Hugging Face folders: plain llama and gpt_neox models, PonderLM-2 checkpoints, and our own exports."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.config import Config, read_config
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.hf.pretrained_config import READERS, settings
from megatron_ponder.hf.weight_files import describe, read, read_json, weight_files
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import initialize

# Parts of a model that are initialised as for training where a folder lacks them or has them in other sizes.
_FRESH = ("router.", "pauses.")


def import_pretrained(model_dir: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Tensor], Config]:
    """A Hugging Face model as PonderLM's weights and configuration.

    A plain model gets embedding scale 1, so that without latent steps it computes what it computed before; a
    PonderLM-2 checkpoint the mode, K, R and scale that it was trained with. A router or pause embeddings that the
    folder lacks, or has in other sizes, are initialised as for training. Sizes are compared with the files' headers
    before anything is allocated.

    Args:
        model_dir: folder of a `LlamaForCausalLM`, a `GPTNeoXForCausalLM` or an export, with safetensors.
        overrides: `--section.key value ...` as on the command line, for instance `--ponder.mode fixed`.

    Returns:
        Whole fp32 tensors by PonderLM's parameter names, and the resolved configuration.

    Raises:
        UserError: if the folder lacks something or the model has a feature that PonderLM does not have.
    """
    theirs = read_json(model_dir / "config.json")
    own = settings(theirs)
    config = read_config([*own, *overrides])
    files = weight_files(model_dir)
    given, num_heads = read_config(own), config.model.num_heads
    parted = given.model.tie_embeddings and not config.model.tie_embeddings
    renamed = lambda tensors: _named(READERS[theirs["model_type"]].weights(tensors, num_heads), parted)
    described = renamed(describe(files))
    # An export whose steps are as it says has every part that it says.
    whole = theirs["model_type"] == "ponderlm" and config.ponder == given.ponder
    _require_fit(described, config, whole)
    weights = renamed(read(files))
    if config.model.tie_embeddings and not torch.equal(
        weights.pop("head.weight", weights["embedding.weight"]), weights["embedding.weight"]
    ):
        raise UserError(
            f"{model_dir} has an output head of its own, but tie_word_embeddings in config.json says that it is the "
            "embedding; correct config.json, or remove the head from the weights"
        )
    model = PonderLM(config.model, config.ponder)
    initialize(model, config.training.seed)
    weights = {name: tensor.contiguous() for name, tensor in _completed(weights, model).items()}
    load_weights(model, weights)
    return weights, config


def tokenizer_of(model_dir: Path, config: Config) -> Path | None:
    """The folder, if it holds a tokenizer that fits the model; None if it holds none.

    Raises:
        UserError: if it holds one that cannot be read, or has more tokens than the model.
    """
    if not any((model_dir / f"tokenizer.{ending}").is_file() for ending in ("model", "json")):
        return None
    tokenizer = load_tokenizer(model_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model {config.model.vocab_size}; put the "
            "model's own tokenizer there, or move this one away to convert without"
        )
    return model_dir


def _named(weights: dict[str, Tensor], parted: bool) -> dict[str, Tensor]:
    """The weights; of a tied model that is `parted` from its embedding, with a head that begins as a copy of it."""
    if not parted or "embedding.weight" not in weights:
        return weights
    return {"head.weight": weights["embedding.weight"].clone()} | weights


def _require_fit(described: dict[str, Tensor], config: Config, whole: bool) -> None:
    """Refuse sizes that are not those of the tensors, without allocating anything.

    Args:
        described: tensors on the `meta` device by PonderLM's parameter names.
        config: resolved.
        whole: router and pause embeddings must be among them, in their sizes.
    """
    layers = len({name.split(".")[2] for name in described if name.startswith("transformer.blocks.")})
    if layers != config.model.num_layers:
        raise UserError(f"config.json says {config.model.num_layers} layers, but the weights have {layers}")
    sizes = {size for tensor in described.values() for size in tensor.shape}
    for name in ("vocab_size", "hidden_size", "ffn_hidden_size"):
        size = getattr(config.model, name)
        if size not in sizes:
            raise UserError(f"model.{name} is {size} by config.json, but no tensor of the weights has that size")
    with torch.device("meta"):
        model = PonderLM(config.model, config.ponder)
    if config.model.tie_embeddings:
        described = {name: tensor for name, tensor in described.items() if name != "head.weight"}
    load_weights(model, described if whole else _completed(described, model))


def _completed(weights: dict[str, Tensor], model: PonderLM) -> dict[str, Tensor]:
    """The weights, with the model's own router and pause embeddings where theirs are missing or of other sizes."""
    for part in _FRESH:
        fresh = {name: tensor.detach() for name, tensor in model.named_parameters() if name.startswith(part)}
        trained = {name: tensor for name, tensor in weights.items() if name.startswith(part)}
        if _shapes(fresh) != _shapes(trained):
            weights = {name: tensor for name, tensor in weights.items() if name not in trained} | fresh
    return weights


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
