"""Images that drift away from what the model painted at the start: reward hacking shows here first."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .alarm import MOST_INDICES, Alarm
from .image_statistics import FloatArray, ImageStatistics, near_twins
from .memory import revive
from .shift import BEYOND_CHANCE, Change, Shift


@dataclass(frozen=True)
class Rule:
    """
    The limit of a statistic: it has drifted if by `least`, and by more than chance (see [`Shift`]).

    Attributes:
        sign: +1 or -1, the direction that is bad.
        least: how far it has to go, in its own unit; or, if `relative`, as a share of what it was at the start.
        seen: what has happened, in words.
        remedy: what to do.
    """

    sign: int
    least: float
    relative: bool
    seen: str
    remedy: str

    def broken(self, change: Change) -> bool:
        least = self.least * (change.before if self.relative else 1)
        return self.sign * (change.now - change.before) > least and self.sign * change.errors > BEYOND_CHANCE


LOOK = (
    "Look at them: if the reward likes what you don't, raise flow_regularizer_weight, lower image_learning_rate, or "
    "add a reward that sees it."
)
NOISY = (
    "Look at them: if it is noise, lower image_learning_rate, or use sde_type='cps' or more num_inference_steps: "
    "both leave less of it."
)
DIVERSITY = "Diversity is what training costs first: set diversity_weight=1, raise beta, or stop earlier."
ACROSS = "Prompts lose their meaning: stop earlier, or raise flow_regularizer_weight."
RULES = {
    "images/dark_share": Rule(+1, 0.15, False, "the images have become darker", LOOK),
    "images/bright_share": Rule(+1, 0.15, False, "the images have become brighter", LOOK),
    "images/color_entropy": Rule(-1, 0.2, True, "the images have lost colours", LOOK),
    "images/edge_density": Rule(-1, 0.3, True, "the images have lost detail", LOOK),
    "images/noise": Rule(+1, 0.02, False, "the images have become noisy", NOISY),
    "images/twins": Rule(+1, 0.3, False, "images of one prompt repeat each other", DIVERSITY),
    "images/twins_across": Rule(+1, 0.3, False, "images of different prompts repeat each other", ACROSS),
}
"""In UniRL#407, by rollout 100, the dark share rose by .475, colour entropy fell by 54 % and edge density by 60 %: the
limits are a third to a half of that, to be met while most images are still good."""


@dataclass
class ImageWatch:
    """
    The memory between two generations; all of it can be written as JSON.

    Attributes:
        shifts: statistic -> its means at the start and now.
        thumbnails, prompts: of the last generation, to find twins of other prompts where a generation has one prompt.
    """

    shifts: dict[str, Shift] = field(default_factory=lambda: {name: Shift() for name in RULES})

    def __post_init__(self) -> None:
        self.shifts = {name: revive(Shift, self.shifts.get(name, {})) for name in RULES}
        self._last: tuple[FloatArray, list[int]] = (np.zeros((0, 0)), [])

    def statistics(
        self,
        images: Sequence[ImageStatistics],
        prompts: Sequence[str],
        trains: bool = True,
        images_per_thinking: int = 1,
    ) -> dict[str, FloatArray]:
        """
        Collect the statistics: name -> N numbers, one per image.

        Args:
            prompts: N texts.
            trains: whether this is a training generation. In these, twins of other prompts are looked for in the one
                before, too.
            images_per_thinking: see [`near_twins`].
        """
        names = ("dark_share", "bright_share", "color_entropy", "edge_density", "noise")
        found = {f"images/{name}": np.array([getattr(image, name) for image in images]) for name in names}
        thumbnails, groups = np.stack([image.thumbnail for image in images]), [hash(prompt) for prompt in prompts]
        before = self._last if trains and self._last[1] else (thumbnails[:0], [])
        own, _ = near_twins(thumbnails, groups, images_per_thinking)
        _, across = near_twins(np.concatenate([thumbnails, before[0]]), groups + before[1])
        if trains:
            self._last = thumbnails, groups
        return {**found, "images/twins": own.astype(float), "images/twins_across": across[: len(images)].astype(float)}

    def look(self, found: dict[str, FloatArray], group_size: int) -> list[Alarm]:
        """Find what has drifted, by the statistics of a training generation, groups side by side."""
        alarms = []
        for name, rule in RULES.items():
            self.shifts[name].add(found[name].reshape(-1, group_size).mean(1).tolist())
            change = self.shifts[name].change()
            if change is not None and rule.broken(change):
                worst = np.argsort(-rule.sign * found[name], kind="stable")[:MOST_INDICES]
                beyond = [int(i) for i in worst if rule.sign * (found[name][i] - change.before) > 0]
                message = f"{rule.seen}: {change.now:.3g}, at the start {change.before:.3g}. {rule.remedy}"
                values = {"before": change.before, "now": change.now, "standard_errors": change.errors}
                alarms.append(Alarm(name, message, values, tuple(sorted(beyond))))
        return alarms
