"""Which documents are for training, validation and testing."""

import math
from collections.abc import Sequence

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.data import SPLITS


def split_text(split: Sequence[float] | str) -> str:
    """Weights of train, valid and test as one text: [969, 30, 1] gives "969,30,1"."""
    return split if isinstance(split, str) else ",".join(f"{weight:.12g}" for weight in split)


def parse_split(split: str) -> dict[str, float]:
    """The share of each split that has a weight: "969,30,1" gives 0.969, 0.03 and 0.001; missing weights are 0.

    Raises:
        UserError: not one to three non-negative numbers with a positive sum.
    """
    try:
        weights = [float(weight) for weight in split.split(",")]
    except ValueError:
        weights = []
    total = sum(weights)
    if not 1 <= len(weights) <= len(SPLITS) or min(weights) < 0 or not 0 < total < math.inf:
        raise UserError(f'data.split is "{split}"; write weights of train, valid and test such as [969, 30, 1]')
    return {name: weight / total for name, weight in zip(SPLITS, weights, strict=False) if weight > 0}


def split_documents(num_documents: int, split: str) -> dict[str, range]:
    """Contiguous ranges of documents in the proportion of `split`, which together hold every document once.

    A split of weight 0 is absent; one whose share is less than half a document may be empty.

    Raises:
        UserError: see `parse_split`.
    """
    ranges: dict[str, range] = {}
    share = 0.0
    start = 0
    for name, weight in parse_split(split).items():
        share += weight
        stop = round(share * num_documents)
        ranges[name] = range(start, stop)
        start = stop
    return ranges
