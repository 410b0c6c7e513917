"""Reads a checkpoint: whole, fp32 tensors by parameter name, whichever of its files hold them, and what describes them.

A checkpoint knows nothing of the layout that wrote it. Nothing in it is executed when it is read.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.finite import require_finite
from megatron_ponder.checkpoint.folders import CONFIG, TOKENIZER
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.tensor_files import problem_of, tensors_problem
from megatron_ponder.config import Config, load_config


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: size, checksum, and the tensors that files of tensors should hold.

    Args:
        folder: of the checkpoint.
        manifest: its manifest; one that names some of the files alone has only these compared.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    held = manifest.tensors_by_file()
    for name, entry in manifest.files.items():
        problem = problem_of(folder / name, *entry)
        if problem is None and name in held:
            problem = tensors_problem(folder / name, held[name])
        if problem is not None:
            raise damaged(folder, name, problem)


def damaged(folder: Path, name: str, problem: str) -> UserError:
    """The error for a file of a checkpoint with which something is wrong."""
    return UserError(
        f"{folder / name} {problem}; use another checkpoint, or delete {folder} to go on from the one before"
    )


@contextmanager
def open_tensors(folder: Path, verified: bool = False) -> Iterator["TensorReader"]:
    """Verify a checkpoint and read its tensors one by one, whichever files hold them.

    Args:
        folder: of the checkpoint.
        verified: its files have been verified already, so that they need not be read twice.

    Raises:
        UserError: if a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    if not verified:
        verify(folder, manifest)
    with ExitStack() as stack:
        files = {}
        for name in sorted(set(manifest.tensors.values())):
            try:
                files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{folder / name} is no safetensors file ({error}); use another checkpoint") from error
        yield TensorReader(folder, manifest, files)


class TensorReader:
    """Random access to the tensors of one checkpoint.

    Attributes:
        manifest: of the checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: dict[str, safe_open]) -> None:
        self.manifest, self._folder, self._files = manifest, folder, files

    def names(self, kind: str) -> list[str]:
        """Parameters that have a tensor of this kind."""
        return [key.partition("/")[2] for key in self.manifest.tensors if key.startswith(f"{kind}/")]

    def get(self, kind: str, name: str) -> Tensor:
        """The whole tensor of this kind for one parameter, fp32.

        Raises:
            UserError: if the checkpoint lacks it, or a value of it is not finite.
        """
        key = f"{kind}/{name}"
        if key not in self.manifest.tensors:
            raise UserError(f"the checkpoint has no {kind} of {name}; it was made for another model configuration")
        tensor = self._files[self.manifest.tensors[key]].get_tensor(key)
        require_finite(tensor, f"{self._folder}: the {kind} of {name}", "use an older checkpoint")
        return tensor

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """The shape of a tensor that the checkpoint has."""
        key = f"{kind}/{name}"
        return tuple(self._files[self.manifest.tensors[key]].get_slice(key).get_shape())

    def of_kind(self, kind: str) -> Mapping[str, Tensor]:
        """All tensors of this kind by parameter name, each read when it is asked for."""
        return _TensorsOfKind(self, kind)


class _TensorsOfKind(Mapping[str, Tensor]):
    """Mapping that `TensorReader.of_kind` gives."""

    def __init__(self, reader: TensorReader, kind: str) -> None:
        self._reader, self._kind = reader, kind
        self._names = dict.fromkeys(reader.names(kind))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._reader.get(self._kind, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole and in fp32, by parameter name.

    Raises:
        UserError: if a file is missing or damaged, or a value is not finite.
    """
    with open_tensors(folder) as tensors:
        return dict(tensors.of_kind(WEIGHT))


def read_config_of(folder: Path) -> Config:
    """The resolved configuration that the checkpoint was trained with."""
    return load_config(folder / CONFIG)


def tokenizer_path(folder: Path) -> Path | None:
    """The tokenizer's folder inside a checkpoint; None if it has none."""
    path = folder / TOKENIZER
    return path if path.is_dir() else None
