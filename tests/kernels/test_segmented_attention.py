"""Attention within segments against the T × T mask that the package never makes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.segmented_attention import SHORT, segmented_attention
from megatron_ponder.kernels.segments import Segments

LENGTHS = {
    "one": [70],
    "long and short": [40, 1, 2, 50, 3],
    "short ones side by side": [3, 1, 9, 2, SHORT + 1, 30, 30, 4],
    "empty ones between": [0, 5, 0, 0, 40, 0],
    "as long as their neighbours": [40, 40, 40, 9, 9, 9, 9, 9, 2, 2, 7, 40, 0, 40],
}


def segments_of(lengths: list[int]) -> Segments:
    return Segments.of(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)), sum(lengths), max(lengths))


def masked(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments) -> Tensor:
    """By a mask of all pairs."""
    places = torch.arange(len(q))
    mask = (places >= segments.starts[:, None]) & (places <= places[:, None])
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_segments_equal_the_mask(lengths, dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, 24, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn_like(inputs[0])
    results = []
    for form in (segmented_attention, masked):
        y = form(*inputs, 0.3, segments_of(lengths))
        results.append([y, *torch.autograd.grad((y * upstream).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_the_operation_is_one_that_a_compiler_can_trust():
    """Shapes and gradients as registered; one graph for any number of segments."""
    inputs = [torch.randn(12, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    segments = segments_of([5, 7])
    operation = torch.ops.megatron_ponder.segmented_attention
    torch.library.opcheck(operation, (*inputs, segments.bounds, segments.starts, 0.3))
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(segmented_attention, fullgraph=True, backend=counted, dynamic=None)
    for lengths in ([12], [5, 7], [3, 3, 6], [1, 2, 4, 5]):
        segments = segments_of(lengths)
        given = segments._replace(longest=12)
        torch.testing.assert_close(compiled(*inputs, 0.3, given), masked(*inputs, 0.3, segments))
    assert counted.frame_count <= 2  # the number of segments becomes a variable with the second


def test_nothing_grows_with_the_square_of_the_slots():
    """What is kept for the backward pass: inputs, output, a number a query and head, and the segments."""
    kept = {}
    for total in (256, 1024):
        inputs = [torch.randn(total, 2, 8, requires_grad=True) for _ in range(3)]
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes=sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = segmented_attention(*inputs, 0.3, segments_of([total // 8] * 8))
        kept[total] = sum(sizes.values())
        del y
    assert kept[1024] < 4.1 * kept[256]
