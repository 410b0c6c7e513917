"""A save copies to the host what this rank writes, and no more: over all ranks, every tensor of the state once."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.state import state_of
from tests.models import small_config

KINDS = ("weight", "exp_avg", "exp_avg_sq")
DATA, TENSOR = 2, 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_every_rank_copies_its_share_alone(monkeypatch, tmp_path, asynchronous):
    config = small_config(training__run_dir=tmp_path)
    copied, size = {}, None
    monkeypatch.setattr(dist, "all_gather", lambda parts, part, group: [one.copy_(part) for one in parts])
    for data in range(DATA):
        for tensor in range(TENSOR):
            mesh = Mesh(data=Axis(DATA, data), copies=Axis(DATA, data), tensor=Axis(TENSOR, tensor))
            model = PonderLM(config.model, config.ponder, mesh)
            engine = SimpleNamespace(model=model, kinds=lambda parameter: KINDS)
            engine.master = lambda parameter, kind: parameter.detach()
            size = len(KINDS) * 4 * sum(math.prod(spec.shape) for _, _, spec, _ in declarations(model))
            checkpointer = Checkpointer(config, None, (None, None), mesh)
            checkpointer._thread = object() if asynchronous else None
            own = []
            cpu = torch.Tensor.cpu
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "cpu", lambda x, own=own, cpu=cpu: own.append(x.nbytes) or cpu(x))
                patch.setattr(
                    "megatron_ponder.training.checkpointer._to_host",
                    lambda x, buffer, own=own: own.append(x.nbytes) or x.clone(),
                    raising=False,
                )
                share = checkpointer._take_share(state_of(engine))
            held = sum(x.nbytes for x in share.tensors.values())
            assert sum(own) == (held if asynchronous else 0)  # what is on the host already stays where it is
            copied[data, tensor] = held
    assert sum(copied.values()) == size
    assert max(copied.values()) < 0.6 * size
