"""Whether a kernel computes its backward pass itself, which is the reason for most kernels."""

import torch


def own_backward() -> bool:
    """Whether to use a kernel's own backward pass: there may be one, and no compiler that makes a better one.

    Inference has none; under `torch.compile` the kernel composes PyTorch's operations, which are differentiated and
    fused there. A compiler cannot trace the question about inference, so that it is asked second.
    """
    return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
