"""Sizes of the grid of ranks that generates."""

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.ranks import check_sizes
from tests.models import small_config

MODEL = small_config(model__num_layers=3, model__num_kv_heads=2).model


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size", "copies"),
    [(1, 1, 1, False), (2, 1, 2, False), (2, 3, 6, False), (1, 1, 5, True), (2, 2, 12, True)],
)
def test_sizes_that_fit(tensor, pipeline, world_size, copies):
    check_sizes(MODEL, tensor, pipeline, world_size, copies)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "world_size", "copies", "message"),
    [
        (0, 1, 1, True, "--tensor and --pipeline must be at least 1"),
        (3, 1, 3, True, "--tensor 3 does not divide the model's num_heads 4; the largest below it .* is --tensor 2"),
        (4, 1, 4, True, "--tensor 4 does not divide the model's num_kv_heads 2; .* --tensor 2"),
        (1, 5, 5, True, "--pipeline 5 leaves ranks without a layer, as the model has 3; .* --pipeline 3"),
        (2, 1, 1, True, "1 rank cannot be divided .* start a multiple of 2, .* or say --tensor 1 --pipeline 1"),
        (2, 2, 6, True, "6 ranks cannot be .* = 4 each; start a multiple of 4, .*, or say --tensor 2 --pipeline 3"),
        (2, 2, 6, False, "needs --tensor × --pipeline = 4 ranks, but there are 6; .* or say --tensor 2 --pipeline 3"),
        (1, 1, 7, False, "needs --tensor × --pipeline = 1 ranks, but there are 7; start 1, for example .* 1$"),
    ],
)
def test_sizes_that_do_not_fit(tensor, pipeline, world_size, copies, message):
    with pytest.raises(UserError, match=message):
        check_sizes(MODEL, tensor, pipeline, world_size, copies)
