"""The forms of attention that this machine has are all timed."""

import torch

from benchmarks.attention_forms import measure


def test_forms_of_a_cpu():
    times = measure("cpu", torch.float32, length=8, head_size=8, rounds=1)
    assert list(times) == ["sdpa", "value_side"]
    assert all(forward > 0 and both > 0 for forward, both in times.values())
