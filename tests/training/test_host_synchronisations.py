"""The host waits for its GPU at most a few times in a step, and never in a micro-batch."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import RuleKind
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import training_rule
from tests.finished_runs import alone
from tests.models import random_tokens, small_model
from tests.training.layouts import LENGTH, MODELS, RATE, Layout, batch_of, model_for

# Operations whose result, or whose size, the host has to know before it goes on.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero"}


class Synchronisations(TorchDispatchMode):
    """Counts operations for which the host would wait, while it is entered.

    Attributes:
        counts: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(place is not None and place.dtype == torch.bool for place in places)
        sized = (kwargs or {}).get("output_size") is not None
        by_repeats = function is torch.ops.aten.repeat_interleave.Tensor and not sized
        if name in WAITING or by_mask or by_repeats:
            self.counts[name] += 1
        return function(*args, **kwargs or {})


def test_the_count_sees_what_waits():
    x = torch.tensor([1.0, 0.0])
    with Synchronisations() as seen:
        float(x[0]), bool(x[0] > 0), x[x > 0]
        torch.nn.functional.one_hot(x.long(), 3)
    assert seen.counts["index"] == 1
    assert seen.counts["_local_scalar_dense"] >= 4


@pytest.mark.parametrize("mode", ["vanilla", "adaptive", "pause", "sps", "loop", "ponderlm"])
def test_a_micro_batch_waits_for_nothing(mode):
    model = small_model(ponder__mode=mode, model__num_layers=1)
    assert waits(model, "hard" if mode == "adaptive" else "soft") == {}


def test_a_micro_batch_with_documents_waits_for_their_number():
    assert waits(small_model(model__num_layers=1, eod_id=7), "soft") == {"nonzero": 1}


def test_packed_passes_wait_for_the_number_of_their_slots():
    """Four passes, and the slots of the third that the last block finishes."""
    assert waits(small_model(model__num_layers=1), "hard", packed=True) == {"repeat_interleave": 5}


def waits(model: PonderLM, kind: RuleKind, packed: bool = False) -> Counter[str]:
    """What the host waits for, forward and backward."""
    with Synchronisations() as seen:
        objective = Objective(model, packed=packed)
        loss, sums = objective(random_tokens(2, 6), 1, model.rule(kind), 0.05, each_step=not packed)
        loss.backward()
    assert sums.isfinite().all()
    return seen.counts


def test_a_step_waits_a_few_times_however_many_micro_batches_it_has():
    counts = {}
    for stage in (0, 1):
        for micro_batches in (2, 4):
            layout = Layout()
            case = MODELS["llama adaptive"] | {"parallel__zero_stage": stage}
            case |= {"training__global_batch_size": 2 * micro_batches, "model__num_layers": 1}
            config = layout.config(case)
            with alone() as device:
                engine = Engine(Objective(model_for(config)), config, build_mesh(device, config.parallel))
                tokens = batch_of(config, 0).split(2)
                with Synchronisations() as seen:
                    engine.forward_backward(tokens, 1, training_rule(0, config), 0.05, 1 / (len(tokens) * LENGTH))
                    engine.step(RATE)
            counts[stage, micro_batches] = seen.counts
    assert counts[0, 2] == counts[0, 4] == {"_local_scalar_dense": 2}  # whether the norm is finite, and the norm
    assert counts[1, 2] == counts[1, 4] == {"_local_scalar_dense": 4}  # of DeepSpeed's own step
