"""Training on blends: a run that goes on may change phases that it has not reached, and nothing else of its data."""

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import read_config_of
from megatron_ponder.config import read_config
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.resuming import check_resumable
from megatron_ponder.training.setup import open_parts
from tests.distributed import run_distributed
from tests.finished_runs import LATEST, finished_runs, refused, tiny_arguments, train_in_turn


@pytest.fixture(scope="module")
def runs(corpus):
    return finished_runs(corpus)


def blend(*parts) -> str:
    return "[" + ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in parts) + "]"


def phases(*given) -> str:
    return "[" + ", ".join(f"{{first_sample: {first}, path: {path}}}" for first, path in given) + "]"


def go_on(folder, arguments):
    """What a run from a checkpoint does first."""
    config, parts = open_parts(read_config(arguments))
    return check_resumable(folder, read_config_of(folder), config, parts.data_fingerprint, None)


def test_a_run_of_one_dataset_may_get_phases_from_where_it_stands_on(corpus, runs, tmp_path):
    folder = runs.whole / "checkpoints" / LATEST  # after 32 samples
    for first in (32, 33, 10**6):
        changed = tiny_arguments(corpus, tmp_path, data__phases=phases((first, runs.other_dataset)))
        assert go_on(folder, changed).state.samples == 32
    for first in (1, 31):
        changed = tiny_arguments(corpus, tmp_path, data__phases=phases((first, runs.other_dataset)))
        with pytest.raises(
            UserError, match=r"the data are not those .*: a dataset, a weight, a phase that has begun, "
        ):
            go_on(folder, changed)
    mixed = blend((corpus.dataset, 1), (runs.other_dataset, 1))
    with pytest.raises(UserError, match="the data are not those"):
        go_on(folder, tiny_arguments(corpus, tmp_path, data__path=mixed))
    alone = tiny_arguments(corpus, tmp_path, data__path=blend((corpus.dataset, 0.5)))
    assert go_on(folder, alone).state.samples == 32


def test_datasets_of_different_tokenizers(corpus, runs, tmp_path, other_dataset):
    mixed = f'[{{path: {corpus.dataset}}}, {{path: {other_dataset}, split: "1"}}]'
    message = refused(tiny_arguments(corpus, tmp_path / "run", data__path=mixed))
    assert message.startswith(f"{other_dataset} was made with another tokenizer than {corpus.tokenizer}; ")
    message = refused(tiny_arguments(corpus, tmp_path / "run", data__path=mixed, tokenizer__path=""))
    assert message.startswith(f"{other_dataset} was made with another tokenizer than {corpus.dataset}; ")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def other_dataset(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    tokenizer = train_tokenizer([corpus.text], folder / "tokenizer", vocab_size=512).path
    return preprocess([corpus.text], folder / "other", tokenizer).prefix


@pytest.mark.slow
def test_a_run_on_a_blend_that_changes_its_future_on_the_way(corpus, runs, tmp_path):
    """4 samples a step: the second phase begins after step 4, a third, added at step 6, after step 7."""
    path = blend((corpus.dataset, 0.7), (runs.other_dataset, 0.3))
    first, second = (16, runs.other_dataset), (28, corpus.dataset)
    options = {"data__path": path, "data__cache_path": tmp_path / "cache", "data__num_workers": 1}
    options |= {"checkpoint__interval": 6}
    straight = tiny_arguments(corpus, tmp_path / "straight", data__phases=phases(first, second), **options)
    begun = tiny_arguments(corpus, tmp_path / "run", data__phases=phases(first), training__steps=6, **options)
    resumed = tiny_arguments(
        corpus, tmp_path / "run", data__phases=phases(first, second), checkpoint__resume="auto", **options
    )
    # The learning rate follows the length of the run, so that only the records' samples and losses at first agree.
    run_distributed(train_in_turn, 1, [straight, begun, resumed], time_limit=300)
    assert [record["samples"] for record in read_metrics(tmp_path / "run")] == list(range(4, 36, 4))
    manifest = read_manifest(resolve_checkpoint(tmp_path / "run"))
    assert manifest.state.samples == 32
    assert manifest.data_fingerprint == read_manifest(resolve_checkpoint(tmp_path / "straight")).data_fingerprint
    assert manifest.data_fingerprint.count(",") == 2

    changed = tiny_arguments(
        corpus, tmp_path / "run", data__phases=phases((20, runs.other_dataset)), checkpoint__resume="auto", **options
    )
    assert "a phase that has begun" in refused(changed)
    assert len(list((tmp_path / "cache").iterdir())) >= 3
