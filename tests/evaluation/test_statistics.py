"""Ranks and groups, against definitions that look at every pair and every member."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.evaluation.statistics import (
    equal_parts,
    explained_by_groups,
    group_means,
    mean_and_range,
    rank_correlation,
    ranks,
    standard_error,
)

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-50, 50)), min_size=2, max_size=30)


@given(PAIRS)
def test_ranks_and_their_correlation(pairs):
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    by_hand = [1 + sum(x < value for x in a) + (sum(x == value for x in a) - 1) / 2 for value in a]
    assert ranks(a).tolist() == by_hand
    got = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert got is None
    else:
        assert got == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1], abs=1e-12)


def test_correlation_sees_order_alone():
    x = np.array([0.1, 0.5, 3.0, 7.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)


@given(PAIRS)
def test_groups(pairs):
    groups, values = (np.array(side) for side in zip(*pairs, strict=True))
    members = [[v for g, v in pairs if g == group] for group in groups]
    means = group_means(values, groups)
    assert means == pytest.approx([sum(m) / len(m) for m in members])
    between = sum((value - mean) ** 2 for value, mean in zip(values, means, strict=True))
    total = sum((value - sum(values) / len(values)) ** 2 for value in values)
    got = explained_by_groups(values, groups)
    if total == 0 or len(set(groups)) == len(values):
        assert got is None
    else:
        within_variance, variance = between / (len(values) - len(set(groups))), total / (len(values) - 1)
        assert got == pytest.approx(1 - within_variance / variance)


def test_groups_that_say_all_and_groups_that_say_nothing():
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 200, 2000)
    assert explained_by_groups(groups % 3, groups) == pytest.approx(1)
    assert abs(explained_by_groups(generator.normal(size=2000), groups)) < 0.05


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.integers(1, 10))
def test_equal_parts(values, parts):
    values = np.array(values)
    part = equal_parts(values, parts)
    sizes = np.bincount(part, minlength=parts)
    assert sizes.max() - sizes.min() <= 1
    for lower in range(parts - 1):
        if (part == lower).any() and (part > lower).any():
            assert values[part == lower].max() <= values[part > lower].min()


def test_standard_error():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(np.array([5.0])) == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_a_mean_lies_in_its_range(values):
    for some in (values, values[:1] * 7):
        mean, below, above = mean_and_range(some)
        assert below >= 0
        assert above >= 0
        assert mean == pytest.approx(sum(some) / len(some), rel=1e-9, abs=1e-6)
        assert (mean - below, mean + above) == pytest.approx((min(some), max(some)), rel=1e-9, abs=1e-9)
