"""The tripwire: an update that grows without end is stopped while the weights are still good."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .alarm import Alarm
from .events import Update


RECENT, ENOUGH = 5, 4
"""Four of the last five values have to lie beyond, so that no single spike does it."""
BEFORE, SETTLED, LEAST = 50, 15, 3
"""Values that the last five are held against: the fifty before. Below fifteen they say little, below three nothing."""
FACTOR, EARLY_FACTOR = 2.0, 10.0
"""Growth that counts, where the values before vary little: verl-omni#561 went on for 20 steps after it had doubled. At
the start of a run more is needed, as everything moves and little is known."""
SPREADS = 2.0
"""The same where they vary more, in robust standard deviations of their logarithms."""
SKIPPED = 20
"""Steps in a row that fp16's loss scaling may skip: from 2^16 down to 1 takes 16."""

LEAST_DISTANCE = 1e-6
"""Mean square of a change of the velocities, whose own is about 1, below which it is rounding and first steps."""
NOT_FINITE = "update/not_finite"
"""The alarm whose gradients must not reach the weights."""
REMEDY = (
    "Go on from an earlier checkpoint with a lower learning rate of this expert, or a higher flow_regularizer_weight; "
    "alarms='warn' goes on regardless."
)


def growth(logarithms: Sequence[float]) -> float | None:
    """
    Say how many times larger a series has become, if it has grown beyond its noise; otherwise None.

    Args:
        logarithms: of a positive series, the last value last.

    The last five values x against those before: their median m, and s, 1.4826 times the median distance to a straight
    line through them, so that a slow trend is no noise. Four of the five have to satisfy x - m > max(log 2, 2 s);
    with fewer than fifteen before them, x - m > max(log 10, 2 s).
    """
    values = np.asarray(logarithms[-RECENT - BEFORE :])
    before, recent = values[:-RECENT], values[-RECENT:]
    if len(before) < LEAST:
        return None
    places = np.arange(len(before)) - (len(before) - 1) / 2
    slope = float(places @ before) / float(places @ places)
    detrended = before - slope * places
    spread = 1.4826 * float(np.median(np.abs(detrended - np.median(detrended))))
    middle = float(np.median(before))
    factor = FACTOR if len(before) >= SETTLED else EARLY_FACTOR
    if int((recent - middle > max(math.log(factor), SPREADS * spread)).sum()) < ENOUGH:
        return None
    return math.exp(float(np.median(recent)) - middle)


@dataclass
class Tripwire:
    """
    The memory between two updates; all of it can be written as JSON.

    Attributes:
        series: name -> logarithms of its last values.
        travelled: sum of the image expert's learning rates so far, where there was a signal.
        rate: the last of them.
        skipped: updates in a row that fp16's loss scaling has skipped.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    travelled: float = 0.0
    rate: float = 0.0
    skipped: int = 0

    def stepped(self, rate: float, signal: float) -> None:
        """Take note of an optimizer step, at this learning rate of the image expert; `signal` as for its update."""
        self.rate = rate
        self.travelled += rate if signal > 0 else 0

    def update(self, update: Update, signal: float, scaled: bool = False, lags: bool = False) -> list[Alarm]:
        """
        Look at an update before it is taken.

        Args:
            signal: root mean square of the advantages that it was made from. Gradients are proportional to them, so
                that groups without a signal make them small, and groups that begin to have one make them large.
            scaled: whether fp16's loss scaling is at work, which skips non-finite gradients on its own.
            lags: whether the image's old policy is an average of many steps' weights, which falls behind at first.
        """
        broken = _not_finite(update)
        self.skipped = self.skipped + 1 if broken and scaled else 0
        if broken:
            if scaled and self.skipped < SKIPPED:
                return []
            return [
                Alarm(
                    NOT_FINITE,
                    f"{', '.join(broken)}: the step was dropped, the weights are those of the step before. "
                    "Look for a reward, a prompt or a precision that makes them; if growth came first, lower the "
                    "learning rate.",
                    stops=True,
                )
            ]
        return [
            alarm for name, value in self._normalized(update, signal, lags).items() for alarm in self._add(name, value)
        ]

    def _normalized(self, update: Update, signal: float, lags: bool) -> Mapping[str, float]:
        """Return the numbers that should be stationary in a sound run, and are positive."""
        found = {}
        if signal > 0:
            found = {f"grad_norm/{name}": norm / signal for name, norm in update.grad_norm.items()}
        # One step apart, policies differ by as much as the step was long; after many, by no more than all steps were.
        spread, distance = update.metrics.get("flow/log_ratio_std"), update.metrics.get("flow/velocity_mse")
        if spread is not None and self.rate > 0 and not lags:
            found["flow/log_ratio_std"] = spread / self.rate
        if distance is not None and distance > LEAST_DISTANCE and self.travelled > 0:
            found["flow/velocity_mse"] = math.sqrt(distance) / self.travelled
        return {name: value for name, value in found.items() if value > 0}

    def _add(self, name: str, value: float) -> list[Alarm]:
        series = [*self.series.get(name, []), math.log(value)][-RECENT - BEFORE :]
        self.series[name] = series
        factor = growth(series)
        if factor is None:
            return []
        self.series[name] = []  # a run that goes on is judged by what follows
        what = _MEANING.get(name, f"the gradient of the {name.rsplit('/')[-1]} expert")
        return [
            Alarm(
                name.replace("grad_norm", "update/grad_norm").replace("flow/", "update/"),
                f"{what} has grown {factor:.2g} times over what it was in the steps before. {REMEDY}",
                {"factor": round(factor, 3)},
                stops=True,
            )
        ]


_MEANING = {
    "flow/log_ratio_std": "the spread of the image's log-ratios, for its learning rate,",
    "flow/velocity_mse": "the speed at which velocities leave the reference model",
}


def _not_finite(update: Update) -> list[str]:
    numbers = {f"grad_norm/{name}": norm for name, norm in update.grad_norm.items()} | dict(update.metrics)
    return [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
