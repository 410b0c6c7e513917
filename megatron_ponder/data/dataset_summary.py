"""What is in a dataset: counts, lengths of documents, text, and whether all of it is as it should be."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_manifest import changed, fingerprint, manifest_path, read_dataset_manifest
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.token_streams import BLOCK_BYTES, BLOCK_ENTRIES


def document_lengths(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    """Tokens in each document, in blocks; the index must have been checked."""
    documents = dataset.document_indices
    for start in range(0, dataset.num_documents, BLOCK_ENTRIES):
        bounds = documents[start : start + BLOCK_ENTRIES + 1]
        inside = np.minimum(bounds, len(dataset) - 1)
        starts = dataset.sequence_offsets[inside] // dataset.dtype.itemsize
        yield np.diff(np.where(bounds == len(dataset), dataset.num_tokens, starts))


def length_histogram(dataset: IndexedDataset) -> list[tuple[int, int, int, int]]:
    """How long the documents are: (shortest, longest, documents, tokens) of 0, 1, 2 to 3, 4 to 7 tokens and so on.

    Ranges without a document are left out; the index must have been checked.
    """
    documents = np.zeros(65, dtype=np.int64)
    tokens = np.zeros(65, dtype=np.int64)
    for lengths in document_lengths(dataset):
        # Bits that a length takes, exactly: a logarithm would round at the ends of the ranges.
        bits = np.searchsorted(1 << np.arange(62), lengths, side="right")
        documents += np.bincount(bits, minlength=65)
        tokens += np.bincount(bits, weights=lengths, minlength=65).astype(np.int64)
    return [
        (1 << bit >> 1, max(0, (1 << bit) - 1), int(documents[bit]), int(tokens[bit]))
        for bit in np.flatnonzero(documents).tolist()
    ]


def verify(prefix: str | Path, vocab_size: int | None) -> list[str]:
    """Check all of a dataset, which reads it from end to end.

    Args:
        vocab_size: all ids must lie below; None for what the manifest says.

    Returns:
        What was checked, a line each.

    Raises:
        UserError: something is wrong, with the file and what it is.
    """
    dataset = IndexedDataset(prefix)
    dataset.check_index()
    documents = counted(dataset.num_documents, "document")
    done = [f"index: {counted(len(dataset), 'sequence')} and {documents} follow one another"]
    manifest = read_dataset_manifest(prefix)
    if vocab_size is None and manifest is not None:
        vocab_size = manifest.vocab_size
    digest = _check_tokens(dataset, vocab_size)
    done.append(
        f"tokens: {dataset.num_tokens:,} ids are at least 0"
        + (f" and below {vocab_size:,}" if vocab_size else "; the vocabulary is not known")
    )
    if manifest is None:
        done.append("checksums: none, because there is no manifest")
        return done
    counts = (dataset.num_documents, dataset.num_tokens)
    if counts != (manifest.documents, manifest.tokens):
        raise UserError(
            f"{manifest_path(prefix)} says {manifest.documents} documents and {manifest.tokens} tokens where the "
            f"dataset has {counts[0]} and {counts[1]}; copy or make the dataset again"
        )
    if not manifest.bin_sha256:
        done.append("checksums: none in the manifest, which an earlier version wrote")
        return done
    fingerprint(prefix)
    if digest != manifest.bin_sha256:
        raise changed(dataset_paths(prefix)[0])
    done.append("checksums: .bin and .idx are the files that the manifest describes")
    return done


def _check_tokens(dataset: IndexedDataset, vocab_size: int | None) -> str:
    """The SHA-256 of `.bin`, in hex, once all its ids are found to lie in the vocabulary."""
    bin_path, _ = dataset_paths(dataset.prefix)
    digest = hashlib.sha256()
    position = 0
    with open(bin_path, "rb") as file:
        while content := file.read(BLOCK_BYTES):
            digest.update(content)
            tokens = np.frombuffer(content, dataset.dtype)
            wrong = tokens < 0
            if vocab_size is not None:
                wrong |= tokens >= vocab_size
            if wrong.any():
                place = int(np.argmax(wrong))
                limit = f", which is not below {vocab_size}" if tokens[place] >= 0 else ""
                raise UserError(
                    f"{bin_path} has the id {tokens[place]} as token {position + place}{limit}; "
                    "copy or make the dataset again"
                )
            position += len(tokens)
    return digest.hexdigest()
