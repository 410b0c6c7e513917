import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import stamps
from megatron_ponder.data.dataset_manifest import (
    MEBIBYTE,
    DatasetManifest,
    check_vocabulary,
    fingerprint,
    manifest_path,
    read_dataset_manifest,
    write_dataset_manifest,
)
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.stamps import Stamps

real_sha256 = hashlib.sha256

MANIFEST = DatasetManifest(tokenizer="ab" * 32, vocab_size=500, eod_id=2, documents=2, tokens=5, text_bytes=11)


def write(prefix, documents):
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)


def test_a_manifest_reads_back(tmp_path):
    write_dataset_manifest(tmp_path / "data.v1", MANIFEST)
    assert read_dataset_manifest(tmp_path / "data.v1") == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["data.v1.json"]


def test_no_manifest_is_none(tmp_path):
    assert read_dataset_manifest(tmp_path / "data") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"tokenizer": "a", "vocab_size": "many"}', b"\xff"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    manifest_path(tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        read_dataset_manifest(tmp_path / "data")


def test_fingerprint_depends_on_the_content_alone(tmp_path):
    for name in "ab":
        write(tmp_path / name, [[1, 2], [3]])
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert len(fingerprint(tmp_path / "a")) == 64


@pytest.mark.parametrize("place", [0, MEBIBYTE // 2 - 1, -1, -MEBIBYTE // 2])
def test_fingerprint_sees_both_ends_of_the_tokens(tmp_path, place):
    tokens = np.zeros(2 * MEBIBYTE, dtype=np.int64)
    write(tmp_path / "data", [tokens])
    before = fingerprint(tmp_path / "data")
    tokens[place] = 1
    write(tmp_path / "data", [tokens])
    assert fingerprint(tmp_path / "data") != before


def test_fingerprint_sees_where_documents_end(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1], [2, 3]])
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_fingerprint_of_a_missing_dataset(tmp_path, suffix):
    write(tmp_path / "data", [[1]])
    (tmp_path / f"data{suffix}").unlink()
    with pytest.raises(UserError, match=rf"data\{suffix} does not exist"):
        fingerprint(tmp_path / "data")


@pytest.mark.parametrize("with_manifest", [False, True])
def test_token_ids_must_lie_below_the_vocabulary(tmp_path, with_manifest):
    write(tmp_path / "data", [[1, 499], [], [3]])
    if with_manifest:
        write_dataset_manifest(tmp_path / "data", MANIFEST)
    check_vocabulary(tmp_path / "data", 500)
    with pytest.raises(UserError, match=r"ids up to 499; set model\.vocab_size to at least 500"):
        check_vocabulary(tmp_path / "data", 499)


def test_a_remembered_fingerprint_is_compared_with_the_manifest_and_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SECONDS_UNTIL_SETTLED", 0)
    prefix, known = tmp_path / "data", Stamps(tmp_path / "stamps")
    write(prefix, [[1, 2], [3, 4, 5]])
    time.sleep(0.05)
    first = fingerprint(prefix, known)
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "sha256", lambda *content: real_sha256(*content) if content else None)
        assert fingerprint(prefix, known) == first  # without reading the files
        write_dataset_manifest(prefix, replace(MANIFEST, fingerprint=first))
        assert fingerprint(prefix, known) == first
        write_dataset_manifest(prefix, replace(MANIFEST, fingerprint="00" * 32))
        with pytest.raises(UserError, match=r"data\.bin is not the file that its manifest describes"):
            fingerprint(prefix, known)
    manifest_path(prefix).unlink()
    write(prefix, [[1, 2], [3, 4, 6]])  # of the same sizes
    assert fingerprint(prefix, known) == fingerprint(prefix) != first
    write(prefix, [[1, 2, 3], [4, 6]])
    assert fingerprint(prefix, known) == fingerprint(prefix)
