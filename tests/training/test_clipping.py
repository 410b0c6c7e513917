"""Gradients that every data-parallel rank has whole: their norm, what is scaled, and what is dropped."""

import math

import pytest
import torch
from torch import nn

from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.training.clipping import clip_gradients


def parameters(*gradients: float) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(1)) for _ in gradients]
    for parameter, gradient in zip(made, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])
    return made


@pytest.mark.parametrize(("maximum", "factor"), [(10.0, 1.0), (0.0, 1.0), (2.5, 0.5)])
def test_gradients_above_the_maximum_are_scaled_down_to_it(maximum, factor):
    own = parameters(3.0, 4.0)
    assert float(clip_gradients(own, own, maximum, Axis())) == pytest.approx(5.0)
    assert [float(parameter.grad) for parameter in own] == pytest.approx([3 * factor, 4 * factor])


def test_what_another_rank_counts_is_scaled_all_the_same():
    own = parameters(3.0, 4.0)
    assert float(clip_gradients(own, own[:1], 1.5, Axis())) == pytest.approx(3.0)
    assert [float(parameter.grad) for parameter in own] == pytest.approx([1.5, 2.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_where_the_norm_is_not_finite_the_optimiser_has_nothing_to_step_with(bad):
    own = parameters(3.0, bad)
    assert not clip_gradients(own, own, 1.0, Axis()).isfinite()
    assert [parameter.grad for parameter in own] == [None, None]
