"""Modes have looks of their own."""

from typing import get_args

from megatron_ponder.config.ponder import Mode
from megatron_ponder.runs.style import COLOURS, FURTHER_MARKERS, MARKERS, look, merged_labels


def test_a_mode_has_one_colour_and_one_marker_that_no_other_has():
    modes = set(get_args(Mode))
    assert COLOURS.keys() == MARKERS.keys() <= modes
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(COLOURS)
    assert not set(MARKERS.values()) & set(FURTHER_MARKERS)


def test_a_mode_without_a_colour_is_drawn_too():
    first, second = look("another"), look("another", 1)
    assert first["color"] == second["color"] not in COLOURS.values()
    assert first["marker"] != second["marker"] and first["marker"] not in MARKERS.values()


def test_further_models_of_a_mode_keep_its_colour():
    looks = [look("adaptive", number) for number in range(5)]
    assert {one["color"] for one in looks} == {COLOURS["adaptive"]}
    assert len({one["marker"] for one in looks}) == 5


def test_labels_that_would_cover_each_other_become_one():
    assert merged_labels([(1.0, "b"), (0.0, "a")], character=0.1) == [(0.0, "a"), (1.0, "b")]
    assert merged_labels([(0.1, "b"), (0.0, "a"), (0.9, "c")], character=0.1) == [(0.05, "a, b"), (0.9, "c")]
    # What has become one is wider, and may reach what its parts did not.
    assert merged_labels([(0.0, "a"), (0.1, "b"), (0.35, "c")], character=0.1)[0][1] == "a, b, c"
    assert merged_labels([], character=0.1) == []
