"""An average is numpy's mean, is a checkpoint like any other, and says what it is; what is not alike is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint import averaging
from megatron_ponder.checkpoint.averaging import average, checkpoints_to_average
from megatron_ponder.checkpoint.folders import point_latest
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import read_weights
from megatron_ponder.config import read_config
from megatron_ponder.data.diagnostic import write_tokenizer
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.initial_weights import build_model
from megatron_ponder.training.setup import open_parts
from tests.checkpoint.saved import save, tensors_of_a_run
from tests.finished_runs import finished_runs, tiny_arguments


def run(folder: Path, *steps: int, **overrides) -> list[Path]:
    """Checkpoints of a run, each with other weights."""
    saved = []
    for step in steps:
        tensors = {key: tensor + step for key, tensor in tensors_of_a_run(**overrides).items()}
        saved.append(save(folder / "checkpoints" / f"step-{step:08d}", tensors, step, **overrides))
    return saved


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_an_average_is_that_of_numpy(tmp_path, weights):
    folders = run(tmp_path, 3, 4, 9)
    manifest = average(folders, tmp_path / "out", weights)
    held, averaged = [read_weights(folder) for folder in folders], read_weights(tmp_path / "out")
    assert averaged.keys() == held[0].keys()
    for name, tensor in averaged.items():
        wide = [one[name].numpy().astype(np.float64) for one in held]
        want = np.average(wide, axis=0, weights=weights)
        assert np.allclose(tensor.numpy(), want, rtol=2**-23, atol=0)
    shares = np.array(weights or [1.0] * 3) / sum(weights or [1.0] * 3)
    assert manifest.averaged == pytest.approx(dict(zip(map(str, folders), shares, strict=True)))
    assert read_manifest(tmp_path / "out") == manifest
    assert (manifest.state.step, manifest.layout) == (0, {})


def test_one_checkpoint_averaged_is_itself(tmp_path):
    (folder,) = run(tmp_path, 3)
    average([folder], tmp_path / "out", [0.3])
    before, after = read_weights(folder), read_weights(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_tensors_are_made_once_each(tmp_path, monkeypatch):
    made, get = [], averaging._Averages.__getitem__
    monkeypatch.setattr(averaging._Averages, "__getitem__", lambda self, key: made.append(key) or get(self, key))
    average(run(tmp_path, 1, 2), tmp_path / "out")
    assert len(made) == len(set(made)) == len(read_weights(tmp_path / "out"))


def test_the_last_of_a_run_are_the_latest_and_those_before(tmp_path):
    first, second, third = run(tmp_path, 3, 4, 9)
    assert checkpoints_to_average([tmp_path], 2) == [second, third]
    point_latest(third.parent, second.name)  # the run has gone back
    assert checkpoints_to_average([tmp_path], 2) == checkpoints_to_average([second.parent], 2) == [first, second]
    assert checkpoints_to_average([tmp_path, third], None) == [second, third]
    for paths, last, said in (
        ([tmp_path], 3, "has 2 checkpoints up to the latest, not 3"),
        ([third], 1, "is one checkpoint; with --last name run folders"),
        ([tmp_path, second], None, "is named more than once"),
        ([tmp_path / "absent"], 2, "holds no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoints_to_average(paths, last)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model__ffn_hidden_size": 64}, "model.ffn_hidden_size is 48 in .* and 64 in .*; average checkpoints of one"),
        ({"ponder__embedding_scale": 3.0}, "ponder.embedding_scale is "),
        ({"data__reset_at_eod": "true"}, "data.reset_at_eod is False in .* and True in "),
    ],
)
def test_another_model_is_refused_by_what_differs(tmp_path, overrides, said):
    folders = [*run(tmp_path / "a", 3), *run(tmp_path / "b", 3, **overrides)]
    with pytest.raises(UserError, match=said):
        average(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(tmp_path, corpus):
    tensors, other = tensors_of_a_run(), tmp_path / "other"
    other.mkdir()
    write_tokenizer(other)
    given = {"a": corpus.tokenizer, "b": other}
    folders = [save(tmp_path / name, tensors, tokenizer=path) for name, path in given.items()]
    with pytest.raises(UserError, match=r"the tokenizers in .* differ"):
        average(folders, tmp_path / "out")


def test_what_makes_no_average_is_refused(tmp_path):
    folders = run(tmp_path, 3, 4)
    for weights, said in (
        ([1.0], "1 number for 2 checkpoints"),
        ([1.0, 0.0], "above 0"),
        ([1.0, float("nan")], "above 0"),
    ):
        with pytest.raises(UserError, match=said):
            average(folders, tmp_path / "out", weights)
    broken = tensors_of_a_run()
    broken["weight/head.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"the weight of head.weight holds 1 NaN"):
        average([folders[0], save(tmp_path / "nan", broken)], tmp_path / "out")
    less = tensors_of_a_run()
    del less["weight/head.weight"]
    with pytest.raises(UserError, match=r"differ in weight/head.weight; leave it out"):
        average([folders[0], save(tmp_path / "less", less)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "less", "nan"]
    with pytest.raises(UserError, match="exists already"):
        average(folders, tmp_path / "less")


def test_an_average_is_used_like_any_checkpoint(ponder, corpus, tmp_path):
    whole, output = finished_runs(corpus).whole, tmp_path / "averaged"
    done = ponder("average", "--checkpoint", whole, "--last", 2, "--output", output)
    assert done.code == 0, done.err
    assert "   0.5000  " in done.out
    told = ponder("inspect-checkpoint", "--checkpoint", output)
    assert told.code == 0, told.err
    assert "average of" in told.out
    assert ponder("generate", "--checkpoint", output, "--prompt", "def ", "--max-new-tokens", 2).code == 0
    assert ponder("export-hf", "--checkpoint", output, "--output", tmp_path / "hf").code == 0
    assert "| Weights averaged over | 2 checkpoints |" in (tmp_path / "hf" / "README.md").read_text()
    arguments = tiny_arguments(corpus, tmp_path / "run", checkpoint__initialize_from=output)
    config, parts = open_parts(read_config(arguments))
    model, weights = build_model(config, parts, Mesh(), output), read_weights(output)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
