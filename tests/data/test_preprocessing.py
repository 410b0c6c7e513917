import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import dataset_writer, preprocessing, segments
from megatron_ponder.data.dataset_manifest import check_vocabulary, read_dataset_manifest
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer import load_tokenizer
from tests import REPOSITORY


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def texts(prefix: Path, tokenizer) -> list[str]:
    dataset = IndexedDataset(prefix)
    documents = [dataset.read_document(number).tolist() for number in range(dataset.num_documents)]
    assert all(document[-1] == tokenizer.eod_id and tokenizer.eod_id not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def test_the_number_of_workers_does_not_show(source_files, tokenizer_path, tmp_path, monkeypatch):
    for workers, chunk in ((1, segments.CHUNK_CHARACTERS), (3, 1 << 14)):
        monkeypatch.setattr(segments, "CHUNK_CHARACTERS", chunk)  # many more than are under way at a time
        preprocess(source_files, tmp_path / str(workers) / "data", tokenizer_path, workers)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert sorted(one) == [f"data_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    assert one == three


def test_every_document_can_be_read_again(source_files, tokenizer_path, tmp_path):
    tokenizer = load_tokenizer(tokenizer_path)
    # One document is cut into several segments, and must not show it.
    sources = [path.read_bytes().decode() for path in source_files]
    originals = ["".join(sources), *sources[:3], " \n\n  \u2581x"]
    assert len(originals[0]) > 3 * segments.CHUNK_CHARACTERS
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in originals) + "\n{}\n")
    report = preprocess([tmp_path / "in.jsonl"], tmp_path / "out", tokenizer_path, key="body")

    assert report.prefix == tmp_path / "out_body_document"
    assert texts(report.prefix, tokenizer) == originals
    assert IndexedDataset(report.prefix).read_document(0)[:-1].tolist() == tokenizer.encode(originals[0])
    assert report.documents == 5
    assert report.tokens == IndexedDataset(report.prefix).num_tokens
    assert report.text_bytes == sum(len(text.encode()) for text in originals)
    assert report.skipped == {"no text in 'body'": 1}
    assert f"5 documents, {report.tokens:,} tokens" in str(report)
    assert f"{report.text_bytes / report.tokens:.2f} bytes per token" in str(report)
    assert "skipped: 1 × no text in 'body'" in str(report)

    manifest = read_dataset_manifest(report.prefix)
    assert (manifest.documents, manifest.tokens, manifest.text_bytes) == (5, report.tokens, report.text_bytes)
    assert (manifest.tokenizer, manifest.vocab_size, manifest.eod_id) == (tokenizer.fingerprint, 2048, 2)
    assert IndexedDataset(report.prefix).dtype == np.dtype("<u2")
    check_vocabulary(report.prefix, 2048)


def test_without_an_end_token(tokenizer_path, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    report = preprocess([tmp_path / "a.txt"], tmp_path / "out", tokenizer_path, append_eod=False)
    tokenizer = load_tokenizer(tokenizer_path)
    assert IndexedDataset(report.prefix).read(0).tolist() == tokenizer.encode("some text")


# Kept here, and the functions at the top level, so that worker processes find them by name.
_encode = preprocessing.encode_parts


def _fails_on_the_last_document(path, append_eod, dtype, chunk):
    if any("the end is near" in segment.text for segment in chunk):
        raise RuntimeError("half-way")
    return _encode(path, append_eod, dtype, chunk)


def _dies(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_half_way_leaves_the_older_dataset(source_files, tokenizer_path, tmp_path, monkeypatch, workers):
    preprocess(source_files[:2], tmp_path / "out" / "data", tokenizer_path)
    before = contents(tmp_path / "out")
    (tmp_path / "last.txt").write_text("the end is near")
    with monkeypatch.context() as patched:
        patched.setattr(preprocessing, "encode_parts", _fails_on_the_last_document)
        with pytest.raises(RuntimeError, match="half-way"):
            preprocess([*source_files, tmp_path / "last.txt"], tmp_path / "out" / "data", tokenizer_path, workers)
    assert contents(tmp_path / "out") == before
    preprocess([tmp_path / "last.txt"], tmp_path / "out" / "data", tokenizer_path, workers)
    assert all(contents(tmp_path / "out")[name] != content for name, content in before.items())


def test_a_full_disk_at_the_end_leaves_the_older_dataset(source_files, tokenizer_path, tmp_path, monkeypatch):
    preprocess(source_files[:1], tmp_path / "out" / "data", tokenizer_path)
    before = contents(tmp_path / "out")

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_writer, "sync", fail)
    with pytest.raises(OSError, match="No space"):
        preprocess(source_files, tmp_path / "out" / "data", tokenizer_path)
    assert contents(tmp_path / "out") == before


def test_a_worker_that_dies_is_reported(source_files, tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocessing, "encode_parts", _dies)
    with pytest.raises(UserError, match=r"a worker process died, .* set --workers lower"):
        preprocess(source_files, tmp_path / "out" / "data", tokenizer_path, 2)
    assert contents(tmp_path / "out") == {}


def test_of_two_at_a_time_the_second_is_told_and_harms_nothing(source_files, tokenizer_path, tmp_path, monkeypatch):
    """The second is a process of its own, which comes while the first one tokenises."""
    second = []

    def interrupted(*arguments):
        if not second:
            program = [sys.executable, "tools/preprocess_data.py", "--input", source_files[-1]]
            program += ["--output-prefix", tmp_path / "data", "--tokenizer", tokenizer_path]
            second.append(
                subprocess.run([*map(str, program)], capture_output=True, text=True, cwd=REPOSITORY, check=False)
            )
        return _encode(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(preprocessing, "encode_parts", interrupted)
        report = preprocess(source_files[:3], tmp_path / "data", tokenizer_path)
    assert second[0].returncode == 2
    assert re.fullmatch(
        rf"error: the dataset {report.prefix} is in use by process {os.getpid()} on {re.escape(socket.gethostname())}, "
        rf"which started .*: wait until it has ended, or choose another --output-prefix; if it runs no more, remove "
        rf"{report.prefix}\.claim\n",
        second[0].stderr,
    )
    tokenizer = load_tokenizer(tokenizer_path)
    assert texts(report.prefix, tokenizer) == [path.read_text() for path in source_files[:3]]
    assert read_dataset_manifest(report.prefix).tokenizer == tokenizer.fingerprint
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]


def test_user_mistakes(source_files, tokenizer_path, tmp_path):
    out = tmp_path / "out" / "data"
    with pytest.raises(UserError, match=r"t\.model does not exist"):
        preprocess(source_files, out, tmp_path / "t.model")
    with pytest.raises(UserError, match=r"^/dev/zero is a device: write what it gives to a file"):
        preprocess(source_files, out, "/dev/zero")
    with pytest.raises(UserError, match="--workers is 0"):
        preprocess(source_files, out, tokenizer_path, 0)
    with pytest.raises(UserError, match="matches no file"):
        preprocess([tmp_path / "nothing"], out, tokenizer_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot make the folder .*file"):
        preprocess(source_files, tmp_path / "file" / "data", tokenizer_path)
    assert not dataset_paths(f"{out}_text_document")[0].exists()
