"""Intervals over seeds and prompts: against closed forms, an analysis of variance, and planted truths."""

import builtins
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_1samp
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from trl_unigrpo.statistics import crossed_interval, holm, mean_interval


def crossed(rng, seeds, prompts, seed_spread, prompt_spread, rest):
    """Scores (seeds, prompts) of mean zero."""
    return (
        rng.normal(0, seed_spread, (seeds, 1))
        + rng.normal(0, prompt_spread, (1, prompts))
        + rng.normal(0, rest, (seeds, prompts))
    )


@pytest.mark.parametrize("spreads", [(0.05, 0.2, 0.3), (0.03, 0.3, 0.1), (0.3, 0.05, 0.1)])
def test_interval_and_p_value_are_those_of_an_analysis_of_variance(spreads):
    y = 0.1 + crossed(np.random.default_rng(1), 4, 30, *spreads)
    seeds, prompts = np.indices(y.shape)
    table = anova_lm(
        ols(
            "y ~ C(seed) + C(prompt)", pd.DataFrame({"y": y.ravel(), "seed": seeds.ravel(), "prompt": prompts.ravel()})
        ).fit()
    )
    square, degrees = table["mean_sq"].to_numpy(), table["df"].to_numpy()  # of seeds, prompts, rest
    variance = (square[0] + square[1] - square[2]) / y.size
    assert variance > max(square[:2]) / y.size, "the plain case, without the floor"
    freedom = (square[0] + square[1] - square[2]) ** 2 / (square**2 / degrees).sum()
    half = t.ppf(0.975, freedom) * math.sqrt(variance)
    found = crossed_interval(y)
    assert found[:3] == pytest.approx((y.mean(), y.mean() - half, y.mean() + half), rel=1e-10)
    assert found.p_value == pytest.approx(2 * t.sf(abs(y.mean()) / math.sqrt(variance), freedom), rel=1e-8)
    assert (found.seeds, found.prompts) == (4, 30)
    edge = crossed_interval(y - found.low)  # the interval's own end, tested as the mean
    assert edge.p_value == pytest.approx(0.05)


def test_one_seed_is_a_t_interval_over_prompts():
    y = np.random.default_rng(2).normal(0.3, 1, 40)
    expected = ttest_1samp(y, 0.0)
    found = crossed_interval(y[None])
    assert found[1:3] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_value == pytest.approx(expected.pvalue) and found.seeds == 1


def test_prompts_that_do_not_matter_leave_a_t_interval_over_seeds():
    by_seed = np.array([0.2, 0.5, 0.3])
    found = crossed_interval(np.repeat(by_seed[:, None], 50, axis=1))
    assert found[1:3] == pytest.approx(tuple(ttest_1samp(by_seed, 0.0).confidence_interval(0.95)))


def test_variance_is_never_below_that_of_the_seeds_alone():
    rng = np.random.default_rng(3)
    y = rng.normal(size=(3, 8))
    y -= y.mean(0)  # prompts are all alike: less than their rest alone would make them
    y += np.array([[0.1], [0.5], [0.2]])
    found = crossed_interval(y)
    assert found[1:3] == pytest.approx(tuple(ttest_1samp(y.mean(1), 0.0).confidence_interval(0.95)))


def test_repeated_prompts_count_as_one_cluster():
    rng = np.random.default_rng(4)
    y = rng.normal(size=(1, 30))
    labels = [f"prompt {i // 2}" for i in range(30)]
    normal = mean_interval(y[0], labels)
    found = crossed_interval(y, labels)
    assert found.mean == pytest.approx(normal.mean) and found.prompts == 15
    assert (found.high - found.mean) / t.ppf(0.975, 14) == pytest.approx((normal.high - normal.mean) / 1.959964)
    several = rng.normal(size=(4, 30))
    twice = np.repeat(several, 2, axis=1)
    assert crossed_interval(twice, np.repeat(np.arange(30), 2)) == pytest.approx(crossed_interval(several))


def test_differences_that_are_all_equal():
    assert crossed_interval(np.zeros((3, 5))) == (0, 0, 0, 1, 3, 5)
    assert crossed_interval(np.full((3, 5), 0.5)) == (0.5, 0.5, 0.5, 0, 3, 5)


@pytest.mark.parametrize(
    ("spreads", "seeds"),
    [((0.01, 0.25, 0.25), 5), ((0.03, 0.25, 0.25), 5), ((0.01, 0.0, 0.3), 5), ((0.01, 0.25, 0.25), 2)],
)
def test_coverage(spreads, seeds):
    """Of 2,000 intervals about 95 % hold the mean, whichever factor varies most (standard error 0.5 points)."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(2000):
        found = crossed_interval(crossed(rng, seeds, 300, *spreads))
        hits += found.low <= 0 <= found.high
    assert 0.935 <= hits / 2000 <= 0.975


def test_coverage_of_rewards():
    """Shares of checks that hold, in steps of a third and near their upper end, as ShapeWorld's rewards are."""
    rng = np.random.default_rng(6)
    hits, draws = 0, 1500
    for _ in range(draws):
        # Uniform effects have a known mean of the probability, which no clipping bends.
        chance = 0.8 + rng.uniform(-0.02, 0.02, (5, 1)) + rng.uniform(-0.17, 0.17, (1, 300))
        found = crossed_interval(rng.binomial(3, chance) / 3)
        hits += found.low <= 0.8 <= found.high
    assert 0.93 <= hits / draws <= 0.975


def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(7)
    for number in (1, 2, 9):
        p = rng.uniform(size=number) ** 4
        assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert holm([0.01, 0.01, 0.9]) == pytest.approx([0.03, 0.03, 0.9])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([0.1, 0.2], None, r"shape \(2,\), expected \(seeds, prompts\)"),
        (np.zeros((0, 3)), None, r"shape \(0, 3\)"),
        ([[0.1, math.nan]], None, "NaN or infinity"),
        ([[0.1, 0.2]], ["a"], "1 prompts for 2 columns"),
        ([[0.1, 0.2], [0.1, 0.2]], ["a", "a"], "at least two different prompts"),
    ],
)
def test_bad_values(values, labels, message):
    with pytest.raises(ValueError, match=message):
        crossed_interval(values, labels)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    load = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"trl-unigrpo\[eval\]"):
        crossed_interval([[0.1, 0.2]])
