"""Whatever happens to the bytes of a dataset: a message that names the file, never a crash or other tokens."""

import itertools
import json
import struct

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_manifest import (
    DatasetManifest,
    check_vocabulary,
    fingerprint,
    manifest_path,
    read_dataset_manifest,
    write_dataset_manifest,
)
from megatron_ponder.data.dataset_summary import verify
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.index_cache import IndexCache
from megatron_ponder.data.indexed_dataset import HEADER, IndexedDataset, dataset_paths
from tests.damage import changed_bytes, changed_fields, draws

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6]]
INDEX_BYTES = HEADER.size + 12 * 4 + 8 * 5


@pytest.fixture
def prefix(tmp_path):
    prefix = tmp_path / "small"
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    sums = {"bin_sha256": writer.bin_sha256, "idx_sha256": writer.idx_sha256, "fingerprint": fingerprint(prefix)}
    write_dataset_manifest(
        prefix, DatasetManifest("ab" * 32, vocab_size=7, eod_id=2, documents=4, tokens=6, text_bytes=9, **sums)
    )
    return prefix


def open_for_training(prefix):
    """What a run does before it takes the first sample."""
    dataset = IndexedDataset(prefix)
    check_vocabulary(prefix, 7)
    fingerprint(prefix)
    return [dataset.read_document(number).tolist() for number in range(dataset.num_documents)]


def changes(content):
    for place in range(len(content)):
        for value in {content[place] ^ bit for bit in (1, 2, 0x80, 0xFF)} | {0, 255}:
            if value != content[place]:
                yield place, content[:place] + bytes([value]) + content[place + 1 :]


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_every_changed_byte_is_found(prefix, suffix):
    assert open_for_training(prefix) == DOCUMENTS
    path = prefix.with_suffix(suffix)
    whole = path.read_bytes()
    assert len(whole) == (INDEX_BYTES if suffix == ".idx" else 12)
    for place, changed in changes(whole):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"small\.(idx|bin) "):
            open_for_training(prefix)
        with pytest.raises(UserError, match=r"small\.(idx|bin) "):
            verify(prefix, None)
        assert place < len(whole)
    path.write_bytes(whole)
    assert open_for_training(prefix) == DOCUMENTS


def test_every_region_overwritten_and_every_length(prefix):
    for path in dataset_paths(prefix):
        whole = path.read_bytes()
        for start in range(0, len(whole), 3):
            for stop in range(start + 1, len(whole) + 1, 5):
                for filler in (b"\0", b"\xff"):
                    changed = whole[:start] + filler * (stop - start) + whole[stop:]
                    if changed != whole:
                        path.write_bytes(changed)
                        with pytest.raises(UserError, match=r"small\.(idx|bin) "):
                            open_for_training(prefix)
            path.write_bytes(whole[:start])
            with pytest.raises(UserError, match=r"small\.(idx|bin) "):
                open_for_training(prefix)
        path.write_bytes(whole)


def test_without_checksums_what_contradicts_itself_is_found(prefix):
    """A dataset of another program has none. Then lengths and offsets guard each other, and reading stays inside."""
    manifest_path(prefix).unlink()
    _, idx_path = dataset_paths(prefix)
    whole = idx_path.read_bytes()
    lengths_and_offsets = range(HEADER.size, HEADER.size + 12 * 4)
    found = []
    for place, changed in changes(whole):
        idx_path.write_bytes(changed)
        try:
            documents = open_for_training(prefix)
        except UserError as error:
            found.append(str(error))
        else:
            assert place not in lengths_and_offsets
            assert list(itertools.chain(*documents)) == [1, 2, 3, 4, 5, 6]  # at worst, documents end elsewhere
    assert len(found) > 500
    assert all("small.idx " in message or "small.bin " in message for message in found)


def test_reading_one_sequence_checks_its_entry(prefix):
    _, idx_path = dataset_paths(prefix)
    content = bytearray(idx_path.read_bytes())
    struct.pack_into("<i", content, HEADER.size, 1 << 30)
    idx_path.write_bytes(content)
    with pytest.raises(UserError, match=r"small\.idx has sequences that do not follow"):
        IndexedDataset(prefix).read(0)


def test_negative_ids_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<i2")) as writer:
        writer.add_document([1, -3])
    with pytest.raises(UserError, match=r"data\.bin has the token id -3"):
        check_vocabulary(tmp_path / "data", 10)
    with pytest.raises(UserError, match=r"data\.bin has the id -3 as token 1;"):
        verify(tmp_path / "data", None)


def test_verification_names_the_token(prefix):
    manifest_path(prefix).unlink()
    with pytest.raises(UserError, match=r"small\.bin has the id 6 as token 5, which is not below 6"):
        verify(prefix, 6)
    assert "checksums: none, because there is no manifest" in verify(prefix, 7)


FEW_AND_MANY = [(1, 300), pytest.param(2, 20_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("seed", "tries"), FEW_AND_MANY)
def test_damage_drawn_at_random_is_one_line_or_changes_nothing(prefix, seed, tries):
    """To the index, the tokens and the manifest; of which the fields are changed as often as the bytes."""
    want, refused = (open_for_training(prefix), read_dataset_manifest(prefix)), 0
    for name, draw in draws(seed, tries):
        path = draw.choice((*dataset_paths(prefix), manifest_path(prefix)))
        whole = path.read_bytes()
        changed = changed_bytes(whole, draw)
        if path.suffix == ".json" and draw.random() < 0.5:
            fields = {
                key: value for key, value in json.loads(whole).items() if draw.random() < 0.9 or key != "checksum"
            }
            changed = json.dumps(changed_fields(fields, draw) if "checksum" in fields else fields, indent=2).encode()
        path.write_bytes(changed)
        try:
            assert (open_for_training(prefix), read_dataset_manifest(prefix)) == want, name
        except UserError as error:
            assert str(error).isprintable(), name  # noqa: PT017
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {path.name}") from error
        path.write_bytes(whole)
    assert tries / 2 < refused


@pytest.mark.parametrize("value", [-1, True, 1.0, "7", None, 2**63, float("inf"), [], "a" * 99])
@pytest.mark.parametrize("name", ["vocab_size", "eod_id", "tokens"])
def test_fields_of_a_manifest_without_a_checksum_are_looked_at(prefix, name, value):
    path = manifest_path(prefix)
    fields = json.loads(path.read_text())
    del fields["checksum"]
    path.write_text(json.dumps(fields))
    assert read_dataset_manifest(prefix).vocab_size == 7, "as earlier versions have written it"
    path.write_text(json.dumps(fields | {name: value}))
    with pytest.raises(UserError, match=rf"small\.json is damaged \(its {name} cannot be"):
        read_dataset_manifest(prefix)


@pytest.mark.parametrize(("seed", "tries"), FEW_AND_MANY)
def test_damage_to_the_index_cache_is_noticed(tmp_path, seed, tries):
    cache, arrays = IndexCache(tmp_path), [np.arange(40), np.arange(6, dtype=np.int32).reshape(3, 2)]
    cache.load("a", lambda: arrays)
    path = cache.path("a")
    whole, built = path.read_bytes(), []
    for name, draw in draws(seed, tries):
        path.unlink()  # a reader may have mapped it
        path.write_bytes(changed_bytes(whole, draw))
        try:
            got = cache.load("a", lambda: built.append(1) or arrays)
            assert all(map(np.array_equal, got, arrays))
        except Exception as error:
            raise AssertionError(name) from error
        assert path.read_bytes() == whole, name
    assert tries / 2 < len(built)
