"""Names for stretches of work, which a trace shows and nothing else pays for."""

from contextlib import AbstractContextManager, nullcontext

import torch

_UNWATCHED = nullcontext()


def span(name: str) -> AbstractContextManager:
    """The block under a name in the trace of whoever profiles now; without a profiler nothing at all.

    Args:
        name: of the part of a step that the block computes.
    """
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _UNWATCHED
