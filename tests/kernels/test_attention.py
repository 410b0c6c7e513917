"""One entry, one choice of kernel, and what estimates are told of it."""

import pytest
import torch

from megatron_ponder.kernels import attention
from megatron_ponder.kernels.attention import Call, Kernel, attend, choose


def test_another_kernel_is_a_row(monkeypatch):
    def own(q, k, v, scale, mask, causal):
        return torch.full_like(q, 7)

    row = Kernel(own, lambda call: call.dtype == torch.float64 and not call.grouped and not call.masked, block=4)
    monkeypatch.setattr(attention, "_KERNELS", (row, *attention._KERNELS))
    x = torch.randn(1, 4, 2, 8)
    visible = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert (attend(x.double(), x.double(), x.double(), 0.3, None, causal=True) == 7).all()
    for other in (attend(x, x, x, 0.3, None, True), attend(x.double(), x.double(), x.double(), 0.3, visible, False)):
        assert not (other == 7).any()
    assert choose(Call("cuda", torch.float64)) is row
    assert choose(Call("cuda", torch.float64, grouped=True)) is not row


@pytest.mark.parametrize(("block", "pairs"), [(1, 36), (4, 48), (512, 64)])
def test_pairs_of_whole_blocks(block, pairs):
    """8 queries see 36 keys in all; those of two blocks of 4 read 16 + 32, and one block is the whole square."""
    assert Kernel(lambda *_: None, lambda _: True, block).pairs(8) == pairs
