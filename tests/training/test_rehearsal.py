"""The start of a thousand ranks, without them."""

import os

import pytest
from rich.console import Console

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.model.stages import PassShapes
from megatron_ponder.training.rehearsal import miniature, rehearsal_table, rehearse
from tests.models import small_config

LAUNCH = Launch(world_size=1024, local_size=8)


def config_of(**overrides):
    """TP 8 × PP 4 × DP 32."""
    values = {
        "model__num_layers": 4,
        "model__num_heads": 8,
        "model__num_kv_heads": 8,
        "model__hidden_size": 64,
        "model__ffn_hidden_size": 128,
        "ponder__latent_steps": 1,
        "ponder_training__jacobi_iterations": 0,
        "parallel__tensor": 8,
        "parallel__pipeline": 4,
        "parallel__sequence_parallel": True,
        "parallel__zero_stage": 1,
        "training__global_batch_size": 256,
        "training__micro_batch_size": 2,
        "training__precision": "bf16",
    }
    return small_config(**(values | overrides))


def test_ranks_that_differ_start_and_take_a_step():
    config, before = config_of(), dict(os.environ)
    rehearsed = list(rehearse(config, LAUNCH))
    assert [one.rank for one in rehearsed] == [0, 512, 768, 1023]
    places = [tuple(one.places[axis] for axis in ("tensor", "data", "pipeline")) for one in rehearsed]
    assert places == [(0, 0, 0), (0, 0, 2), (0, 0, 3), (7, 31, 3)]
    # all ranks; tensor; data; pipeline; one copy of the model
    assert all(one.groups[:5] == [1024, 8, 32, 4, 32] for one in rehearsed)
    assert [one.samples for one in rehearsed] == [range(8), range(8), range(8), range(248, 256)]
    table = rehearsal_table(config, 1024, rehearsed)
    assert table.row_count == 4
    assert list(table.columns[1].cells) == ["0 0 0", "0 0 2", "0 0 3", "7 31 3"]
    assert list(table.columns[3].cells) == ["embedding", "", "head router", "head router"]
    assert table.title == "1,024 ranks: 8 tensor × 32 data × 4 pipeline; 4 micro-batches of 2 sequences a step"
    assert dict(os.environ) == before


def test_context_ranks_start_and_take_a_step():
    values = {"parallel__tensor": 2, "parallel__context": 2, "parallel__pipeline": 1, "data__reset_at_eod": True}
    first, last = rehearse(config_of(**values), Launch(world_size=16, local_size=8))
    assert (first.rank, last.rank) == (0, 15)
    assert first.groups[:4] == [16, 2, 2, 4]  # all ranks; tensor; context; data
    assert last.places == {"tensor": 1, "context": 1, "data": 3, "pipeline": 0}
    table = rehearsal_table(config_of(**values), 16, [first, last])
    assert table.title.startswith("16 ranks: 2 tensor × 2 context × 4 data × 1 pipeline; ")
    console = Console(width=118)  # as wide as a log
    with console.capture() as printed:
        console.print(table)
    assert "…" not in printed.get()


def test_what_is_rehearsed_is_narrow_and_divided_alike():
    config = config_of()
    small = miniature(config, 32)
    assert (small.model.num_layers, small.model.num_heads, small.parallel) == (4, 8, config.parallel)
    assert (small.model.hidden_size, small.training.global_batch_size) == (16, 128)
    assert small.model.hidden_size < config.model.hidden_size


def test_a_message_of_another_size_than_was_declared_is_found(monkeypatch):
    """An error that tests in one process cannot see, since nothing is sent there."""
    sizes = PassShapes.carried
    monkeypatch.setattr(PassShapes, "carried", lambda *args: [size + 1 for size in sizes(*args)])
    with pytest.raises(RuntimeError, match="rank 0 of 1024, at place 0 of the pipeline, fails at its start"):
        list(rehearse(config_of(), LAUNCH))


@pytest.mark.parametrize(
    ("launch", "overrides", "message"),
    [
        (Launch(world_size=1000, local_size=8), {}, "1000 ranks cannot be divided into groups of parallel.tensor"),
        (Launch(world_size=1024, local_size=4), {}, "parallel.tensor 8 does not divide the 4 ranks of a node"),
        (LAUNCH, {"training__global_batch_size": 32}, "is not a multiple of training.micro_batch_size 2 × 32"),
    ],
)
def test_a_layout_that_cannot_work_is_named_before_anything_starts(launch, overrides, message):
    with pytest.raises(UserError, match=message):
        next(rehearse(config_of(**overrides), launch))
