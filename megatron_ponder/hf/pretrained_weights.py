"""Weights of a Hugging Face folder under PonderLM's names, each of which is read when it is asked for."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.config import Config, read_config
from megatron_ponder.hf.pretrained_config import READERS, settings
from megatron_ponder.hf.weight_files import WeightFiles, read_json, weight_files
from megatron_ponder.hf.weights import Weights
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import ParameterSpec, declarations, initial

# Parts of a model that are initialised as for training where a folder lacks them or has them in other sizes.
_FRESH = ("router.", "pauses.", "latent_scale.")
_EMBEDDING, _HEAD = "embedding.weight", "head.weight"


class PretrainedWeights(Mapping[str, Tensor]):
    """Whole tensors by PonderLM's parameter names, in the types they are stored in.

    Files are mapped into memory: a rank that takes the tensors of its own blocks, and its share of them, has the system
    read no others, and ranks of a node that read the same share one copy of it. Only of GPT-NeoX, which stores queries,
    keys and values of a head together, whole tensors are read where a share is taken. A router or pause embeddings that
    the folder lacks, or has in other sizes, begin as for training, from the seed of the configuration.
    """

    def __init__(self, model_dir: Path, config: Config) -> None:
        """Compare the headers of the files with a configuration, before anything is allocated.

        Args:
            model_dir: folder of a model of a kind in `READERS`, with safetensors.
            config: resolved; of the model as it is to be.

        Raises:
            UserError: if the folder lacks something, or its weights are not of that model.
        """
        theirs = read_json(model_dir / "config.json")
        self._model_dir, self._config = model_dir, config
        self._rename = READERS[theirs["model_type"]].weights
        self._files = WeightFiles(weight_files(model_dir))
        self._sources: dict[str, str] = {}
        described: dict[str, Tensor] = {}
        for source, tensor in self._files.described.items():
            for name, part in self._renamed(source, tensor).items():
                if name in described:
                    raise UserError(f"{model_dir} has {name} as {source} and as {self._sources[name]}; remove one")
                described[name], self._sources[name] = part, source
        given = read_config(settings(theirs))
        self._tie(described, given.model.tie_embeddings)
        # An export whose steps are as it says has every part that it says.
        whole = theirs["model_type"] == "ponderlm" and config.ponder == given.ponder
        try:
            self._fresh = _require_fit(described, config, whole)
        except UserError as error:
            raise UserError(
                f"{model_dir}: {error}; download the model again, with the config.json of its weights"
            ) from None
        self._names = dict.fromkeys([*described, *self._fresh])

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._fresh:
            return initial(name, self._fresh[name], self._config.training.seed)
        source = self._sources[name]
        found = self._renamed(source, self._files.mapped(source))
        return found[name] if name in found else found[_EMBEDDING]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def require_finite(self, name: str, part: Tensor) -> None:
        """Refuse what was taken of a tensor, in fp32, if a value of it is not finite.

        Raises:
            UserError: naming the tensor of the folder and its file.
        """
        if name not in self._fresh:
            self._files.require_finite(self._sources[name], part)

    def require_tied(self) -> None:
        """Refuse a head that is stored beside the embedding that it is said to be, unless it is.

        Raises:
            UserError: it differs.
        """
        if not self._config.model.tie_embeddings or _HEAD not in self._sources:
            return
        embedding, head = (self._files.mapped(self._sources[name]) for name in (_EMBEDDING, _HEAD))
        if not torch.equal(embedding, head):
            raise UserError(
                f"{self._model_dir} has an output head of its own, but tie_word_embeddings in config.json says that it "
                "is the embedding; correct config.json, or remove the head from the weights"
            )

    def _renamed(self, source: str, tensor: Tensor) -> Weights:
        return self._rename({source: tensor}, self._config.model.num_heads)

    def _tie(self, described: dict[str, Tensor], tied: bool) -> None:
        """Let the head of a tied model that is to have its own begin as a copy of the embedding."""
        if tied and not self._config.model.tie_embeddings and _HEAD not in described and _EMBEDDING in described:
            described[_HEAD], self._sources[_HEAD] = described[_EMBEDDING], self._sources[_EMBEDDING]


def _require_fit(described: dict[str, Tensor], config: Config, whole: bool) -> dict[str, ParameterSpec]:
    """Refuse sizes that are not those of the tensors, without allocating anything.

    Args:
        described: tensors on the `meta` device by PonderLM's parameter names, of which those are taken out that the
            model does not have, or has in other sizes and makes anew.
        config: resolved.
        whole: router and pause embeddings must be among them, in their sizes.

    Returns:
        What is to be made anew.
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
        described.pop(_HEAD, None)
    declared = {name: (parameter.detach(), spec) for name, parameter, spec, _ in declarations(model)}
    fresh: dict[str, ParameterSpec] = {}
    for part in () if whole else _FRESH:
        wanted = {name: spec for name, (_, spec) in declared.items() if name.startswith(part)}
        there = {name: tuple(tensor.shape) for name, tensor in described.items() if name.startswith(part)}
        if there != {name: spec.shape for name, spec in wanted.items()}:
            fresh |= wanted
            for name in there:
                del described[name]
    load_weights(model, described | {name: declared[name][0] for name in fresh})
    return fresh
