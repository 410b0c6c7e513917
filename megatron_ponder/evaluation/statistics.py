"""Ranks, groups and their means."""

import statistics
from collections.abc import Sequence

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every value from 1 on; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's ρ: the correlation of the ranks; None if one side is the same everywhere."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Every value replaced by the mean of its group."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return (np.bincount(inverse, values) / counts)[inverse]


def explained_by_groups(values: np.ndarray, groups: np.ndarray) -> float | None:
    """Share of the variance of `values` that lies between groups, corrected for how many groups there are.

    Without the correction, 1 - (n - 1) / (n - g) · (1 - share), groups of one member would explain themselves.

    Returns:
        At most 1, around 0 if the groups say nothing; None if there is no variance, or a group for every value.
    """
    count, groups_count = len(values), len(np.unique(groups))
    total = ((values - values.mean()) ** 2).sum()
    if total == 0 or count == groups_count:
        return None
    within = ((values - group_means(values, groups)) ** 2).sum()
    return float(1 - (within / (count - groups_count)) / (total / (count - 1)))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and how far below it the least value lies and above it the largest: never negative, rounded or not."""
    least, largest = min(values), max(values)
    mean = min(max(statistics.fmean(values), least), largest)
    return mean, mean - least, largest - mean


def equal_parts(values: np.ndarray, parts: int) -> np.ndarray:
    """The part of every value, from 0 on, when all are sorted and cut into parts of equal size."""
    order = np.argsort(values, kind="stable")
    part = np.empty(len(values), dtype=np.int64)
    part[order] = np.arange(len(values)) * parts // len(values)
    return part
