"""Decoding forwards at fixed addresses give what the definition of the model gives, and wait for nothing."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation import generator as generators
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.pool_size import fitted
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.generation.slot_numbers import bucket
from megatron_ponder.generation.static_runner import StaticRunner, padded_size
from megatron_ponder.model.exits import Exit
from tests.generation.sequential import continue_greedily
from tests.models import LEARNED, random_tokens, small_model

NEW = 5
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 37, 3)]
# So few slots that the pool runs full.
BATCHING = Batching(3, 140, prefill=Prefill(shortest=8, chunk=16))
# Waits of the host, and shapes that depend on numbers of the device.
REFUSED = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "lift_fresh", "is_nonzero"}


class NoWait(TorchDispatchMode):
    """Refuses operations for which a host waits for a device, or which a captured graph cannot hold."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        assert name not in REFUSED, name
        if name.startswith(("index", "_index")):
            indices = [index for index in torch.utils._pytree.tree_leaves(args[1:]) if isinstance(index, torch.Tensor)]
            assert not any(index.dtype in (torch.bool, torch.uint8) for index in indices), f"{name} with a mask"
        assert name != "_to_copy" or kwargs.get("device") is None, "a copy between devices"
        return function(*args, **kwargs)


@contextmanager
def waiting_for_nothing():
    """Refuses the same, and lists of numbers, which no operation gives."""
    with patch.object(torch.Tensor, "tolist", side_effect=AssertionError("tolist")), NoWait():
        yield


class Watched(StaticRunner):
    """A static runner with a pool that just suffices, whose forwards are watched."""

    def __init__(self, model, rule, rows, blocks):
        assert blocks is None
        super().__init__(model, rule, rows, fitted(model, BATCHING, 10**6)[1])
        self.forwards = 0
        self.sizes = set()

    def run(self, forward, received_TH=None):
        hidden_TH = super().run(forward, received_TH)
        if forward.prompts:
            assert len(forward) <= len(hidden_TH) == bucket(len(forward))
            self.sizes.add(len(forward))
        return hidden_TH

    def decode(self, *arguments):
        self.forwards += 1
        with waiting_for_nothing():
            return super().decode(*arguments)


@pytest.mark.parametrize(
    ("mode", "family"),
    [("adaptive", "llama"), ("pause", "llama"), ("sps", "llama"), ("loop", "gpt_neox"), ("ponderlm", "llama")]
    + [("exit", "llama")]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("fixed", "llama"), ("vanilla", "gpt_neox"))],
)
def test_replayed_forwards_equal_the_definition(mode, family, monkeypatch):
    scale = LEARNED if mode in ("adaptive", "loop") else {}
    model = small_model(
        router_scale=3.0,
        ponder__mode="fixed" if mode == "exit" else mode,
        model__family=family,
        inference__threshold=0.2,
        model__vocab_size=131,
        **scale,
    ).eval()
    rule = model.rule("hard", exit=Exit("margin", 0.002) if mode == "exit" else None)
    monkeypatch.setattr(generators, "Runner", Watched)
    with Generator(model, rule=rule, batching=BATCHING) as generator:
        sequences = [generator.submit(Request(tuple(prompt), NEW)) for prompt in PROMPTS]
        generator.run()
        generator.keep_alive()
    (runner,) = generator._runners
    assert runner.forwards > 0
    assert mode == "vanilla" or any(size < bucket(size) for size in runner.sizes)
    assert runner.cache.reserved == 0
    assert runner.cache.capacity == 32 * (5 + 3 * (model.passes.lanes + model.passes.iterated))
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        tokens, values, executed = continue_greedily(model, rule, prompt, NEW)
        assert sequence.generation.tokens == tokens
        assert sequence.generation.executed_steps == executed
        assert sequence.generation.log_probabilities == pytest.approx(values, abs=1e-9)


def test_what_waits_is_noticed():
    x = torch.arange(3)
    for waits in (lambda: x[x > 0], lambda: float(x[0]), lambda: x.nonzero(), lambda: x.tolist(), lambda: x.to("meta")):
        with pytest.raises(AssertionError), waiting_for_nothing():
            waits()


def test_a_pool_is_as_large_as_memory_allows(capsys):
    model = small_model()
    assert fitted(model, Batching(4, prefix_slots=0), 10**6) == (Batching(4, 4 * 64 * 3, prefix_slots=0), 24 + 8)
    assert fitted(model, Batching(4, 100, prefix_slots=0), 10**6) == (Batching(4, 100, prefix_slots=0), 4 + 8)
    assert capsys.readouterr().err == ""
    assert fitted(model, Batching(4, prefix_slots=320), 24) == (Batching(4, 6 * 32, prefix_slots=320), 6 + 8)
    assert "room for keys and values of 192 slots, fewer than max_slots 768; requests wait" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"room for 3 blocks of 32 .*; lower max_sequences, or share the model over"):
        fitted(model, Batching(4, prefix_slots=0), 3)


def test_sizes_are_few():
    assert [padded_size(slots) for slots in (1, 2, 3, 4, 5, 8, 9, 17)] == [1, 2, 4, 4, 8, 8, 16, 24]
    assert [bucket(slots) for slots in (1, 7, 8, 9, 128, 129, 255, 257, 1000)] == [
        8,
        8,
        8,
        16,
        128,
        144,
        256,
        288,
        1024,
    ]
    assert all(slots <= bucket(slots) <= 1.125 * slots + 8 for slots in range(1, 5000))
    assert len({bucket(slots) for slots in range(1024, 2048)}) == 9
