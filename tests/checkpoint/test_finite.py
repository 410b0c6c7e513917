"""Values that are no numbers are counted, and refused by name."""

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.finite import not_finite, require_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_finite_tensors_pass(dtype):
    for tensor in (torch.zeros(3, 4, dtype=dtype), torch.empty(0, dtype=dtype), torch.ones((), dtype=dtype)):
        assert not_finite(tensor) == (0, 0)
        require_finite(tensor, "a tensor", "mend it")


def test_others_are_named_and_counted():
    tensor = torch.tensor([[1.0, float("nan")], [float("inf"), -float("inf")]])
    assert not_finite(tensor) == (1, 2)
    with pytest.raises(UserError, match=r"^the weight of a holds 1 NaN and 2 infinite values; take another$"):
        require_finite(tensor, "the weight of a", "take another")
