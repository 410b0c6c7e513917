"""That neither shards, ranks, crashes nor the size of the corpus show in a dataset."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import preprocessing
from megatron_ponder.data.dataset_manifest import manifest_path, read_dataset_manifest
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.preprocessing import Team, preprocess
from tests import REPOSITORY

SHARD = 60_000
# Prints the number of shards that an earlier run had finished, on the first rank.
DRIVER = """
import sys
from megatron_ponder.data.preprocessing import Team, preprocess
if __name__ == "__main__":
    source, output, tokenizer, workers, rank, size, shard_bytes = sys.argv[1:]
    team = Team(int(rank), int(size), "team") if int(size) > 1 else None
    report = preprocess([source], output, tokenizer, int(workers), team=team, shard_bytes=int(shard_bytes))
    print(None if report is None else report.reused_shards)
"""


def files(prefix) -> list[bytes]:
    return [*bytes_of(prefix), manifest_path(prefix).read_bytes()]


def bytes_of(prefix) -> list[bytes]:
    return [path.read_bytes() for path in dataset_paths(prefix)]


def start(tmp_path, corpus, output, tokenizer, workers=1, rank=0, size=1, shard_bytes=SHARD) -> subprocess.Popen:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, script, corpus, output, tokenizer, workers, rank, size, shard_bytes]
    return subprocess.Popen(
        list(map(str, command)),
        env={"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def corpus(source_files, tmp_path_factory) -> Path:
    """About 700 KB, no document of it longer than a shard: lines, and a few files."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [path.read_bytes().decode() for path in source_files if path.stat().st_size < 50_000]
    lines = [*(json.dumps({"text": text}) for text in texts[:25] if text), "{}", "broken"]
    (folder / "a.jsonl").write_text("\n".join(lines))
    for number, text in enumerate(texts[25:]):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(corpus, tokenizer_path, tmp_path_factory) -> list[bytes]:
    """The files of a run in one piece."""
    report = preprocess([corpus], tmp_path_factory.mktemp("whole") / "data", tokenizer_path)
    assert (report.shards, report.reused_shards) == (1, 0)
    assert report.skipped == {"no text in 'text'": 1, "malformed JSON": 1}
    return files(report.prefix)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard_bytes", [7_000, SHARD])
def test_shards_do_not_show(corpus, tokenizer_path, expected, tmp_path, workers, shard_bytes):
    report = preprocess([corpus], tmp_path / "data", tokenizer_path, workers, shard_bytes=shard_bytes)
    assert report.shards > 5
    assert files(report.prefix) == expected
    assert report.skipped == {"no text in 'text'": 1, "malformed JSON": 1}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_not_show(corpus, tokenizer_path, expected, tmp_path, size):
    """In whatever order they begin; the first one waits for the last to have begun before it clears up."""
    reports = {}

    def run(rank):
        time.sleep(0.3 * (size - rank) if rank else 0)
        team = Team(rank, size, "here")
        reports[rank] = preprocess([corpus], tmp_path / "data", tokenizer_path, team=team, shard_bytes=SHARD)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report is None for _, report in sorted(reports.items())] == [False, *[True] * (size - 1)]
    assert files(reports[0].prefix) == expected
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".bin", ".idx", ".json"]


def test_the_others_do_the_work_of_a_killed_rank(corpus, tokenizer_path, expected, tmp_path):
    ranks = [start(tmp_path, corpus, tmp_path / "data", tokenizer_path, rank=rank, size=3) for rank in range(3)]
    attendance = tmp_path / "data_text_document.shards" / "team.1.rank"
    while not attendance.exists():
        time.sleep(0.01)
        assert ranks[1].poll() is None
    ranks[1].kill()
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["0\n", "", "None\n"]
    assert files(tmp_path / "data_text_document") == expected
    assert not attendance.parent.exists()


# With one worker and with two.
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_killed_at_random_moments_it_goes_on(corpus, tokenizer_path, expected, tmp_path, seed):
    generator = random.Random(seed)
    output = tmp_path / "out" / "data"
    prefix = tmp_path / "out" / "data_text_document"
    work = Path(f"{prefix}.shards")
    shards: dict[str, int] = {}
    for _ in range(3):
        process = start(tmp_path, corpus, output, tokenizer_path, workers=1 + seed % 2)
        # Starting takes as long as the work; what counts is a moment after a shard has been begun.
        while process.poll() is None and not list(work.glob("*.partial")):
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):  # all was done before
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not work.exists():  # killed, if at all, when all was done
            assert files(prefix) == expected
            return
        before, shards = shards, {path.name: path.stat().st_ino for path in work.iterdir() if not path.suffix}
        assert before.items() <= shards.items()
        if manifest_path(prefix).exists():
            assert files(prefix) == expected
        else:
            assert not all(path.exists() for path in dataset_paths(prefix)) or bytes_of(prefix) == expected[:2]
    process = start(tmp_path, corpus, output, tokenizer_path)
    assert process.communicate(timeout=60)[0] == f"{len(shards)}\n"
    assert files(prefix) == expected
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx", ".json"]


def interrupt_after(monkeypatch, chunks):
    encode = preprocessing.encode_parts
    done = []

    def encode_some(*arguments):
        if len(done) == chunks:
            raise ZeroDivisionError
        done.append(None)
        return encode(*arguments)

    monkeypatch.setattr(preprocessing, "encode_parts", encode_some)
    return done


@pytest.fixture(scope="module")
def chunks_in_all(corpus, tokenizer_path, tmp_path_factory) -> int:
    with pytest.MonkeyPatch.context() as patched:
        done = interrupt_after(patched, 10_000)
        preprocess([corpus], tmp_path_factory.mktemp("count") / "data", tokenizer_path, shard_bytes=SHARD)
    return len(done)


@pytest.mark.parametrize("chunks", [0, 1, 4, 7])
def test_finished_shards_are_not_done_again(corpus, tokenizer_path, expected, tmp_path, chunks, chunks_in_all):
    run = lambda: preprocess([corpus], tmp_path / "data", tokenizer_path, shard_bytes=SHARD)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, chunks)
        with pytest.raises(ZeroDivisionError):
            run()
    assert not list(tmp_path.glob("*.bin*"))
    with pytest.MonkeyPatch.context() as patched:
        done = interrupt_after(patched, 10_000)
        report = run()
    # A shard is one chunk here, or none where a long line covers all of it.
    assert chunks <= report.reused_shards < report.shards
    assert chunks + len(done) == chunks_in_all
    assert files(report.prefix) == expected
    if chunks:
        assert f"{report.reused_shards} of {report.shards} shards were finished by an earlier run" in str(report)
        assert report.new_text_bytes < report.text_bytes
    assert report.skipped == {"no text in 'text'": 1, "malformed JSON": 1}


def test_what_changed_is_done_again(corpus, tokenizer_path, tmp_path):
    copy = tmp_path / "in"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run = lambda output: preprocess([copy], tmp_path / output, tokenizer_path, shard_bytes=SHARD)
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(ZeroDivisionError):
            run("data")
    (copy / "000.txt").write_text("something else")
    report = run("data")
    assert 0 < report.reused_shards < 5
    assert files(report.prefix) == files(run("fresh").prefix)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tokenizer_path, tmp_path):
    """Peak memory of a process for 2 MB and for several times that, of one file without a line end, and of lines."""
    script = tmp_path / "measure.py"
    script.write_text(
        "import re, sys\nfrom pathlib import Path\nfrom megatron_ponder.data.preprocessing import preprocess\n"
        "preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], shard_bytes=1 << 22)\n"
        # not ru_maxrss, which is at least that of the process that started this one
        "print(re.search('VmHWM: *[^0-9]*([0-9]+)', Path('/proc/self/status').read_text())[1])\n"
    )

    def peak(name, content):
        (tmp_path / name).write_bytes(content)
        command = [sys.executable, script, tmp_path / name, tmp_path / "out", tokenizer_path]
        done = subprocess.run(command, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=True)
        return int(done.stdout) << 10

    text = b"many words that say nothing " * (1 << 16)
    line = json.dumps({"text": "x" * 10}).encode() + b"\n"
    lines = line * (len(text) // len(line))
    # Blocks of a large file and their segments; the rest is Python itself.
    assert peak("large.txt", text * 8) - peak("small.txt", text) < 24 << 20
    assert peak("large.jsonl", lines * 3) - peak("small.jsonl", lines) < 16 << 20


def test_without_documents_nothing_is_left(tokenizer_path, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 100)
    with pytest.raises(UserError, match=r"no documents in the input \(skipped: 100 × no text"):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "out" / "data", tokenizer_path, shard_bytes=100)
    assert list((tmp_path / "out").iterdir()) == []


def test_one_giant_document_becomes_several_sequences(tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ponder.data.token_streams.LONGEST_SEQUENCE", 1000)
    (tmp_path / "a.txt").write_text("some words " * 5000)
    report = preprocess([tmp_path / "a.txt"], tmp_path / "data", tokenizer_path)
    dataset = IndexedDataset(report.prefix)
    assert (dataset.num_documents, len(dataset)) == (1, -(-report.tokens // 1000))
    assert len(dataset.read_document(0)) == report.tokens > 10_000
    assert read_dataset_manifest(report.prefix).documents == 1
