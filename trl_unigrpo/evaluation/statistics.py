"""Means with their uncertainty."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval over `n` independent clusters."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: ArrayLike, clusters: Sequence[Any] | None = None) -> Interval:
    """
    Mean of `values` with a normal 95 % interval, robust to values of one cluster (such as one prompt) being alike.

    Args:
        values: (N,) numbers.
        clusters: N labels; each value is its own cluster without them.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("No values: an interval needs at least one.")
    index = np.arange(len(x)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    residuals = np.bincount(index, weights=x - x.mean())
    n = len(residuals)
    error = np.sqrt((residuals**2).sum() * n / max(n - 1, 1)) / len(x)
    half = 1.959964 * float(error) if n > 1 else float("inf")
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, n)
