"""The average of the weights of several checkpoints of one model, as a checkpoint that a run can begin with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.base.counts import counted, first_of
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.completeness import expected_tensors
from megatron_ponder.checkpoint.folders import MANIFEST, newest_checkpoints, resolve_checkpoint
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import TensorReader, open_tensors, read_config_of, tokenizer_path
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.writer import require_free, staged, write_description
from megatron_ponder.config import Config
from megatron_ponder.config.sections import architecture_changes
from megatron_ponder.data.tokenizer import load_tokenizer


def checkpoints_to_average(paths: Sequence[Path], last: int | None) -> list[Path]:
    """The checkpoints that a user means.

    Args:
        paths: run or checkpoint folders.
        last: so many of each run, the latest and those before it; None for what each path names.

    Raises:
        UserError: there is no such checkpoint, or one is meant twice.
    """
    found = []
    for path in paths:
        if last is None:
            found.append(resolve_checkpoint(path))
        elif (path / MANIFEST).is_file():
            raise UserError(f"{path} is one checkpoint; with --last name run folders, or leave --last out")
        else:
            resolve_checkpoint(path)
            found += newest_checkpoints(path, last)
    same = [path.resolve() for path in found]
    for path in found:
        if same.count(path.resolve()) > 1:
            raise UserError(f"{path} is named more than once; name it once, and give it more of --weights")
    return found


def average(folders: Sequence[Path], output: Path, weights: Sequence[float] | None = None) -> Manifest:
    """Write a checkpoint whose weights are the average of those of others; it is at step 0, without moments.

    Sums are made in fp64 and rounded to fp32 once. One tensor after another is read and written, so that memory holds
    20 bytes at most for each number of the largest. The configuration is that of the last checkpoint.

    Args:
        folders: of the checkpoints.
        output: folder that does not exist or is empty.
        weights: of each checkpoint in the average, above 0, divided by their sum; all the same unless given.

    Returns:
        The manifest of what was written.

    Raises:
        UserError: the models or their tokenizers differ, a file is damaged, a value is not finite, or the output is
            taken.
    """
    require_free(output)
    shares = _shares(folders, weights)
    config, tokenizer = _common(folders)
    with ExitStack() as stack:
        readers = [stack.enter_context(open_tensors(folder)) for folder in folders]
        shapes = _common_shapes(folders, readers, config)
        file = "weights-00000.safetensors"
        origins = {_printable(folder): share for folder, share in zip(folders, shares, strict=True)}
        manifest = Manifest(tensors=dict.fromkeys(shapes, file), averaged=origins)
        known = {reader.manifest.tokenizer_fingerprint for reader in readers} - {None}
        manifest.tokenizer_fingerprint = known.pop() if len(known) == 1 else None
        with staged(output) as aside:
            entry = write_tensors(aside, file, _Averages(readers, shares, shapes), shapes)
            write_description(aside, replace(manifest, files={file: entry}), config, tokenizer)
    return read_manifest(output)


class _Averages(Mapping[str, Tensor]):
    """Averages by `kind/parameter name`, each made when it is asked for."""

    def __init__(self, readers: Sequence[TensorReader], shares: Sequence[float], keys: Mapping[str, object]) -> None:
        self._readers, self._shares, self._keys = readers, shares, keys

    def __getitem__(self, key: str) -> Tensor:
        kind, _, name = key.partition("/")
        total: Tensor | None = None
        for reader, share in zip(self._readers, self._shares, strict=True):
            tensor = reader.get(kind, name)
            total = torch.zeros(tensor.shape, dtype=torch.float64) if total is None else total
            total.add_(tensor, alpha=share)
        return total.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _shares(folders: Sequence[Path], weights: Sequence[float] | None) -> list[float]:
    weights = [1.0] * len(folders) if weights is None else weights
    if len(weights) != len(folders):
        numbers, checkpoints = counted(len(weights), "number"), counted(len(folders), "checkpoint")
        raise UserError(f"--weights has {numbers} for {checkpoints}; give one for each")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"--weights {' '.join(map(str, weights))}: give numbers above 0, which are divided by their sum"
        )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _common(folders: Sequence[Path]) -> tuple[Config, Path | None]:
    """The configuration of the last, and a tokenizer; refused where one is of another model or tokenizer."""
    last = folders[-1]
    config, tokenizer = read_config_of(last), None
    for folder in reversed(folders):
        _require_same_model(config, last, read_config_of(folder), folder)
        path = tokenizer_path(folder)
        if path is None:
            continue
        if tokenizer is not None and load_tokenizer(path).fingerprint != load_tokenizer(tokenizer).fingerprint:
            raise UserError(f"the tokenizers in {path} and {tokenizer} differ; average checkpoints of one tokenizer")
        tokenizer = tokenizer or path
    return config, tokenizer


def _require_same_model(config: Config, last: Path, other: Config, folder: Path) -> None:
    changes, resets = architecture_changes(config, other), (other.data.reset_at_eod, config.data.reset_at_eod)
    if len(set(resets)) > 1:
        changes["data.reset_at_eod"] = resets
    for key, (theirs, ours) in changes.items():
        raise UserError(f"{key} is {theirs} in {folder} and {ours} in {last}; average checkpoints of one model")


def _common_shapes(
    folders: Sequence[Path], readers: Sequence[TensorReader], config: Config
) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, in the model's order; refused where a checkpoint has others."""
    expected = expected_tensors(Manifest(), config)
    for folder, reader in zip(folders, readers, strict=True):
        held = {f"{WEIGHT}/{name}": reader.shape(WEIGHT, name) for name in reader.names(WEIGHT)}
        different = [key for key in expected.keys() | held.keys() if expected.get(key) != held.get(key)]
        if different:
            raise UserError(
                f"{folder} and its own configuration differ in {first_of(different, 'tensor')}; leave it out"
            )
    return expected


def _printable(folder: Path) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in str(folder))
