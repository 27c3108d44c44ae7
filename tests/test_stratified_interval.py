"""Means over tasks against statsmodels' cluster-robust weighted regression."""

import math

import numpy as np
import pytest
from statsmodels.regression.linear_model import WLS

from trl_unigrpo.statistics import mean_interval, stratified_interval


def data(crossing, tasks=3, clusters=12, per_cluster=4):
    """Values of prompts in tasks; a cluster lies in one task, or in all."""
    rng = np.random.default_rng(3)
    rows = [(t, c) for t in range(tasks) for c in range(clusters) for _ in range(per_cluster)]
    strata = [f"task {t}" for t, _ in rows]
    labels = [c if crossing else (t, c) for t, c in rows]
    effects = {label: rng.normal() for label in labels}
    values = np.array([effects[label] + 0.3 * t + rng.normal() for label, (t, _) in zip(labels, rows, strict=True)])
    return values, strata, labels, rng.integers(1, 6, len(rows)).astype(float)


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_weighted_regression_on_tasks(crossing, weighted):
    values, strata, labels, weights = data(crossing)
    weights = weights if weighted else np.ones_like(weights)
    shares = {"task 0": 0.5, "task 1": 0.3, "task 2": 0.2}
    columns = np.array([[name == task for task in shares] for name in strata], dtype=float)
    groups = np.unique([str(label) for label in labels], return_inverse=True)[1]
    fit = WLS(values, columns, weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    share = np.array(list(shares.values()))
    found = stratified_interval(values, strata, labels, shares, weights)
    assert found.mean == pytest.approx(share @ fit.params)
    variance = share @ fit.cov_params() @ share * 12 / 11  # each task has 12 clusters
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.n == (12 if crossing else 36)


def test_one_task_is_the_plain_mean():
    values, _, labels, _ = data(False)
    plain = mean_interval(values, [str(label) for label in labels])
    found = stratified_interval(values, ["all"] * len(values), labels)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx(tuple(plain))


def test_tasks_apart_add_up_their_variances():
    values, strata, labels, _ = data(False)
    values, strata, labels = values[:-6], strata[:-6], labels[:-6]  # tasks of different sizes
    tasks = sorted(set(strata))
    rows = {task: [i for i, name in enumerate(strata) if name == task] for task in tasks}
    parts = [mean_interval(values[own], [str(labels[i]) for i in own]) for own in rows.values()]
    found = stratified_interval(values, strata, labels)
    assert found.mean == pytest.approx(sum(part.mean for part in parts) / 3)
    assert found.error == pytest.approx(math.sqrt(sum(part.error**2 for part in parts)) / 3)


def test_a_task_of_one_prompt_leaves_no_bounds():
    found = stratified_interval([1.0, 0.0, 1.0], ["a", "b", "b"], ["p", "q", "r"])
    assert found.mean == pytest.approx(0.75) and found.low == -math.inf and found.high == math.inf


def test_shares_of_other_tasks_are_refused():
    with pytest.raises(ValueError, match="Shares"):
        stratified_interval([1.0, 0.0], ["a", "a"], ["p", "q"], {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="No values"):
        stratified_interval([], [], [])
