"""Preprocessing against a loop of the usual kind: `Pool.imap` per document into megatron-core's dataset builder.

    python benchmarks/preprocessing.py [--megabytes 20] [--workers 2] [--rounds 1] [--memory 10 40]

The corpus is the sources of Python's standard library, repeated as JSON Lines to the size asked for, with a tokenizer
trained on them. Both ways use the same tokenizer and number of worker processes, take turns, and must write the same
bytes; medians are printed. Without megatron-core the baseline is left out. The share inside the tokenizer is measured
in one process, from text to ids: it counts the tokenizer and what is kept of its results. How many parts of the text
were looked up there is printed too, and the speed of both on text that does not repeat itself. Peak memory is that of a
process which preprocesses a corpus of each of the sizes of `--memory`.
"""

import argparse
import filecmp
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from megatron_ponder.data import encoding
from megatron_ponder.data.indexed_dataset import dataset_paths, dtype_for_vocabulary
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.segment_cache import CachedEncoder
from megatron_ponder.data.segments import cut_segments
from megatron_ponder.data.text_files import TextPart
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.data.tokenizer_training import train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import in_turn, ratio, seconds

MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from megatron_ponder.data.preprocessing import preprocess
if __name__ == "__main__":
    preprocess([sys.argv[1]], sys.argv[2], sys.argv[3])
    # The kernel's other figure, ru_maxrss, is at least that of the process which started this one.
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def write_corpus(path: Path, size: int) -> None:
    """At least `size` bytes of text as JSON Lines."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    written = 0
    with path.open("w") as file:
        while written < size:
            for source in files:
                try:
                    text = source.read_bytes().decode()
                except UnicodeDecodeError:
                    continue
                if text:
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text)
                if written >= size:
                    break


@functools.lru_cache(maxsize=1)
def plain_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a worker of the baseline."""
    return load_tokenizer(path)


def encode_line(tokenizer_path: Path, line: str) -> list[int]:
    """What a worker of the baseline does with a document."""
    tokenizer = plain_tokenizer(tokenizer_path)
    return [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod_id]


def baseline(corpus: Path, prefix: Path, tokenizer_path: Path, workers: int) -> None:
    """One document at a time through a pool into megatron-core's builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = dtype_for_vocabulary(load_tokenizer(tokenizer_path).vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    with corpus.open() as file, multiprocessing.get_context("spawn").Pool(workers) as pool:
        for ids in pool.imap(functools.partial(encode_line, tokenizer_path), file, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def tokenizer_share(corpus: Path, folder: Path, tokenizer_path: Path) -> tuple[float, float]:
    """Of one process: the share of its time from text to token ids, and the share of the text's parts looked up."""
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = encoding._worker_encoder(tokenizer.path, dtype_for_vocabulary(tokenizer.vocab_size))
    encode, inside, parts = encoder.encode, 0.0, 0

    def timed(text: str) -> bytes:
        nonlocal inside
        begun = time.perf_counter()
        ids = encode(text)
        inside += time.perf_counter() - begun
        return ids

    encoder.encode = timed
    whole = seconds(lambda: preprocess([corpus], folder / "share", tokenizer_path))
    del encoder.encode
    with corpus.open() as file:
        parts = sum(len(tokenizer.separable.findall(json.loads(line)["text"])) for line in file)
    return inside / whole, 1 - encoder.misses / parts


def encoding_speeds(corpus: Path, tokenizer_path: Path) -> dict[str, float]:
    """Text without repetition per second of one process, in MB, of the tokenizer alone and with what is kept."""
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = CachedEncoder(tokenizer, dtype_for_vocabulary(tokenizer.vocab_size))
    with corpus.open() as file:
        documents = (TextPart(json.loads(line)["text"], ends_document=True) for line in file)
        texts = list(dict.fromkeys(segment.text for segment in cut_segments(documents, may_cut=True)))
    size = sum(map(len, texts)) / 1e6
    ways = {"tokenizer alone": tokenizer.encode, "new text": encoder.encode, "text seen before": encoder.encode}
    return {
        name: size / seconds(lambda encode=encode: [encode(text) for text in texts]) for name, encode in ways.items()
    }


def peak_memory(corpus: Path, folder: Path, tokenizer_path: Path) -> int:
    """Bytes that a process needs at most to preprocess a corpus."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, corpus, folder / "memory", tokenizer_path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20, help="text to preprocess")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--memory", type=int, nargs="*", default=[10, 40], help="megabytes to measure memory with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, 4_000_000)
        tokenizer = train_tokenizer([corpus], folder / "tokenizer", 4096).path
        write_corpus(corpus, arguments.megabytes * 1_000_000)
        compare(corpus, folder, tokenizer, arguments)
        share, hits = tokenizer_share(corpus, folder, tokenizer)
        print(f"inside the tokenizer: {100 * share:.1f} % of one process; {100 * hits:.1f} % of the parts looked up")
        write_corpus(corpus, min(20, arguments.megabytes) * 1_000_000)
        for name, speed in encoding_speeds(corpus, tokenizer).items():
            print(f"encoding, {name}: {speed:.2f} MB/s of one process")
        for size in arguments.memory:
            write_corpus(corpus, size * 1_000_000)
            print(f"peak memory with {size} MB: {peak_memory(corpus, folder, tokenizer) / 1e6:.0f} MB")


def compare(corpus: Path, folder: Path, tokenizer: Path, arguments: argparse.Namespace) -> None:
    """Print the time of both ways, in turns, and check that they write the same."""
    try:
        import megatron.core.datasets.indexed_dataset  # noqa: F401 - importing it is not what is measured
    except ImportError:
        print("megatron-core is not installed: no baseline")
        ways = {}
    else:
        ways = {"Pool.imap": lambda: baseline(corpus, folder / "theirs", tokenizer, arguments.workers)}
    ways["preprocess"] = lambda: preprocess([corpus], folder / "ours", tokenizer, arguments.workers)
    times = in_turn(ways, arguments.rounds, warm_up=0)
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name}: {median:.1f} s, {arguments.megabytes / median:.2f} MB/s with {arguments.workers} workers")
    if "Pool.imap" in times:
        ours, theirs = dataset_paths(folder / "ours_text_document"), dataset_paths(folder / "theirs")
        same = all(filecmp.cmp(a, b, shallow=False) for a, b in zip(ours, theirs, strict=True))
        faster = ratio(times["Pool.imap"], times["preprocess"])
        print(f"{faster:.2f} times as fast; the files are {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
