"""A few files of Python's standard library as a dataset, for what measures anything but the data."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer_training import train_tokenizer


class SmallCorpus(NamedTuple):
    """What `tests.finished_runs.tiny_arguments` reads, too.

    Attributes:
        tokenizer: of 512 tokens.
        dataset: prefix of the indexed dataset.
    """

    tokenizer: Path
    dataset: Path


def small_corpus(folder: Path) -> SmallCorpus:
    """Make it in a folder."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    tokenizer = train_tokenizer(files, folder / "tokenizer", vocab_size=512).path
    return SmallCorpus(Path(tokenizer), Path(preprocess(files, folder / "text", tokenizer, workers=1).prefix))
