"""What does not fit together is refused before anything is written, in one line that says what to do."""

import shutil
from pathlib import Path

import pytest

from megatron_ponder.config import read_config
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.training.setup import open_parts
from tests.finished_runs import refused


@pytest.fixture(scope="module")
def other_tokenizer(corpus, tmp_path_factory) -> Path:
    """Of the same size, from other text."""
    return train_tokenizer([corpus.text], tmp_path_factory.mktemp("other") / "tokenizer", vocab_size=512).path


@pytest.fixture
def dataset(corpus, tmp_path) -> Path:
    """A copy of the corpus's dataset that a test may damage."""
    for ending in ("bin", "idx", "json"):
        shutil.copyfile(f"{corpus.dataset}.{ending}", tmp_path / f"copy.{ending}")
    return tmp_path / "copy"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        (["--data.path="], "data.path is empty", "give the prefix that ponder preprocess wrote"),
        (["--data.path=no/such"], "no/such.bin does not exist", "make one with ponder preprocess"),
        (["--data.sequence_length=999999"], "sequence longer than the data", "set data.sequence_length to at most"),
        (["--data.split=90,1,0"], "leaves no document", "give it a larger weight, or 0 to go without"),
        (["--data.split=0,1,0"], "leaves nothing to train on", "give its first part a weight"),
        (["--data.split=a,b"], 'data.split is "a,b"', "such as [969, 30, 1]"),
        (["--tokenizer.path=no/such.model"], "no/such.model does not exist", "make one with ponder train-tokenizer"),
        (["--model.vocab_size=300"], "the tokenizer has 512 tokens", "leave model.vocab_size out"),
        (["--tokenizer.path=", "--model.vocab_size=300"], "token ids up to 511", "model.vocab_size to at least 512"),
        (["--training.global_batch_size=5"], "is not a multiple of", "set training.global_batch_size to 4"),
        (
            ["--checkpoint.initialize_from=no/such"],
            "no complete checkpoint; give a run folder",
            "of a Hugging Face model",
        ),
        (["--checkpoint.resume=no/such"], "no/such holds no complete checkpoint", "give a run folder"),
    ],
)
def test_settings_that_do_not_fit(run_arguments, tmp_path, overrides, problem, remedy):
    message = refused([*run_arguments, *overrides])
    assert problem in message
    assert remedy in message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_datasets(run_arguments, tmp_path, corpus, other_tokenizer):
    message = refused([*run_arguments, f"--tokenizer.path={other_tokenizer}"])
    assert message.startswith(f"{corpus.dataset} was made with another tokenizer than {other_tokenizer}; ")
    assert "set tokenizer.path to the one it was made with" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ending", "size", "problem"),
    [
        ("bin", 1000, "copy.bin has 1000 bytes where copy.idx says"),
        ("bin", 0, "copy.bin has 0 bytes where"),
        ("idx", 200, "copy.idx has 200 bytes where its header says"),
        ("idx", 20, "copy.idx is cut short at 20 bytes"),
        ("idx", 0, "copy.idx is cut short at 0 bytes"),
        ("json", 40, "copy.json is damaged"),
    ],
)
def test_a_truncated_dataset(run_arguments, tmp_path, dataset, ending, size, problem):
    cut(Path(f"{dataset}.{ending}"), size)
    message = refused([*run_arguments, f"--data.path={dataset}"])
    assert problem in message
    assert "make the dataset again with ponder preprocess" in message
    assert not (tmp_path / "run").exists()


def test_a_dataset_from_elsewhere_needs_to_be_told_its_vocabulary(run_arguments, dataset):
    Path(f"{dataset}.json").unlink()
    arguments = [*run_arguments, f"--data.path={dataset}", "--tokenizer.path="]
    assert "model.vocab_size is not given" in refused(arguments)
    assert "set model.vocab_size to at least" in refused([*arguments, "--model.vocab_size=100"])
    assert "data.reset_at_eod needs" in refused([*arguments, "--model.vocab_size=512", "--data.reset_at_eod=true"])
    config, parts = open_parts(read_config([*arguments, "--model.vocab_size=512"]))
    assert (config.model.vocab_size, parts.tokenizer, parts.eod_id) == (512, None, None)


def test_what_fits_is_filled_in(run_arguments, corpus):
    config, parts = open_parts(read_config(run_arguments))
    assert config.model.vocab_size == parts.tokenizer.vocab_size == 512
    assert parts.eod_id == parts.tokenizer.eod_id
    assert parts.datasets.keys() == {"train", "valid"}
    without = [*run_arguments, "--tokenizer.path="]
    config, parts = open_parts(read_config(without))  # the dataset's manifest knows both
    assert (config.model.vocab_size, parts.eod_id) == (512, 2)


def test_a_larger_vocabulary_than_the_tokenizers_is_allowed(run_arguments):
    config, _ = open_parts(read_config([*run_arguments, "--model.vocab_size=576"]))
    assert config.model.vocab_size == 576
