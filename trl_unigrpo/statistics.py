"""Means with their uncertainty."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

NORMAL_95 = 1.959964
"""Standard errors on each side of a mean in its normal 95 % interval."""


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval over `n` independent clusters."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def error(self) -> float:
        """The mean's standard error."""
        return (self.high - self.mean) / NORMAL_95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: ArrayLike, clusters: Sequence[Any] | None = None) -> Interval:
    """
    Average `values`, with a normal 95 % interval robust to values of one cluster (such as one prompt) being alike.

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
    half = NORMAL_95 * float(error) if n > 1 else float("inf")
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, n)


def stratified_interval(
    values: ArrayLike,
    strata: Sequence[Any],
    clusters: Sequence[Any],
    shares: Mapping[Any, float] | None = None,
    weights: ArrayLike | None = None,
) -> Interval:
    """
    Average the means of strata (such as a benchmark's tasks) by their shares, with a normal 95 % interval.

    With value x, weight w and share s of each stratum t:

        mean     = sum_t s_t mean_t,  mean_t = sum w x / sum w over the stratum
        variance = sum over clusters of (sum_t s_t sqrt(n_t / (n_t - 1)) sum w (x - mean_t) / sum_t w)^2

    the linearised variance of a mean of ratios. One stratum without weights is [`mean_interval`]; strata whose
    clusters are apart add up their variances.

    Args:
        values: (N,) numbers.
        strata: N labels.
        clusters: N labels, such as prompts; a cluster may lie in several strata.
        shares: of each stratum in the mean; the same for all without them.
        weights: (N,) above 0, such as the number of questions that a value is the mean of.

    Raises:
        ValueError: without values, or for shares that are not those of exactly these strata.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    names = list(dict.fromkeys(strata))
    if not names:
        raise ValueError("No values: an interval needs at least one.")
    shares = dict.fromkeys(names, 1 / len(names)) if shares is None else shares
    if set(shares) != set(names):
        raise ValueError(f"Shares of {sorted(map(str, shares))} for values of {sorted(map(str, names))}.")
    places = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[name] for name in clusters])
    labels = np.array([names.index(name) for name in strata])
    mean, influence = 0.0, np.zeros(len(places))
    for place, name in enumerate(names):
        own = labels == place
        center = float(np.average(x[own], weights=w[own]))
        n = len(np.unique(index[own]))
        scale = shares[name] * math.sqrt(n / (n - 1)) / w[own].sum() if n > 1 else math.inf
        residuals = np.bincount(index[own], weights=w[own] * (x[own] - center), minlength=len(places))
        influence += scale * residuals if n > 1 else np.full(len(places), math.inf)
        mean += shares[name] * center
    half = NORMAL_95 * math.sqrt(float((influence**2).sum()))
    return Interval(mean, mean - half, mean + half, len(places))


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
    Average scores in which every seed was scored on the same prompts, for new seeds and for new prompts.

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


def t_interval(interval: Interval, freedom: float) -> tuple[float, float, float]:
    """
    Give a mean's 95 % interval, and the two-sided p-value of "the mean is zero", by Student's t.

    Args:
        freedom: degrees of freedom of the interval's standard error, above 0.

    Returns:
        low, high, p-value.

    Raises:
        ImportError: without scipy.
    """
    t, error = _student_t(), interval.error
    half = float(t.ppf(0.975, freedom)) * error
    p_value = float(2 * t.sf(abs(interval.mean) / error, freedom)) if error else float(interval.mean == 0)
    return interval.mean - half, interval.mean + half, p_value


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Correct p-values for their number, in the order given (Holm, 1979): all those below 0.05 hold together with at
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
