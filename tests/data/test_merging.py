import dataclasses

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_manifest import manifest_path, read_dataset_manifest, write_dataset_manifest
from megatron_ponder.data.dataset_summary import length_histogram, verify
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.merging import merge_datasets
from megatron_ponder.data.preprocessing import preprocess


@pytest.fixture
def parts(source_files, tokenizer_path, tmp_path):
    cuts = (source_files[:3], source_files[3:4], source_files[4:9])
    return [preprocess(files, tmp_path / f"part{n}", tokenizer_path).prefix for n, files in enumerate(cuts)]


def test_parts_make_the_dataset_of_all(parts, source_files, tokenizer_path, tmp_path):
    whole = preprocess(source_files[:9], tmp_path / "whole", tokenizer_path).prefix
    merged = merge_datasets(parts, tmp_path / "new" / "merged")
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / "new" / f"merged{suffix}").read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert verify(merged.prefix, None)[-1].startswith("checksums: .bin and .idx are the files")


def test_without_manifests(parts, tmp_path):
    for part in parts:
        manifest_path(part).unlink()
    merged = merge_datasets(parts, tmp_path / "merged")
    assert not manifest_path(merged.prefix).exists()
    assert merged.num_tokens == sum(IndexedDataset(part).num_tokens for part in parts)


def test_what_does_not_fit_is_refused(parts, tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(UserError, match="nothing to merge"):
        merge_datasets([], out)
    with pytest.raises(UserError, match="is both input and output"):
        merge_datasets(parts, parts[1])
    manifest = read_dataset_manifest(parts[1])
    write_dataset_manifest(parts[1], dataclasses.replace(manifest, tokenizer="cd" * 32))
    with pytest.raises(UserError, match=r"part0.* and .*part1.* were made with different tokenizers"):
        merge_datasets(parts, out)
    manifest_path(parts[1]).unlink()
    with pytest.raises(UserError, match=r"part1_text_document\.json does not exist, so that the tokenizers"):
        merge_datasets(parts, out)
    with IndexedDatasetWriter(tmp_path / "wide", np.dtype("<i4")) as writer:
        writer.add_document([70_000])
    with pytest.raises(UserError, match=r"has tokens of type uint16 and .*wide of int32"):
        merge_datasets([parts[0], tmp_path / "wide"], out)
    assert not list(tmp_path.glob("merged*"))


def test_a_changed_part_is_refused(parts, tmp_path):
    bin_path, _ = dataset_paths(parts[2])
    content = bytearray(bin_path.read_bytes())
    content[100] ^= 1
    bin_path.write_bytes(content)
    with pytest.raises(UserError, match=r"part2_text_document\.bin is not the file that its manifest describes"):
        merge_datasets(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_the_histogram_counts_every_document_and_token(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ponder.data.dataset_summary.BLOCK_ENTRIES", 3)
    lengths = [0, 1, 2, 3, 4, 7, 8, 0, 1]
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<u2")) as writer:
        for length in lengths:
            writer.add_document([1] * length)
    assert length_histogram(IndexedDataset(tmp_path / "data")) == [
        (0, 0, 2, 0), (1, 1, 2, 2), (2, 3, 2, 5), (4, 7, 2, 11), (8, 15, 1, 8)
    ]  # fmt: skip
