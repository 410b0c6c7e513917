"""A run moves between layouts: what one layout saved, every other goes on from as the first would have."""

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.runs.metrics import read_metrics
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn

SAVED, STEPS = 2, 5


class Layout(NamedTuple):
    """Sizes of a layout, and what its configuration says besides."""

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    overrides: tuple[tuple[str, str], ...] = ()
    context: int = 1


LAYOUTS = {
    "alone": Layout(),
    "tensor": Layout(
        2, tensor=2, overrides=(("parallel__sequence_parallel", "true"), ("parallel__vocab_multiple", "100"))
    ),
    "pipeline": Layout(2, pipeline=2, overrides=(("checkpoint__asynchronous", "true"),)),
    "context": Layout(2, context=2),
    "context data": Layout(4, context=2, overrides=(("parallel__zero_stage", "3"),)),
    "data": Layout(2, overrides=(("parallel__zero_stage", "3"),)),
    "all": Layout(8, tensor=2, pipeline=2, overrides=(("checkpoint__asynchronous", "true"),)),
}
PAIRS = list(itertools.permutations(LAYOUTS, 2))
# A ring of the same layouts with Muon, which knows no ZeRO 3.
MUON = (("optimizer__name", "muon"), ("optimizer__muon_learning_rate", "2e-2"))
ZERO_2 = (("parallel__zero_stage", "2"),)
OF_MUON = {
    f"muon {name}": layout._replace(overrides=(*(ZERO_2 if "data" in name else layout.overrides), *MUON))
    for name, layout in LAYOUTS.items()
}
MUON_PAIRS = list(zip(OF_MUON, [*list(OF_MUON)[1:], "muon alone"], strict=True))
LAYOUTS |= OF_MUON
QUICK = [("pipeline", "tensor"), ("tensor", "data"), ("data", "pipeline"), ("tensor", "context")]


def command(corpus, run_dir: Path, layout: Layout, **overrides) -> list[str]:
    return tiny_arguments(
        corpus,
        run_dir,
        training__steps=STEPS,
        training__global_batch_size=8,
        training__batch_size_ramp="4 4 12",  # from the fourth step on
        optimizer__router_learning_rate_factor=0.3,
        training__eval_interval=STEPS,
        checkpoint__interval=SAVED,
        checkpoint__keep=9,
        ponder_training__penalty_weight=0.05,
        ponder_training__jacobi_iterations="[0,1,2,3]",
        parallel__tensor=layout.tensor,
        parallel__pipeline=layout.pipeline,
        parallel__context=layout.context,
        parallel__replica_check_interval=2,
        logging__own_losses_interval=0,
        **dict(layout.overrides),
        **overrides,
    )


def run_pairs(corpus, folder: Path, pairs: list[tuple[str, str]], **overrides) -> Path:
    """Train in every layout that is named, then move; runs of as many ranks share processes, which start slowly."""
    stayed = {
        name: command(corpus, folder / name, LAYOUTS[name], **overrides) for name in sorted({*itertools.chain(*pairs)})
    }
    moved = {}
    for source, target in pairs:
        checkpoint = folder / source / "checkpoints" / f"step-{SAVED:08d}"
        name = f"{source}-{target}"
        moved[name] = command(corpus, folder / name, LAYOUTS[target], checkpoint__resume=checkpoint, **overrides)
    together = len({LAYOUTS[name].ranks for name in stayed}) == 1
    for runs in [stayed | moved] if together else [stayed, moved]:
        for ranks in {layout.ranks for layout in LAYOUTS.values()}:
            commands = [own for name, own in runs.items() if LAYOUTS[name.split("-")[-1]].ranks == ranks]
            if commands:
                run_distributed(train_in_turn, ranks, commands, time_limit=1800)
    return folder


def check(folder: Path, source: str, target: str) -> None:
    sizes = {axis: getattr(LAYOUTS[source], axis) for axis in ("tensor", "context", "pipeline")}
    written_by = read_manifest(folder / source / "checkpoints" / f"step-{SAVED:08d}").layout
    assert sizes == {axis: written_by.get(axis, 1) for axis in sizes}
    stayed = read_metrics(folder / source)[SAVED:]
    moved = read_metrics(folder / f"{source}-{target}")
    assert [record["step"] for record in moved] == list(range(SAVED + 1, STEPS + 1))
    for expected, got in zip(stayed, moved, strict=True):
        assert got.keys() == expected.keys()
        for key in ("loss", "cross_entropy", "penalty", "grad_norm", *({"latent_scale"} & expected.keys())):
            assert got[key] == pytest.approx(expected[key], rel=1e-5), (key, expected["step"])
        for key in ("samples", "refinements", "learning_rate", "router_learning_rate", "latent_step_histogram"):
            assert got[key] == expected[key], (key, expected["step"])
    assert moved[-1]["validation_loss"] == pytest.approx(stayed[-1]["validation_loss"], rel=1e-5)
    assert len({record["refinements"] for record in stayed}) > 1


@pytest.fixture(scope="module")
def quick(corpus, tmp_path_factory) -> Path:
    # Both ends of a pipeline then hold the embedding, and a checkpoint holds it once.
    learned = {"ponder__latent_scale": "learned", "ponder__initial_latent_scale": 0.5}
    return run_pairs(corpus, tmp_path_factory.mktemp("quick"), QUICK, model__tie_embeddings="true", **learned)


@pytest.mark.parametrize(("source", "target"), QUICK)
def test_a_run_moves(quick, source, target):
    check(quick, source, target)
    scales = [record["latent_scale"] for record in read_metrics(quick / f"{source}-{target}")]
    assert len({0.5, *scales}) == 1 + len(scales), "it is learned"


@pytest.fixture(scope="module")
def every(corpus, tmp_path_factory) -> Path:
    return run_pairs(corpus, tmp_path_factory.mktemp("every"), PAIRS)


@pytest.fixture(scope="module")
def of_muon(corpus, tmp_path_factory) -> Path:
    return run_pairs(corpus, tmp_path_factory.mktemp("muon"), MUON_PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), MUON_PAIRS)
def test_a_run_by_muon_moves(of_muon, source, target):
    check(of_muon, source, target)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_run_moves_from_every_layout_to_every_other(every, source, target):
    check(every, source, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "alone" and name not in OF_MUON])
def test_every_layout_trains_the_same_run(every, name):
    alone, spread = read_metrics(every / "alone"), read_metrics(every / name)
    for expected, got in zip(alone, spread, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got["refinements"] == expected["refinements"]
