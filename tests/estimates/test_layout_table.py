"""The table that is printed at the start."""

import pytest

from megatron_ponder.config import read_config
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank


def test_the_table():
    config = read_config(
        [
            "--model.vocab_size=32000",
            "--parallel.tensor=2",
            "--parallel.pipeline=3",
            "--parallel.sequence_parallel=true",
            "--training.recompute=block",
            "--training.global_batch_size=192",
        ]
    )
    lines = describe_layout(config, 2, "cpu").splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == (
        "12 ranks: 2 tensor × 2 data × 3 pipeline; ZeRO 1, bf16, sequence parallel, recompute block, 1f1b"
    )
    assert lines[1:4] == [
        "a step: 192 sequences, 393,216 tokens, 1,179,648 latent slots",
        "a micro-batch: 8 sequences, 6 to 7 passes of 18 to 22 slots a token",
        "each data rank: 12 micro-batches, 19 to 23 forward passes in flight on a pipeline rank",
    ]
    rows = [line.split() for line in lines[-3:]]
    assert [row[:2] for row in rows] == [["0", "0–3"], ["1", "4–7"], ["2", "8–11"]]
    assert "embedding" in rows[0]
    assert rows[2][2:4] == ["head", "router"]
    for place, row in enumerate(rows):
        rank = Rank(config, data=2, pipeline_rank=place)
        memory = memory_estimate(rank)
        assert f"{rank.part.count / 1e6:.1f}M" in row
        assert row[-1] == f"{memory.total / 2**30:.2f}"
        assert float(row[-1]) == pytest.approx(sum(map(float, row[-6:-1])), abs=0.03)


def test_the_table_of_one_process():
    config = read_config(["--model.vocab_size=100", "--ponder.mode=vanilla", "--training.global_batch_size=8"])
    text = describe_layout(config, 1, "cpu")
    assert text.startswith("1 rank: 1 tensor × 1 data × 1 pipeline; ZeRO 1, bf16\n")
    assert ", 0 latent slots\na micro-batch: 8 sequences, 1 pass of 1 slot a token\n" in text
    assert "in flight" not in text
