"""One entry, one choice of kernel, and what estimates are told of it."""

import pytest
import torch

from megatron_ponder.kernels import attention
from megatron_ponder.kernels.attention import Call, Kernel, attend, choose
from megatron_ponder.kernels.segments import Segments


def test_another_kernel_is_a_row(monkeypatch):
    def own(q, k, v, scale, log_w, segments):
        assert log_w is None or log_w.shape == q.shape[:2]  # not folded
        return torch.full_like(q, 7)

    row = Kernel(own, lambda call: call.dtype == torch.float64 and not call.grouped and not call.segmented, block=4)
    monkeypatch.setattr(attention, "_KERNELS", (row, *attention._KERNELS))
    x, log_w, one = torch.randn(1, 4, 2, 8), torch.zeros(1, 4), Segments.of(torch.tensor([0, 4]), 4, 4)
    for weights in (None, log_w):
        assert (attend(x.double(), x.double(), x.double(), 0.3, weights) == 7).all()
        for other in (attend(x, x, x, 0.3, weights), attend(x.double(), x.double(), x.double(), 0.3, weights, one)):
            assert other.shape == x.shape and not (other == 7).any()
    assert choose(Call("cuda", torch.float64)) is row
    assert choose(Call("cuda", torch.float64, grouped=True)) is not row


def test_queries_of_the_last_slots():
    """They see what they see among the queries of all slots."""
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    log_w = torch.randn(2, 9, dtype=torch.float64)
    for weights in (None, log_w):
        every = attend(q, k, v, 0.3, weights)
        torch.testing.assert_close(attend(q[:, 5:], k, v, 0.3, weights), every[:, 5:])


@pytest.mark.parametrize(("block", "pairs"), [(1, 36), (4, 48), (512, 64)])
def test_pairs_of_whole_blocks(block, pairs):
    """8 queries see 36 keys in all; those of two blocks of 4 read 16 + 32, and one block is the whole square."""
    assert Kernel(lambda *_: None, lambda _: True, block).pairs(8) == pairs
