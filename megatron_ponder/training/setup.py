"""The parts of a run, checked against each other before anything is written: tokenizer, data."""

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import TOKENIZER, is_hugging_face
from megatron_ponder.checkpoint.writer import copy_tokenizer
from megatron_ponder.config import Config, DataConfig
from megatron_ponder.data.dataset_manifest import DatasetManifest, check_vocabulary, read_dataset_manifest
from megatron_ponder.data.mixture import Mixture, Samples, open_mixture, prefixes, validation_sets
from megatron_ponder.data.splits import split_text
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.hf.latent_scale import is_wanted
from megatron_ponder.hf.pretrained import measured, require_own_tokenizer


@dataclass
class RunParts:
    """Everything that a run needs besides its configuration.

    Attributes:
        datasets: by split: train, valid, test; a split without weight is absent.
        data_fingerprint: of everything that decides which training sample comes when.
        tokenizer: None if none is configured.
        tokenizer_path: of that, as the run keeps it.
        tokenizer_source: where it was loaded from.
        eod_id: end-of-document token; None if unknown.
    """

    datasets: dict[str, Samples]
    data_fingerprint: str
    tokenizer: Tokenizer | None
    tokenizer_path: Path | None
    tokenizer_source: Path | None
    eod_id: int | None

    def keep_tokenizer(self) -> None:
        """Copy the tokenizer to where the run keeps it, if that is somewhere else."""
        if self.tokenizer_source != self.tokenizer_path:
            copy_tokenizer(self.tokenizer_source, self.tokenizer_path)

    @property
    def fingerprints(self) -> tuple[str, str | None]:
        """Fingerprints of the data and of the tokenizer."""
        return self.data_fingerprint, None if self.tokenizer is None else self.tokenizer.fingerprint


def open_parts(config: Config) -> tuple[Config, RunParts]:
    """Open tokenizer and data, fill in the vocabulary size, and refuse what does not fit together.

    Raises:
        UserError: for a missing or damaged dataset, a tokenizer that is not the dataset's, ids beyond the vocabulary, a
            latent scale to measure and nothing to measure it on.
    """
    if not config.data.path:
        raise UserError("data.path is empty; give the prefix that ponder preprocess wrote (without .bin)")
    tokenizer_source = Path(config.tokenizer.path) if config.tokenizer.path else None
    tokenizer = None if tokenizer_source is None else load_tokenizer(tokenizer_source)
    config = _with_latent_scale(_independent(config, tokenizer))
    tokenizer_path = Path(config.tokenizer.path) if config.tokenizer.path else None
    mixture = _open_data(config)
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
    _check_vocabularies(config)
    eod_id = next((known.eod_id for known in (tokenizer, manifest) if known is not None), None)
    if config.data.reset_at_eod and eod_id is None:
        raise UserError("data.reset_at_eod needs to know the end-of-document token; set tokenizer.path")
    found = mixture.samples, mixture.fingerprint, tokenizer, tokenizer_path, tokenizer_source
    return config, RunParts(*found, eod_id)


def reopen_parts(parts: RunParts, config: Config) -> RunParts:
    """The parts of a later phase of a run: its own data, and all else as it is.

    Args:
        parts: of the run.
        config: of the phase.

    Raises:
        UserError: for a missing or damaged dataset, a tokenizer that is not the dataset's, ids beyond the vocabulary.
    """
    mixture = _open_data(config)
    _common_manifest(config.data, parts.tokenizer)
    _check_vocabularies(config)
    return replace(parts, datasets=mixture.samples, data_fingerprint=mixture.fingerprint)


def _open_data(config: Config) -> Mixture:
    """Open all datasets.

    Raises:
        UserError: one is missing or damaged, or they leave nothing to train or to validate on.
    """
    mixture = open_mixture(config.data, config.training.seed)
    if "train" not in mixture.samples:
        weights = split_text(config.data.split)
        raise UserError(f'data.split "{weights}" leaves nothing to train on; give its first part a weight')
    if config.training.eval_at_start and not validation_sets(mixture.samples, config.data):
        raise UserError(
            "training.eval_at_start is true, but there is nothing to validate on; give data.split a second weight, or "
            "name sets in data.validation"
        )
    return mixture


def _check_vocabularies(config: Config) -> None:
    for prefix in prefixes(config.data):
        check_vocabulary(prefix, config.model.vocab_size)


def _independent(config: Config, tokenizer: Tokenizer | None) -> Config:
    """The configuration of a run that keeps the tokenizer of the Hugging Face folder that it starts from.

    Raises:
        UserError: the tokenizer is not that of the folder.
    """
    folder, given = config.checkpoint.initialize_from, Path(config.tokenizer.path)
    if folder is None or tokenizer is None or not is_hugging_face(Path(folder)):
        return config
    require_own_tokenizer(Path(folder), tokenizer)
    if Path(folder) not in (given, given.parent):
        return config
    return replace(config, tokenizer=replace(config.tokenizer, path=str(Path(config.training.run_dir) / TOKENIZER)))


def _with_latent_scale(config: Config) -> Config:
    """The configuration with the factor on latents that `auto` stands for.

    Raises:
        UserError: there is no pretrained model to measure it on.
    """
    folder = config.checkpoint.initialize_from
    if not is_wanted(config.ponder):
        return config
    if folder is None or not is_hugging_face(Path(folder)):
        raise UserError(
            "ponder.latent_scale auto is measured on a pretrained model; set checkpoint.initialize_from to the folder "
            "of one, or give a number, such as 1"
        )
    return measured(Path(folder), config)


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
