"""The tripwire on made series: growth is caught soon, noise is left alone."""

import math

import numpy as np
import pytest

from trl_unigrpo.monitoring.events import Update
from trl_unigrpo.monitoring.tripwire import SKIPPED, Tripwire, growth


def first_alarm(norms, signals=None, metrics=None, rates=None, lags=False):
    """The step of the first alarm and the alarm, fed to the tripwire as a run would; None if there is none."""
    wire = Tripwire()
    for step, norm in enumerate(norms):
        signal = 1.0 if signals is None else float(signals[step])
        update = Update({"image": float(norm)}, {} if metrics is None else metrics[step])
        if alarms := wire.update(update, signal, lags=lags):
            return step, alarms[0]
        wire.stepped(1e-4 if rates is None else rates[step], signal)
    return None


def noise(kind, spread, length, seed):
    """Stationary noise of a logarithm."""
    random = np.random.default_rng(seed)
    if kind == "normal":
        return random.normal(0, spread, length)
    if kind == "heavy tails":
        return spread * random.standard_t(3, length)
    if kind == "two passes":  # over one generation, of which the second is clipped
        return random.normal(0, spread, length) + np.resize([0.3, -0.3], length)
    values = [random.normal(0, spread)]  # each step remembers half of the one before
    for _ in range(length - 1):
        values.append(0.5 * values[-1] + random.normal(0, spread * math.sqrt(0.75)))
    return np.array(values)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "two passes", "memory"])
@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_stationary_noise_gives_no_alarm(kind, spread):
    assert not [seed for seed in range(8) if first_alarm(np.exp(noise(kind, spread, 300, seed)))]


def test_growth_counts_beside_the_noise_of_the_series():
    # Half or twice the median is nothing here.
    assert sum(first_alarm(np.exp(noise("normal", 0.8, 300, seed))) is not None for seed in range(12)) <= 1


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("doubling", [2.3, 4.0])
def test_growth_is_caught_within_five_steps_of_doubling(spread, doubling):
    # As in verl-omni#561: from step 36, to some fifty times at step 59 if it doubles every four steps.
    onset = 36
    for seed in range(15):
        steps = np.arange(70)
        norms = 0.3 * np.exp(noise("normal", spread, 70, seed)) * 2 ** (np.clip(steps - onset, 0, None) / doubling)
        step, alarm = first_alarm(norms)
        assert onset + doubling < step <= onset + doubling + 5, (seed, step)
        assert alarm.stops and alarm.name == "update/grad_norm/image"


def test_single_spikes_and_slow_trends_are_no_growth():
    norms = np.exp(noise("normal", 0.2, 200, 0))
    norms[[40, 41, 90, 91, 150]] *= 1000
    assert first_alarm(norms) is None
    assert first_alarm(np.exp(noise("normal", 0.2, 200, 0) + np.linspace(0, math.log(4), 200))) is None


def test_growth_that_began_long_ago_is_no_noise():
    norms = np.exp(noise("normal", 0.1, 80, 0)) * 2 ** (np.arange(80) / 20)
    assert first_alarm(norms) is not None


def test_divergence_from_the_first_step_is_caught_before_there_is_a_baseline():
    step, _ = first_alarm(3.0 ** np.arange(20))
    assert step < 10
    assert first_alarm(1.2 ** np.arange(14)) is None  # a run that finds its feet


def test_growth_is_how_many_times():
    assert growth([0.0] * 20 + [math.log(7)] * 5) == pytest.approx(7)
    assert growth([0.0] * 20 + [math.log(7)] * 3) is None


def test_groups_that_begin_to_have_a_signal_are_no_growth():
    # One group of 16 has a signal, later all have: the gradient is the mean over all.
    shares = np.repeat([1 / 16, 1.0], 40)
    norms = np.sqrt(shares) * np.exp(noise("normal", 0.2, 80, 0))
    assert first_alarm(norms, signals=np.sqrt(shares)) is None
    assert first_alarm(norms) is not None
    silent = np.where(np.arange(80) < 40, 1e-9, norms)
    assert first_alarm(silent, signals=np.where(np.arange(80) < 40, 0.0, 1.0)) is None


def drift(speeds):
    """Metrics of a policy whose velocities leave the reference at these speeds."""
    return [{"flow/velocity_mse": distance**2} for distance in np.concatenate([[0], np.cumsum(speeds)[:-1]])]


def test_distance_that_grows_with_the_steps_taken_is_no_growth():
    rates = np.clip(np.arange(80) / 50, 0, 1) * 1e-4  # a warm-up
    assert first_alarm(np.ones(80), metrics=drift(100 * rates), rates=rates) is None
    step, alarm = first_alarm(np.ones(80), metrics=drift(100 * rates * 1.5 ** np.clip(np.arange(80) - 40, 0, 35)))
    assert 40 < step < 55
    assert alarm.name == "update/velocity_mse"


def test_ratios_spread_as_far_as_their_learning_rate_allows():
    rates = np.linspace(1e-5, 1e-3, 80)
    spreads = [
        {"flow/log_ratio_std": 0.1 * rate if i % 2 else 0.0} for i, rate in enumerate(np.append(rates[0], rates))
    ]
    assert first_alarm(np.ones(80), metrics=spreads, rates=rates) is None
    growing = [{"flow/log_ratio_std": 1e-6 * 1.3 ** max(0, i - 50)} for i in range(80)]
    step, alarm = first_alarm(np.ones(80), metrics=growing)
    assert 52 < step <= 58
    assert alarm.name == "update/log_ratio_std"


def test_an_average_that_falls_behind_is_no_growth():
    """A policy that moves by 1 a step, and its average of decay .98, moved after every second step."""
    old, spreads = 0.0, []
    for step in range(80):
        if step % 2 == 0:
            old = 0.98 * old + 0.02 * step
        spreads.append({"flow/log_ratio_std": 1e-5 * (step - old)})
    step, alarm = first_alarm(np.ones(80), metrics=spreads)
    assert alarm.name == "update/log_ratio_std"  # what it would be without an average
    assert first_alarm(np.ones(80), metrics=spreads, lags=True) is None
    both = [spread | moved for spread, moved in zip(spreads, drift(1e-2 * 1.5 ** np.arange(80)), strict=True)]
    assert first_alarm(np.ones(80), metrics=both, lags=True)[1].name == "update/velocity_mse"


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_loss_scaling_may_skip_its_first_steps(norm):
    broken, sound = Update({"text": 1.0, "image": norm}, {}), Update({"text": 1.0, "image": 1.0}, {})
    wire = Tripwire()
    for _ in range(3):
        assert not any(wire.update(broken, 1.0, scaled=True) for _ in range(SKIPPED - 1))
        assert wire.update(sound, 1.0, scaled=True) == []
    assert [bool(wire.update(broken, 1.0, scaled=True)) for _ in range(SKIPPED)] == [False] * (SKIPPED - 1) + [True]
    (alarm,) = wire.update(broken, 1.0)
    assert alarm.stops and "grad_norm/image" in alarm.message and "text" not in alarm.message
