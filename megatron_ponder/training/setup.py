"""The parts of a run, checked against each other before anything is written: tokenizer, data, model."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors, read_config_of
from megatron_ponder.config import Config, DataConfig
from megatron_ponder.config.sections import architecture_changes, turns_positions
from megatron_ponder.data.dataset_manifest import DatasetManifest, check_vocabulary, read_dataset_manifest
from megatron_ponder.data.mixture import Samples, open_mixture, prefixes, validation_sets
from megatron_ponder.data.splits import split_text
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize


@dataclass
class RunParts:
    """Everything that a run needs besides its configuration.

    Attributes:
        datasets: by split: train, valid, test; a split without weight is absent.
        data_fingerprint: of everything that decides which training sample comes when.
        tokenizer: None if none is configured.
        tokenizer_path: of that.
        eod_id: end-of-document token; None if unknown.
    """

    datasets: dict[str, Samples]
    data_fingerprint: str
    tokenizer: Tokenizer | None
    tokenizer_path: Path | None
    eod_id: int | None

    @property
    def fingerprints(self) -> tuple[str, str | None]:
        """Fingerprints of the data and of the tokenizer."""
        return self.data_fingerprint, None if self.tokenizer is None else self.tokenizer.fingerprint


def open_parts(config: Config) -> tuple[Config, RunParts]:
    """Open tokenizer and data, fill in the vocabulary size, and refuse what does not fit together.

    Raises:
        UserError: for a missing or damaged dataset, a tokenizer that is not the dataset's, ids beyond the vocabulary.
    """
    if not config.data.path:
        raise UserError("data.path is empty; give the prefix that ponder preprocess wrote (without .bin)")
    tokenizer_path = Path(config.tokenizer.path) if config.tokenizer.path else None
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    mixture = open_mixture(config.data, config.training.seed)
    if "train" not in mixture.samples:
        weights = split_text(config.data.split)
        raise UserError(f'data.split "{weights}" leaves nothing to train on; give its first part a weight')
    if config.training.eval_at_start and not validation_sets(mixture.samples, config.data):
        raise UserError(
            "training.eval_at_start is true, but there is nothing to validate on; give data.split a second weight, or "
            "name sets in data.validation"
        )
    manifest = _common_manifest(config.data, tokenizer)
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        known = tokenizer or manifest
        if known is None:
            raise UserError("model.vocab_size is not given and there is no tokenizer to take it from; set one of them")
        vocab_size = known.vocab_size
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; leave "
            "model.vocab_size out to take the tokenizer's"
        )
    for prefix in prefixes(config.data):
        check_vocabulary(prefix, vocab_size)
    eod_id = next((known.eod_id for known in (tokenizer, manifest) if known is not None), None)
    if config.data.reset_at_eod and eod_id is None:
        raise UserError("data.reset_at_eod needs to know the end-of-document token; set tokenizer.path")
    return config, RunParts(mixture.samples, mixture.fingerprint, tokenizer, tokenizer_path, eod_id)


def _common_manifest(data: DataConfig, tokenizer: Tokenizer | None) -> DatasetManifest | None:
    """Read what the manifests of all datasets say about their tokenizer; None if none has one.

    Raises:
        UserError: they were made with different tokenizers, or with another one than that of the run.
    """
    known = {prefix: manifest for prefix in prefixes(data) if (manifest := read_dataset_manifest(prefix)) is not None}
    for prefix, manifest in known.items():
        if tokenizer is not None and manifest.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{prefix} was made with another tokenizer than {tokenizer.path}; set tokenizer.path to "
                "the one it was made with, or preprocess the data again"
            )
    first = next(iter(known), None)
    for prefix, manifest in known.items():
        if manifest.tokenizer != known[first].tokenizer:
            raise UserError(f"{prefix} was made with another tokenizer than {first}; preprocess both with the same one")
    return known.get(first)


def build_model(config: Config, parts: RunParts, mesh: Mesh, source: Path | None) -> PonderLM:
    """Build this rank's part of the model in fp32, with initial weights from the seed or those of a checkpoint.

    Args:
        config: resolved, with a vocabulary size.
        parts: of the run.
        mesh: the ranks.
        source: a verified checkpoint whose weights to take; None for none.

    Raises:
        UserError: if the checkpoint is of another model.
    """
    model = build_part(config, mesh, parts.eod_id)
    if source is None:
        initialize(model, config.training.seed)
        return model
    _check_same_model(config, read_config_of(source), source)
    with open_tensors(source, verified=True) as tensors:
        load_weights(model, tensors.of_kind(WEIGHT))
    return model


def _check_same_model(config: Config, stored: Config, source: Path) -> None:
    """Name the first setting in which a checkpoint's model differs; shapes alone would not tell all of them."""
    for key, (trained, ours) in architecture_changes(config, stored).items():
        if turns_positions(key) and config.checkpoint.allow_rope_change:
            continue
        other = ", or add --checkpoint.allow_rope_change true to train it for other positions"
        raise UserError(
            f"{key} is {ours}, but {source} was trained with {trained}; set --{key} {trained}"
            f"{other if turns_positions(key) else ''}"
        )
