"""Grids of parameters of tests."""

import itertools
from collections.abc import Sequence

import pytest


def in_pairs(*lists: Sequence) -> list:
    """All combinations of values of three lists or more, for `pytest.mark.parametrize`; half of them are slow.

    In those that are not, every two values of different lists still meet.
    """
    assert len(lists) > 2
    places = itertools.product(*(range(len(values)) for values in lists))
    return [
        pytest.param(
            *(values[place] for values, place in zip(lists, at, strict=True)),
            marks=() if sum(at) % 2 == 0 else pytest.mark.slow,
        )
        for at in places
    ]
