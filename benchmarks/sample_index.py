"""Order of the samples, opening and random access, beside megatron-core, in one run.

    python benchmarks/sample_index.py [--documents 1000000] [--tokens 1000000000] [--sequence-length 2048] [--rounds 3]

Needs `pip install --no-deps megatron-core`. Document lengths are drawn (exponential); tokens are zeros, in a file that
takes no room on the disk. What is compared takes turns; times are medians over the rounds, memory is the growth of the
resident set at its peak. `where samples begin` is megatron-core's compiled `build_sample_idx` on the same order of the
documents, checked to be equal byte for byte; `an epoch` adds the order of documents and of samples on either side.
`open files` maps the two files; `open all for training` does whatever a run does before its first sample when another
run has built the index: fingerprint, check of the vocabulary, order of the first epoch.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from megatron_ponder.config import DataConfig
from megatron_ponder.data.dataset import TokenDataset
from megatron_ponder.data.dataset_manifest import DatasetManifest, check_vocabulary, fingerprint, write_dataset_manifest
from megatron_ponder.data.indexed_dataset import HEADER, MAGIC, VERSION, IndexedDataset, dataset_paths
from megatron_ponder.data.mixture import open_mixture
from megatron_ponder.data.sample_index import SampleIndex, sample_beginnings
from megatron_ponder.data.stamps import SECONDS_UNTIL_SETTLED

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import by_name, resident, rounds_of

CODE_OF_U2, VOCABULARY, SEED, ACCESSES = 8, 50_000, 1234, 2000


def write_dataset(prefix: Path, documents: int, tokens: int) -> None:
    """A dataset of u16 zeros, one sequence a document."""
    lengths = np.random.default_rng(SEED).exponential(tokens / documents, documents).astype("<i4") + 1
    bin_path, idx_path = dataset_paths(prefix)
    ends = np.cumsum(lengths, dtype="<i8") * 2
    with open(idx_path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, CODE_OF_U2, documents, documents + 1))
        for array in (lengths, np.concatenate(([0], ends[:-1]), dtype="<i8"), np.arange(documents + 1, dtype="<i8")):
            array.tofile(file)
    with open(bin_path, "wb") as file:
        file.truncate(int(ends[-1]))
    # Without the checksum of the tokens, which would take longer than all that is measured.
    whole = fingerprint(prefix)
    write_dataset_manifest(
        prefix, DatasetManifest("", VOCABULARY, 0, documents, int(ends[-1]) // 2, 0, fingerprint=whole)
    )


def measure(function: Callable[[], object]) -> tuple[float, int, object]:
    """Seconds, bytes of growth at the peak, and the result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that what was freed before does not serve again unseen
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    result = function()
    return time.perf_counter() - started, resident("VmHWM") - before, result


def by_turns(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, int]]:
    """Median seconds and median bytes of each form, after a round to warm up."""
    measured = by_name(rounds_of({name: lambda form=form: measure(form)[:2] for name, form in forms.items()}, rounds))
    medians = {name: tuple(map(statistics.median, zip(*results, strict=True))) for name, results in measured.items()}
    return {name: (seconds, int(size)) for name, (seconds, size) in medians.items()}


class Megatron:
    """megatron-core's data code on the same files."""

    def __init__(self, prefix: Path, sequence_length: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset
            from megatron.core.datasets.utils import Split
        self.code, self.helpers, self.opened = gpt_dataset, helpers, indexed_dataset.IndexedDataset
        self.prefix, self.sequence_length, self.split = str(prefix), sequence_length, Split.train

    def open(self):
        """Its indexed dataset."""
        return self.opened(self.prefix)

    def epoch(self, lengths: np.ndarray, tokens: int):
        """Its order of the documents, where samples begin, and order of the samples."""
        random = np.random.RandomState(SEED)
        documents = self.code._build_document_index(np.arange(len(lengths), dtype=np.int32), 1, random, False)
        beginnings = self.helpers.build_sample_idx(lengths, documents, self.sequence_length, 1, tokens)
        return documents, beginnings, self.code._build_shuffle_index(len(beginnings) - 1, len(beginnings) - 1, random)

    def dataset(self, cache: Path):
        """Its dataset of one epoch, with its index in a folder."""
        identity = OrderedDict(name="none")
        config = self.code.GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=self.sequence_length,
            blend=([self.prefix], None),
            split="1,0,0",
            path_to_cache=str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=SimpleNamespace(eod=1, pad=2, vocab_size=65536, unique_identifiers=identity),
        )
        source = self.open()
        documents = np.arange(len(source.sequence_lengths), dtype=np.int32)
        return self.code.GPTDataset(source, self.prefix, documents, None, self.split, config)


def compare(table: Table, what: str, forms: dict[str, Callable[[], object]], rounds: int, count: int = 1) -> None:
    """A row of the table; `count` is of the things that one call does, 1 for times in milliseconds."""
    results = by_turns(forms, rounds)
    (ours, our_bytes), (theirs, their_bytes) = results["ours"], results["megatron"]
    if count > 1:
        shown = [f"{count / ours:,.0f} /s", f"{count / theirs:,.0f} /s", f"{theirs / ours:.2f}"]
    else:
        shown = [f"{1e3 * ours:,.1f} ms", f"{1e3 * theirs:,.1f} ms", f"{ours / theirs:.2f}"]
    table.add_row(what, *shown, f"{our_bytes / 1e6:,.1f}", f"{their_bytes / 1e6:,.1f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.sequence_length
    table = Table(title=f"{arguments.documents:,} documents, about {arguments.tokens:,} tokens, samples of {size} + 1")
    for heading in ("", "ours", "megatron-core", "ratio", "ours [MB]", "megatron [MB]"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.caption = "ratio: ours / megatron-core, so that less is better for times and more for samples/s"
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "data"
        write_dataset(prefix, arguments.documents, arguments.tokens)
        megatron = Megatron(prefix, size)
        compare(
            table, "open files", {"ours": lambda: IndexedDataset(prefix), "megatron": megatron.open}, arguments.rounds
        )

        lengths = np.array(IndexedDataset(prefix).sequence_lengths)
        tokens = int(lengths.sum(dtype=np.int64))
        documents = np.random.default_rng(SEED).permutation(len(lengths)).astype(np.int32)
        forms = {
            "ours": lambda: sample_beginnings(lengths, documents, size, tokens),
            "megatron": lambda: megatron.helpers.build_sample_idx(lengths, documents, size, 1, tokens),
        }
        assert forms["ours"]().tobytes() == forms["megatron"]().tobytes()
        compare(table, "where samples begin", forms, arguments.rounds)
        forms = {
            "ours": lambda: SampleIndex(lengths, size, SEED).prepare(0),
            "megatron": lambda: megatron.epoch(lengths, tokens),
        }
        compare(table, "an epoch", forms, arguments.rounds)

        data = DataConfig(str(prefix), split="1", sequence_length=size, cache_path=str(Path(name) / "cache"))

        def ours() -> TokenDataset:
            dataset = open_mixture(data, SEED).samples["train"]
            check_vocabulary(prefix, VOCABULARY)
            dataset.prepare(0)
            return dataset

        def theirs():
            return megatron.dataset(Path(name) / "megatron")

        ours()
        time.sleep(SECONDS_UNTIL_SETTLED)  # as in any run but the first; see `Stamps`
        compare(table, "open all for training", {"ours": ours, "megatron": theirs}, arguments.rounds)
        datasets = {"ours": ours(), "megatron": theirs()}
        positions = np.random.default_rng(0).integers(0, datasets["ours"].samples_per_epoch - 1, ACCESSES).tolist()
        forms = {
            "ours": lambda: [torch.from_numpy(datasets["ours"][position]) for position in positions],
            "megatron": lambda: [datasets["megatron"][position] for position in positions],
        }
        compare(table, "samples, random access", forms, arguments.rounds, ACCESSES)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
