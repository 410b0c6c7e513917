"""Join datasets into one, copied as streams."""

from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_manifest import (
    DatasetManifest,
    changed,
    fingerprint,
    manifest_path,
    read_dataset_manifest,
    write_dataset_manifest,
)
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths


def merge_datasets(prefixes: Sequence[str | Path], output_prefix: str | Path) -> IndexedDataset:
    """Write the documents of all datasets, one dataset after another, as a new one.

    It has a manifest if all of them have one. Memory does not grow with the datasets.

    Args:
        prefixes: paths without `.bin` and `.idx`.
        output_prefix: the same of the new dataset, which replaces an older one when it is complete.

    Raises:
        UserError: there is none, one cannot be read or was changed, or they were not made with the same tokenizer.
        OSError: the output cannot be written.
    """
    if not prefixes:
        raise UserError("nothing to merge; give two or more datasets")
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise UserError(f"{output_prefix} is both input and output; give another --output-prefix")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    manifests = _manifests_of_one_tokenizer(datasets)
    for dataset in datasets:
        dataset.check_index()
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset, manifest in zip(datasets, manifests, strict=True):
            digest = writer.append_dataset(dataset)
            if manifest is not None and manifest.bin_sha256 not in ("", digest):
                raise changed(dataset_paths(dataset.prefix)[0])
    described = [manifest for manifest in manifests if manifest is not None]
    if described:
        merged = DatasetManifest(
            tokenizer=described[0].tokenizer,
            vocab_size=described[0].vocab_size,
            eod_id=described[0].eod_id,
            documents=sum(manifest.documents for manifest in described),
            tokens=writer.num_tokens,
            text_bytes=sum(manifest.text_bytes for manifest in described),
            bin_sha256=writer.bin_sha256,
            idx_sha256=writer.idx_sha256,
            fingerprint=fingerprint(output_prefix),
        )
        write_dataset_manifest(output_prefix, merged)
    return IndexedDataset(output_prefix)


def _manifests_of_one_tokenizer(datasets: Sequence[IndexedDataset]) -> list[DatasetManifest | None]:
    first, *others = datasets
    manifests = [read_dataset_manifest(dataset.prefix) for dataset in datasets]
    for dataset, manifest in zip(others, manifests[1:], strict=True):
        if dataset.dtype != first.dtype:
            raise UserError(
                f"{first.prefix} has tokens of type {first.dtype} and {dataset.prefix} of {dataset.dtype}; "
                "preprocess both with the same tokenizer"
            )
        if (manifest is None) != (manifests[0] is None):
            lacking = dataset.prefix if manifest is None else first.prefix
            raise UserError(
                f"{manifest_path(lacking)} does not exist, so that the tokenizers cannot be compared; "
                "merge datasets that all have one, or none"
            )
        if manifest is not None and _made_with(manifest) != _made_with(manifests[0]):
            raise UserError(
                f"{first.prefix} and {dataset.prefix} were made with different tokenizers; "
                "preprocess both with the same one"
            )
    return manifests


def _made_with(manifest: DatasetManifest) -> tuple[str, int, int]:
    return manifest.tokenizer, manifest.vocab_size, manifest.eod_id
