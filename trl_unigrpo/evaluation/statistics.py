"""Means with their uncertainty."""

import math
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


class CrossedInterval(NamedTuple):
    """
    A mean, its 95 % confidence interval and the two-sided p-value of "the mean is zero".

    With `seeds == 1` the interval is over prompts alone: what another seed would have changed is not in it.
    """

    mean: float
    low: float
    high: float
    p_value: float
    seeds: int
    prompts: int


def crossed_interval(values: ArrayLike, prompts: Sequence[Any] | None = None) -> CrossedInterval:
    """
    Mean of scores in which every seed was scored on the same prompts, for new seeds and for new prompts.

    Seeds and prompts are crossed random effects, y = mean + seed + prompt + rest. The variance of the mean is
    V_seed + V_prompt - V_rest, each estimated from its mean square, with Satterthwaite's degrees of freedom for the
    sum (two-way analysis of variance with random effects; Searle, Casella, McCulloch, Variance Components, 1992).
    Clustering an OLS error by both factors would subtract the prompts' variance once too often (by 1 / seeds) and
    has no degrees of freedom but seeds - 1: intervals a quarter too wide where prompts vary most.

    Args:
        values: (S, N), one row per seed.
        prompts: N labels; scores of the same label belong together. Each column is its own prompt without them.

    Raises:
        ValueError: for other shapes, for numbers that are not finite, for fewer than two prompts.
        ImportError: without scipy.
    """
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 2 or 0 in y.shape:
        raise ValueError(f"values have shape {y.shape}, expected (seeds, prompts) with at least one of each")
    if not np.isfinite(y).all():
        raise ValueError("values hold NaN or infinity: leave out what was not measured")
    labels = np.arange(y.shape[1]) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
    if len(labels) != y.shape[1]:
        raise ValueError(f"{len(labels)} prompts for {y.shape[1]} columns of values: expected one label per column")
    weight = np.bincount(labels) / y.shape[1]
    cells = np.stack([np.bincount(labels, weights=row) for row in y]) / np.bincount(labels)
    seeds, n = cells.shape
    if n < 2:
        raise ValueError("An interval needs at least two different prompts.")
    mean = float((cells @ weight).mean())
    by_seed, by_prompt = cells @ weight - mean, cells.mean(0) - mean
    v_prompt = float(((weight * by_prompt) ** 2).sum()) * n / (n - 1)
    variance, freedom = v_prompt, float(n - 1)
    if seeds > 1:
        rest = weight * (cells - mean - by_seed[:, None] - by_prompt)
        v_seed = float((by_seed**2).sum()) / (seeds * (seeds - 1))
        v_rest = float((rest**2).sum()) * n / ((n - 1) * seeds * (seeds - 1))
        variance = v_seed + v_prompt - v_rest
        if variance > max(v_seed, v_prompt):
            terms = (v_seed**2 / (seeds - 1), v_prompt**2 / (n - 1), v_rest**2 / ((seeds - 1) * (n - 1)))
            freedom = variance**2 / sum(terms)
        else:  # below one of its parts, neither of which exceeds it in expectation
            variance, freedom = max((v_seed, seeds - 1.0), (v_prompt, n - 1.0))
    t = _student_t()
    error = math.sqrt(variance)
    half = float(t.ppf(0.975, freedom)) * error
    p_value = float(2 * t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return CrossedInterval(mean, mean - half, mean + half, p_value, seeds, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    P-values corrected for their number, in the order given (Holm, 1979): all those below 0.05 hold together with at
    most 5 % chance of a single false one, whatever their dependence.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def _student_t() -> Any:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError(
            f"Intervals over seeds and prompts need scipy ({error}): pip install 'trl-unigrpo[eval]'."
        ) from error
    return t
