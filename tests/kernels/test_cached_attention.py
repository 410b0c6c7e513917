"""Attention over keys in any order beside its definition."""

import pytest
import torch

from megatron_ponder.kernels.cached_attention import VisibleKeys, attend_seen


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_every_query_sees_its_own_keys(dtype, tolerance, weighted):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 4, 8), (2, 9, 8), (2, 9, 8)))
    log_w = -3 * torch.rand(9, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    seen = torch.rand(3, 9, generator=generator) < 0.5
    seen[:, 4] = True
    y = attend_seen(q, k, v, 8**-0.5, VisibleKeys.of(seen, log_w if weighted else None, k))
    keys, values = (x.double().repeat_interleave(2, 0) for x in (k, v))
    logits = q.double().transpose(0, 1) @ keys.transpose(1, 2) * 8**-0.5 + (log_w.double() if weighted else 0)
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    assert (y.double() - expected.transpose(0, 1)).abs().max() < tolerance
