"""The global batch of a step is a function of the samples before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import data_parallel_size, read_config
from megatron_ponder.config.batch_sizes import batch_size, batch_sizes, samples_of, steps_of
from megatron_ponder.config.run import BatchRampConfig, TrainingConfig


@st.composite
def trainings(draw) -> TrainingConfig:
    """A ramp of a few sizes, or none."""
    start, increment, sizes = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(st.integers(1, 6))
    samples = draw(st.integers(1, 500))
    ramp = draw(st.sampled_from([None, BatchRampConfig(start, increment, samples)]))
    return TrainingConfig(global_batch_size=start + increment * sizes, batch_size_ramp=ramp)


def megatrons(ramp: BatchRampConfig, full: int, consumed: int) -> int:
    """The global batch by Megatron-LM's rule: equal parts of the samples, one for each increment."""
    each = ramp.samples / ((full - ramp.start) / ramp.increment)
    return full if consumed > ramp.samples else ramp.start + int(consumed / each) * ramp.increment


@given(trainings(), st.integers(0, 60), st.integers(0, 30))
def test_samples_of_steps_are_those_of_one_after_another(training, first, steps):
    sizes, consumed = [], [0]
    for _ in range(first + steps):
        sizes.append(batch_size(training, consumed[-1]))
        consumed.append(consumed[-1] + sizes[-1])
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(batch_sizes(training))
    assert samples_of(training, first) == consumed[first]
    assert samples_of(training, steps, consumed[first]) == consumed[-1] - consumed[first]
    assert steps_of(training, consumed[-1]) == pytest.approx(first + steps)
    if training.batch_size_ramp is None:
        assert set(sizes) <= {training.global_batch_size}


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 99), st.integers(0, 10_000))
def test_a_ramp_is_megatrons(start, increment, sizes, part, consumed):
    ramp = BatchRampConfig(start, increment, samples=part * sizes)  # whole parts, which floats divide without an error
    full = start + increment * sizes
    training = TrainingConfig(global_batch_size=full, batch_size_ramp=ramp)
    assert batch_size(training, consumed) == megatrons(ramp, full, consumed)


def config(ramp: str, **overrides):
    given = {"training__batch_size_ramp": ramp, "training__global_batch_size": 8, "training__micro_batch_size": 1}
    return read_config([f"--{key.replace('__', '.')}={value}" for key, value in (given | overrides).items()])


@pytest.mark.parametrize("written", ["{start: 2, increment: 3, samples: 90}", "2 3 90", "[2, 3, 90]"])
def test_ways_to_write_a_ramp(written):
    assert config(written).training.batch_size_ramp == BatchRampConfig(2, 3, 90)
    assert config("null").training.batch_size_ramp is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{start: 2, increment: 2}", "training.batch_size_ramp has no samples; give it one"),
        ("{start: 2, increment: 2, sample: 9}", "has start, increment, samples, and no sample"),
        ("{start: two, increment: 2, samples: 9}", "training.batch_size_ramp is {"),
        ("{start: 2, increment: 2, samples: 0}", "training.batch_size_ramp.samples is 0; its range is 1 to 1e12"),
        ("fast", "training.batch_size_ramp is fast; write {start: NUMBER, increment: NUMBER, samples: NUMBER}"),
        ("2 4 90", "which is no whole number of increments of 4; choose a divisor of 6"),
        ("8 1 90", "starts with 8 sequences, and training.global_batch_size is 8; start with fewer"),
    ],
)
def test_ramps_that_cannot_be(written, said):
    with pytest.raises(UserError) as caught:
        config(written)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_of_a_ramp_are_few_enough_to_be_looked_at():
    with pytest.raises(UserError, match=r"has 1,001 increments, and at most 1,000 are looked at; choose a larger one$"):
        config("1 1 90", training__global_batch_size=1002)


def test_every_size_has_to_be_shared_by_the_ranks():
    assert data_parallel_size(config("4 4 90"), 4) == 4
    with pytest.raises(
        UserError, match=r"^the global batch 2 of training.batch_size_ramp is not a multiple of .* 4 da"
    ):
        data_parallel_size(config("2 2 90"), 4)
    pipeline = {"parallel__pipeline": 4, "training__global_batch_size": 12}
    assert data_parallel_size(config("4 4 90", **pipeline), 4) == 1
    with pytest.raises(UserError, match=r"the global batch 9 of .* divide into the 2 rounds .* as multiples of 4$"):
        data_parallel_size(config("3 3 90", **pipeline), 4)
