"""Each source has its share of the draws at every moment, and any draw can be found without those before it."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_ponder.data import interleave
from megatron_ponder.data.interleave import Interleave

WEIGHT = st.one_of(
    st.floats(1e-9, 1e9),
    st.integers(1, 100).map(float),
    st.sampled_from([1e-12, 1e-6, 0.1, 0.3, 0.7, 1 / 3, 1.0, 1e6]),
)
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12)


@pytest.fixture(autouse=True, scope="module")
def short_stretches():
    """So that every test crosses the seams between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "DRAWS_AT_ONCE", 97)
        yield


def first_draws(turns: Interleave, draws: int) -> list[int]:
    return [turns.locate(draw)[0] for draw in range(draws)]


@settings(max_examples=200)
@given(WEIGHTS)
@example([0.5] + [0.01] * 50)  # one large share among many small ones: largest deficit first is too early there
@example([1.0] * 12)
@example([1e-12, 1.0])
@example([3e-7, 0.4999997, 0.4, 0.1])
@example([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
def test_counts_are_less_than_one_from_the_ideal_at_every_prefix(weights):
    turns = Interleave(weights)
    exact = [Fraction(repr(weight)) for weight in weights]
    assert turns.shares == [weight / sum(exact) for weight in exact]
    period = turns.period  # shares are parts of it, which saves this test from millions of fractions
    counts = [0] * len(weights)
    for draw in range(600):
        source, before = turns.locate(draw)
        assert before == counts[source]
        counts[source] += 1
        ideal = ((draw + 1) * part for part in turns.parts)
        assert all(abs(count * period - share) < period for count, share in zip(counts, ideal, strict=True))


@given(WEIGHTS, st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_draw_does_not_depend_on_what_was_asked_before(weights, draws):
    turns = Interleave(weights)
    assert [turns.locate(draw) for draw in draws] == [Interleave(weights).locate(draw) for draw in draws]


@given(WEIGHTS, st.integers(0, 700))
def test_counts_are_those_of_the_draws(weights, draws):
    turns = Interleave(weights)
    order = first_draws(turns, draws)
    assert turns.counts(draws) == [order.count(source) for source in range(len(weights))]


@given(st.lists(st.integers(1, 20).map(float), min_size=1, max_size=6), st.integers(0, 10**12))
def test_any_draw_of_many_periods_is_found_at_once(weights, periods):
    turns = Interleave(weights)
    assert turns.period <= sum(weights)
    for draw in range(turns.period):
        source, before = turns.locate(draw)
        assert turns.locate(periods * turns.period + draw) == (source, periods * turns.parts[source] + before)
    assert turns.counts(periods * turns.period) == [periods * part for part in turns.parts]


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1], [123.456, 1e-3, 17.0, 3.3], [0.37, 0.63]])
def test_stretches_join_without_a_seam(monkeypatch, weights):
    monkeypatch.setattr(interleave, "DRAWS_AT_ONCE", 1 << 16)
    whole = Interleave(weights)
    expected = [whole.locate(draw) for draw in range(500)]
    counts = {draws: whole.counts(draws) for draws in (0, 6, 7, 8, 100, 499)}
    monkeypatch.setattr(interleave, "DRAWS_AT_ONCE", 7)
    assert [Interleave(weights).locate(draw) for draw in (499, 0, 250, 6, 7, 8)] == [
        expected[draw] for draw in (499, 0, 250, 6, 7, 8)
    ]
    parts = Interleave(weights)
    assert [parts.locate(draw) for draw in range(500)] == expected
    assert len(parts._stretches) <= interleave.STRETCHES_KEPT
    assert {draws: parts.counts(draws) for draws in counts} == counts


def test_the_order_is_pinned():
    """A change here changes the data that every resumed run of a blend reads from there on."""
    assert first_draws(Interleave([0.5, 0.3, 0.2]), 20) == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2] * 2
    assert first_draws(Interleave([1.0, 1.0]), 6) == [0, 1, 0, 1, 0, 1]


def test_weights_count_as_they_are_written():
    assert Interleave([0.1, 0.2]).parts == [1, 2]
    assert Interleave([7.0, 3.0]).parts == Interleave([0.7, 0.3]).parts == [7, 3]
    assert Interleave([1e-06, 0.999999]).period == 10**6
    assert Interleave([5.0]).period == 1
