"""What a dataset was made of, written beside it as `{prefix}.json`, and a fingerprint to know it again."""

import hashlib
import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import checksum, write_atomically
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.stamps import Stamps

MEBIBYTE = 1 << 20
LARGEST = 1 << 63  # no count of a dataset comes near


@dataclass(frozen=True)
class DatasetManifest:
    """What is known of a dataset beside its two files.

    Attributes:
        tokenizer: SHA-256 of the tokenizer's file.
        vocab_size: all token ids lie below.
        eod_id: the token that ends a document.
        text_bytes: size of the text as UTF-8.
        bin_sha256, idx_sha256: of the two files; empty in manifests of earlier versions.
        fingerprint: see `fingerprint`; empty in manifests of earlier versions.
    """

    tokenizer: str
    vocab_size: int
    eod_id: int
    documents: int
    tokens: int
    text_bytes: int
    bin_sha256: str = ""
    idx_sha256: str = ""
    fingerprint: str = ""


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def write_dataset_manifest(prefix: str | Path, manifest: DatasetManifest) -> None:
    content = asdict(manifest)
    write_atomically(manifest_path(prefix), json.dumps(content | {"checksum": checksum(content)}, indent=2) + "\n")


def read_dataset_manifest(prefix: str | Path) -> DatasetManifest | None:
    """The manifest of a dataset, or None where there is none because the dataset was made elsewhere.

    Those of earlier versions have no checksum of themselves.

    Raises:
        UserError: the file is there but is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        return _checked(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        reason = "it is no JSON"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path} is damaged ({reason}); make the dataset again with ponder preprocess")


def _checked(content: object) -> DatasetManifest:
    """A manifest of what was read.

    Raises:
        ValueError: saying what cannot be.
    """
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    told = content.pop("checksum", None)
    if told is not None and told != checksum(content):
        raise ValueError("its checksum differs")
    known = {field.name: field for field in fields(DatasetManifest)}
    unknown = content.keys() - known.keys()
    if unknown:
        raise ValueError(f"{min(unknown)!a} is no part of a manifest")
    for name, field in known.items():
        if name not in content:
            if field.default is MISSING:
                raise ValueError(f"it lacks {name}")
            continue
        value = content[name]
        fits = 0 <= value < LARGEST if type(value) is field.type is int else type(value) is field.type is str
        if not fits:
            raise ValueError(f"its {name} cannot be {ascii(value)[:60]}")
    return DatasetManifest(**content)


def fingerprint(prefix: str | Path, stamps: Stamps | None = None) -> str:
    """A digest, in hex, that changes when a dataset is replaced: of its whole index and of both ends of its tokens.

    Reading all tokens would take minutes; a dataset made from other text has other lengths or another beginning. Where
    the manifest says what the digest was when the dataset was made, damage since then is found on the way.

    Args:
        prefix: path without `.bin` and `.idx`.
        stamps: where a digest is remembered for files that nobody has written to since on this machine. The digest is
            then compared with the manifest, and nothing else is read.

    Raises:
        UserError: a file is missing, or is not what it was.
    """
    bin_path, idx_path = dataset_paths(prefix)
    manifest = read_dataset_manifest(prefix)
    try:
        with open(idx_path, "rb") as idx_file, open(bin_path, "rb") as bin_file:

            def read() -> str:
                return _digest(idx_file, bin_file, manifest)

            found = read() if stamps is None else stamps.once("fingerprint", [idx_file, bin_file], read)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist; check the path of the dataset") from None
    if manifest is not None and manifest.fingerprint not in ("", found):
        raise changed(bin_path)
    return found


def _digest(idx_file: BinaryIO, bin_file: BinaryIO, manifest: DatasetManifest | None) -> str:
    digest = hashlib.sha256()
    while block := idx_file.read(MEBIBYTE):
        digest.update(block)
    if manifest is not None and manifest.idx_sha256 not in ("", digest.hexdigest()):
        raise changed(Path(idx_file.name))
    size = os.fstat(bin_file.fileno()).st_size
    digest.update(size.to_bytes(8, "little"))
    digest.update(bin_file.read(MEBIBYTE))
    bin_file.seek(max(0, size - MEBIBYTE))
    digest.update(bin_file.read(MEBIBYTE))
    return digest.hexdigest()


def changed(path: Path) -> UserError:
    """What to say of a file whose checksum is not the one in the manifest."""
    return UserError(
        f"{path} is not the file that its manifest describes; copy or make the dataset again, or remove "
        f"{path.with_suffix('.json').name} if the change is meant"
    )


def check_vocabulary(prefix: str | Path, vocab_size: int) -> None:
    """Refuse a dataset with token ids that a model of `vocab_size` tokens cannot embed.

    The manifest answers at once; a dataset without one is read from end to end.

    Raises:
        UserError: the dataset needs a larger vocabulary, or has negative ids.
    """
    manifest = read_dataset_manifest(prefix)
    smallest, largest = (0, manifest.vocab_size - 1) if manifest else IndexedDataset(prefix).token_range()
    if smallest < 0:
        raise UserError(f"{prefix}.bin has the token id {smallest}; make the dataset again, with its right token type")
    if largest >= vocab_size:
        raise UserError(
            f"{prefix} has token ids up to {largest}; set model.vocab_size to at least {largest + 1}, "
            "or preprocess the data with the model's tokenizer"
        )
