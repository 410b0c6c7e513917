"""What a trained model is evaluated on: samples of a split, or a text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import read_text
from megatron_ponder.checkpoint.load import LoadedModel
from megatron_ponder.config import DataConfig
from megatron_ponder.config.data import SPLITS
from megatron_ponder.data.dataset_manifest import check_vocabulary
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.data.mixture import Samples, open_mixture, prefixes
from megatron_ponder.data.splits import split_text
from megatron_ponder.evaluation.perplexity import windows

SPLIT_HELP = "train, valid, test, or the name of a validation set (default: valid)"


class EvaluationBatches(NamedTuple):
    """Batches of token ids, int64 (B, L + 1) each, and what to call them."""

    batches: list[Tensor]
    name: str


def text_batches(loaded: LoadedModel, path: Path) -> EvaluationBatches:
    """A file, cut into samples of the training length.

    Raises:
        UserError: if the checkpoint has no tokenizer, or the file is no file or not UTF-8 text.
    """
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.folder} has no tokenizer to read {path} with; evaluate on a dataset with --data")
    tokens = loaded.tokenizer.encode(read_text(path))
    return EvaluationBatches(
        list(windows([loaded.tokenizer.eod_id, *tokens], loaded.config.data.sequence_length)), path.name
    )


def split_batches(loaded: LoadedModel, dataset: str | None, split: str, samples: int) -> EvaluationBatches:
    """The first samples of a split.

    Args:
        loaded: the model.
        dataset: prefix of a dataset in place of that of the training run.
        split: train, valid, test, or the name of a validation set.
        samples: at most so many.

    Raises:
        UserError: if there is no such dataset or split, or it has tokens that the model does not know.
    """
    data = _data(loaded, dataset, split)
    opened = _open(loaded, data, split)
    for prefix in prefixes(data):
        check_vocabulary(prefix, loaded.config.model.vocab_size)
    names = ", ".join(Path(prefix).name for prefix in prefixes(replace(data, validation={})))
    name = f"the validation set {split}" if split in data.validation else f"the {split} part of {names}"
    vocab_size = loaded.config.model.vocab_size
    return EvaluationBatches(_batches(loaded, opened, samples, vocab_size), name)


def depth_batches(loaded: LoadedModel, dataset: str | None, split: str, samples: int, depths: str) -> list[Tensor]:
    """The depths of the tokens that `split_batches` gives for the same arguments.

    Args:
        loaded, dataset, split, samples: see `split_batches`.
        depths: prefix of an indexed dataset that holds a depth for every token of the other one, -1 for none.

    Raises:
        UserError: if the two do not have the same documents.
    """
    data = _data(loaded, dataset, split)
    if not isinstance(data.path, str) or len(prefixes(data)) != 1:
        raise UserError("depths belong to one dataset, and not to a blend; name it with --data")
    text, stated = IndexedDataset(data.path), IndexedDataset(depths)
    if not all(
        np.array_equal(getattr(text, name), getattr(stated, name)) for name in ("sequence_lengths", "document_indices")
    ):
        raise UserError(
            f"{depths} has {len(stated)} documents of {stated.num_tokens} tokens, and {text.prefix} has {len(text)} of "
            f"{text.num_tokens}, or they are cut differently; give the depths that were made with that dataset"
        )
    data = replace(data, path=depths, valid_path=None, test_path=None, validation={}, phases=[])
    return _batches(loaded, _open(loaded, data, split), samples, vocab_size=None)


def _data(loaded: LoadedModel, dataset: str | None, split: str) -> DataConfig:
    """The data of a run, or another dataset, with no other validation set than the one that is asked for."""
    data = replace(loaded.config.data, cache_path=None)
    if dataset:
        data = replace(data, path=dataset, valid_path=None, test_path=None, validation={}, phases=[])
    if not data.path:
        raise UserError(f"{loaded.folder} names no dataset; evaluate on one with --data, or on a file with --text")
    if split not in (*SPLITS, *data.validation):
        raise UserError(f"there is no split {split}; choose one of {', '.join((*SPLITS, *data.validation))}")
    return replace(data, validation={name: blend for name, blend in data.validation.items() if name == split})


def _open(loaded: LoadedModel, data: DataConfig, split: str) -> Samples:
    datasets = open_mixture(data, loaded.config.training.seed).samples
    if split not in datasets:
        raise UserError(f'data.split "{split_text(data.split)}" has no {split} part; choose another --split, or --text')
    return datasets[split]


def _batches(loaded: LoadedModel, opened: Samples, samples: int, vocab_size: int | None) -> list[Tensor]:
    count = min(samples, opened.samples_per_epoch)
    return list(validation_batches(opened, count, loaded.config.training.micro_batch_size, 0, 1, vocab_size))


def flat_labels(batches: Sequence[Tensor]) -> np.ndarray:
    """What each position of the batches predicts, one after another: int64 (N,)."""
    return np.concatenate([batch[:, 1:].flatten().numpy() for batch in batches])
