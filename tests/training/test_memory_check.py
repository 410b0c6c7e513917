"""A run that cannot fit into the memory there is does not start, unless told to."""

import math

import psutil
import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import read_config
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.training import memory_check, trainer
from megatron_ponder.training.memory_check import check_memory, memory_of_a_rank
from tests.finished_runs import refused, tiny_arguments

CPU = torch.device("cpu")


def test_a_hopeless_run_is_refused_before_it_takes_anything(corpus, tmp_path):
    sizes = {"training__micro_batch_size": 2**20, "training__global_batch_size": 2**20, "model__num_layers": 256}
    message = refused(tiny_arguments(corpus, tmp_path / "run", **sizes))
    assert "the expected peak of a rank is " in message
    assert f"has {memory_of_a_rank(CPU) / 2**30:,.1f}" in message
    for remedy in ("training.micro_batch_size", "training.recompute", "training.allow_memory_overcommit true"):
        assert remedy in message
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_this_machine_lacks_is_refused_before_the_run(corpus, tmp_path):
    message = refused(tiny_arguments(corpus, tmp_path / "run", training__attention_kernel="triton"))
    assert message == "training.attention_kernel triton needs a GPU; set training.attention_kernel to auto"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("share", "end"), [(0.8, "fits"), (1.0, "doubtful"), (2.9, "doubtful"), (3.1, "refused")])
@pytest.mark.parametrize("allowed", [False, True])
def test_what_is_done_at_which_share_of_the_memory(corpus, tmp_path, monkeypatch, share, end, allowed):
    arguments = tiny_arguments(
        corpus, tmp_path / "run", model__vocab_size=512, training__allow_memory_overcommit=str(allowed).lower()
    )
    config = read_config(arguments)
    peak = memory_estimate(Rank(config, 1, 0, "cpu")).total
    monkeypatch.setattr(memory_check, "memory_of_a_rank", lambda device: peak / share)
    if end == "refused" and not allowed:
        with pytest.raises(UserError):
            check_memory(config, 1, CPU)
    else:
        warning = check_memory(config, 1, CPU)
        assert (warning is None) == (end == "fits")
        assert warning is None or warning.endswith("it may end for want of memory")


def test_a_doubtful_run_is_warned_of_before_its_model_takes_memory(corpus, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise UserError("the model would be built now")

    monkeypatch.setattr(trainer, "build_model", refuse)
    monkeypatch.setattr(memory_check, "memory_of_a_rank", lambda device: 2**20)
    arguments = tiny_arguments(corpus, tmp_path / "run", training__allow_memory_overcommit="true")
    assert refused(arguments) == "the model would be built now"
    assert "it may end for want of memory" in caplog.text


def test_ranks_of_a_host_share_what_its_control_group_allows(tmp_path, monkeypatch):
    whole = memory_of_a_rank(CPU)
    assert 0 < whole <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert memory_of_a_rank(CPU) == whole / 4
    monkeypatch.setattr(memory_check, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert math.isclose(memory_of_a_rank(CPU) * 4, psutil.virtual_memory().total)
    (tmp_path / "memory.max").write_text(f"{2**20}\n")
    assert memory_of_a_rank(CPU) * 4 == 2**20
