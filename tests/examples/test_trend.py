"""Plain models and what branches off from them: configurations, equal operations, the table."""

import shutil

import pytest

from megatron_ponder.checkpoint.folders import MANIFEST, checkpoint_name
from megatron_ponder.config import read_config
from megatron_ponder.runs.metrics import of_steps, read_metrics
from tests import REPOSITORY

PARETO = REPOSITORY / "examples" / "pareto"


@pytest.fixture
def trend(monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    import trend

    return trend


def test_latents_begin_where_they_are_to_and_never_in_a_plain_model(trend):
    begun = trend.latents(800, 900, decides=True)
    assert begun["ponder_training.latent_start"] == 800 < begun["ponder_training.router_start"]
    assert begun["ponder_training.router_start"] < begun["ponder_training.prune_start"] == 850
    undecided = trend.latents(800, 900)
    assert (undecided["ponder_training.latent_start"], undecided["ponder_training.router_start"]) == (800, 900)
    never = trend.latents(900, 900)
    assert {name: step for name, step in never.items() if step != 900} == {"ponder_training.latent_warmup": 0}


def test_a_trunk_keeps_what_something_branches_off_from(trend, tmp_path):
    trunk = trend.Trunk(3, 1, [200, 300, 700], tmp_path, tmp_path)
    config = read_config(trunk.run.arguments)
    assert (config.model.num_layers, config.training.steps, config.training.seed) == (3, 700, 1)
    assert (config.checkpoint.interval, config.checkpoint.keep) == (100, 7)
    assert config.ponder_training.latent_start == 700
    for step in (200, 300, 700):
        assert not trunk.finished
        folder = trunk.run.folder / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / MANIFEST).touch()
    assert trunk.finished and trend.Trunk(3, 1, [300], tmp_path, tmp_path).finished


def test_a_share_of_no_steps_is_refused(trend, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        trend.main(["--output", str(tmp_path / "out"), "--at", "200", "4000", "--share", "0.5", "0.001"])
    assert refused.value.code == 2
    assert "--at 200 with --share 0.001 has no steps; give more of one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_has_means_over_seeds(trend, tmp_path):
    pairs = {
        trend.Place(1, "fixed", 80, 0.125): [
            trend.Pair(3.0, 3.1, 30, 10, 0.5, 1.0),
            trend.Pair(3.2, 3.3, 32, 10, 0.7, 1.2),
        ],
        trend.Place(2, "adaptive", 80, 0.125): [trend.Pair(2.5, 2.4, 31, 10, 0.9, 0.9)],
    }
    lines = trend.write(pairs, tmp_path).splitlines()
    assert lines[2] == "| 1 | fixed | 80 | 10 | 31 | 3.100 ± 0.141 | 3.200 ± 0.141 | 0.100 ± 0.000 | 0.60 | 1.10 |"
    assert lines[3].startswith("| 2 | adaptive | 80 | 10 | 31 |")
    assert lines[3].endswith("| 2.500 | 2.400 | -0.100 | 0.90 | 0.90 |")
    assert (tmp_path / "trend.md").read_text() == "\n".join(lines) + "\n"
    assert (tmp_path / "trend.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fixed", "adaptive"])
def test_both_branches_go_on_from_the_trunk_for_equal_operations(way, trend, tmp_path, corpus):
    data = tmp_path / "data"
    data.mkdir()
    for ending in ("bin", "idx", "json"):
        shutil.copyfile(f"{corpus.dataset}.{ending}", data / f"corpus_text_document.{ending}")
    shutil.copyfile(corpus.tokenizer, data / "tokenizer.model")
    trunk = trend.Trunk(1, 0, [16, 32], tmp_path, data)
    trend.train([trunk.run], 1)
    pair = trunk.branch(trend.Place(1, way, 32, 0.125))
    names = (f"{way}-32-4", f"vanilla-32-{pair.plain}")
    latent, plain = (of_steps(read_metrics(tmp_path / "runs" / f"layers1-seed0-{name}")) for name in names)
    assert (len(latent), len(plain)) == (4, pair.plain)
    operations = [sum(record["model_flops"] for record in records) for records in (latent, plain)]
    assert operations[1] == pytest.approx(operations[0], abs=plain[0]["model_flops"] / 2)
    assert latent[0]["samples"] == plain[0]["samples"] == 4 * 33
    assert [records[-1]["mean_latent_steps"] > 0 for records in (latent, plain)] == [True, False]
    if way == "fixed":
        assert pair.steps == latent[-1]["mean_latent_steps"] == 1
