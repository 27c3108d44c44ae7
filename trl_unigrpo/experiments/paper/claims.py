"""
The paper's claims, as functions from results to verdicts.

A claim holds if the 95 % interval of what it says lies wholly on its side, so that a tie does not. No verdict is
written by hand, and the margins below were fixed before the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .order import GROUP_SYSTEMS, main_mode


Side = tuple[str, str]
"""A system and the mode in which it is evaluated."""

ClaimVerdict = Literal["holds", "does not hold", "not measured yet"]

REFERENCE: Side = ("unigrpo", "sampled")

AS_GOOD = 0.02
"""A reward that is lower by less than this counts as being as good."""
SIMILAR = 0.05
"""Rewards that differ by less than this count as similar."""
DECAY = 10
"""The image error grows at least so many times where "images decay without a regulariser"."""

WITH_AND_WITHOUT: tuple[tuple[Side, Side], ...] = (
    (("base", "sampled"), ("base", "direct")),
    (("sft", "sampled"), ("sft", "direct")),
    *(((f"{name}_thinking", "sampled"), (name, "direct")) for name in ("refl", "fpo", "awm", "flow_grpo")),
)
SFT_BASE: tuple[tuple[Side, Side], ...] = tuple((("sft", mode), ("base", mode)) for mode in ("sampled", "direct"))
ONE_EXPERT: tuple[tuple[Side, Side], ...] = (
    (("flow_grpo_thinking", "sampled"), ("base", "sampled")),
    (("text_grpo", "sampled"), ("base", "sampled")),
)
UNREGULARIZED: tuple[Side, Side] = (("no_regularizer", "sampled"), REFERENCE)
GUIDANCE_PAIR: tuple[Side, Side] = (("guidance_off", "guided"), ("guidance_on", "guided"))
UNIFPO: tuple[Side, Side] = (("unifpo", "sampled"), ("base", "sampled"))

COMPARISONS = (*SFT_BASE, *ONE_EXPERT, *WITH_AND_WITHOUT, UNREGULARIZED, GUIDANCE_PAIR, UNIFPO)
"""Paired differences that the claims need, besides those to UniGRPO."""

OTHERS: tuple[Side, ...] = (
    ("base", "direct"),
    ("sft", "direct"),
    *((name, main_mode(name)) for name in GROUP_SYSTEMS["table1"] if name not in (REFERENCE[0], "sft_clean")),
)
"""Systems that UniGRPO is claimed to be above. The clean corpus is none of the paper's: no reward shows it all."""


class Judgement(NamedTuple):
    verdict: ClaimVerdict
    sentence: str


@dataclass(frozen=True)
class Claim:
    """
    Attributes:
        text: the paper's claim.
        where: in the paper.
        judge: from results (see `collect`) to a verdict and its numbers.
    """

    id: str
    text: str
    where: str
    judge: Callable[[Mapping[str, Any]], Judgement]


class Part(NamedTuple):
    """
    One comparison of a claim.

    Attributes:
        holds: None where it was not measured.
        says: its numbers.
        seeds: of the interval; 1 where it is over prompts alone.
    """

    holds: bool | None
    says: str
    seeds: int = 0


ONE_SEED = " One seed only: what another would change is not in the interval."


def judged(parts: Iterable[Part], says: str = "", extra: str = "") -> Judgement:
    """
    Judge a claim by its parts: it holds if all of them do; one that fails settles it, whatever is missing.

    Args:
        says: instead of what the parts say.
        extra: a sentence to go after it.
    """
    of = list(parts)
    verdict: ClaimVerdict = "holds"
    if any(part.holds is False for part in of):
        verdict = "does not hold"
    elif any(part.holds is None for part in of):
        verdict = "not measured yet"
    alone = ONE_SEED if any(part.seeds == 1 for part in of) else ""
    return Judgement(verdict, (says or "; ".join(part.says for part in of)) + "." + extra + alone)


def above(results: Mapping[str, Any], left: Side, right: Side) -> Part:
    """Test if left is above right, by the interval of their paired difference."""
    found = comparison(results, left, right)
    if found is None:
        return Part(None, f"{title(results, left)} and {title(results, right)}: not both measured")
    how = "" if found["low"] > 0 else " (the other way round)" if found["high"] < 0 else " (no difference seen)"
    rewards = [f"{title(results, side)} {reward(results, side)['mean']:.3f}" for side in (left, right)]
    seeds = trained_seeds(results, found, left, right)
    return Part(found["low"] > 0, f"{rewards[0]} against {rewards[1]}: {signed(found)}{how}", seeds)


def apart(results: Mapping[str, Any], other: Side) -> Part:
    """Test if UniGRPO is above another system, by intervals that do not touch."""
    own, theirs = reward(results, REFERENCE), reward(results, other)
    if own is None or theirs is None:
        return Part(None, f"{title(results, other)} not measured")
    seeds = min(own["seeds"], trained_seeds(results, theirs, other) or own["seeds"])
    return Part(own["low"] > theirs["high"], f"{title(results, other)} {bracketed(theirs)}", seeds)


def unigrpo_above_each(results: Mapping[str, Any]) -> Judgement:
    own = reward(results, REFERENCE)
    if own is None:
        return Judgement("not measured yet", "UniGRPO was not measured.")
    measured = sorted((side for side in OTHERS if reward(results, side)), key=lambda s: -reward(results, s)["mean"])
    parts = [apart(results, side) for side in measured]
    lacking = [Part(None, title(results, side)) for side in OTHERS if side not in measured]
    failed = [part.says for part in parts if not part.holds]
    says = f"UniGRPO {bracketed(own)} is above {len(parts) - len(failed)} of {len(OTHERS)}"
    if failed:
        says += "; not apart from these, or below: " + ", ".join(failed)
    elif parts:
        says += f"; the next is {parts[0].says}"
    if lacking:
        says += "; not measured: " + ", ".join(part.says for part in lacking)
    return judged([*parts, *lacking], says)


def unigrpo_above_two_stage(results: Mapping[str, Any]) -> Judgement:
    own = reward(results, REFERENCE)
    part = apart(results, ("two_stage", "sampled"))
    return judged([part._replace(says=f"UniGRPO {bracketed(own) if own else 'not measured'}, {part.says}")])


def errors(results: Mapping[str, Any], system: str, factor: float) -> Part:
    """Test if a run's image error is above `factor` times that of UniGRPO, whose regulariser is the velocity MSE."""
    found = results["figure5"].get(system, {}).get("picture_error_ratio")
    if not found:
        return Part(None, f"{title(results, (system, 'sampled'))}: not measured")
    says = f"{title(results, (system, 'sampled'))}: image error x {found['ratio']:.3g}"
    if found["low"] is None:
        return Part(found["ratio"] > factor, says, 1)
    return Part(found["low"] > factor, f"{says} [{found['low']:.3g}, {found['high']:.3g}]", found["seeds"])


def images_decay(results: Mapping[str, Any]) -> Judgement:
    decay, difference = errors(results, UNREGULARIZED[0][0], DECAY), comparison(results, *UNREGULARIZED)
    if difference is None:
        return judged([decay._replace(holds=None)])
    similar = difference["low"] > -SIMILAR and difference["high"] < SIMILAR
    return judged([decay, Part(similar, f"reward {signed(difference)}")])


def velocity_mse_keeps_images(results: Mapping[str, Any]) -> Judgement:
    return judged(errors(results, system, 1) for system in ("latent_kl", "latent_kl_matched"))


def trained_without_guidance(results: Mapping[str, Any]) -> Judgement:
    found = comparison(results, *GUIDANCE_PAIR)
    if found is None:
        return Judgement("not measured yet", "Not both ways of training were measured.")
    rewards = " and ".join(f"{reward(results, side)['mean']:.3f}" for side in GUIDANCE_PAIR)
    says = f"Evaluated with guidance, trained without and with it: {rewards}, difference {signed(found)}"
    return judged([Part(found["low"] > -AS_GOOD, says, found["seeds"])])


def unifpo_fails(results: Mapping[str, Any]) -> Judgement:
    found = comparison(results, *UNIFPO)
    if found is None:
        return Judgement("not measured yet", "UniFPO was not measured.")
    says = (
        f"UniFPO ended at {reward(results, UNIFPO[0])['mean']:.3f}, the base is at "
        f"{reward(results, UNIFPO[1])['mean']:.3f}, difference {signed(found)}"
    )
    curve = results["curves"].get(UNIFPO[0][0])
    extra = ""
    if curve:
        extra = (
            f" Its training reward began at {curve['reward'][0]:.3f}, was {max(curve['reward']):.3f} at its best and "
            f"{curve['reward'][-1]:.3f} at the end."
        )
    return judged([Part(found["high"] < AS_GOOD, says, found["seeds"])], extra=extra)


def _all_above(pairs: tuple[tuple[Side, Side], ...]) -> Callable[[Mapping[str, Any]], Judgement]:
    return lambda results: judged(above(results, left, right) for left, right in pairs)


CLAIMS = (
    Claim("sft", "Supervised fine-tuning is above the base", "Table 1", _all_above(SFT_BASE)),
    Claim(
        "one_expert",
        "FlowGRPO (with thinking) and TextGRPO are each above the base",
        "Table 1",
        _all_above(ONE_EXPERT),
    ),
    Claim("joint", "UniGRPO is above every other system, 95 % intervals apart", "Table 1", unigrpo_above_each),
    Claim(
        "two_stage",
        "UniGRPO is above training one expert after the other, 95 % intervals apart",
        "Table 1",
        unigrpo_above_two_stage,
    ),
    Claim("thinking", "Thinking helps each method", "Table 1", _all_above(WITH_AND_WITHOUT)),
    Claim(
        "unifpo",
        f"UniFPO fails to converge (here: its reward ends less than {AS_GOOD} above the base's)",
        "baselines",
        unifpo_fails,
    ),
    Claim(
        "guidance",
        "Trained without guidance and evaluated with it is at least as good as trained with it "
        f"(here: lower by less than {AS_GOOD})",
        "Figure 4",
        trained_without_guidance,
    ),
    Claim(
        "regularizer",
        f"Without a regulariser images decay (here: image error over {DECAY} times that with the velocity MSE) "
        f"at similar reward (within {SIMILAR})",
        "Figure 5",
        images_decay,
    ),
    Claim(
        "velocity_mse",
        "The velocity MSE keeps images better than a latent KL (of the same weight, and of the same strength)",
        "Figure 5",
        velocity_mse_keeps_images,
    ),
)


def comparison(results: Mapping[str, Any], left: Side, right: Side) -> dict[str, Any] | None:
    """Look up the paired difference of two systems, None where it was not measured."""
    return results["comparisons"].get(f"{'/'.join(left)} - {'/'.join(right)}")


def reward(results: Mapping[str, Any], side: Side) -> Any:
    """Look up the mean reward of a system in a mode with its interval, None where it was not measured."""
    return results["systems"].get(side[0], {}).get("modes", {}).get(side[1], {}).get("reward")


def title(results: Mapping[str, Any], side: Side) -> str:
    """Name a system, and how it was evaluated where it was evaluated both ways."""
    system = results["systems"].get(side[0])
    if system is None:
        return side[0]
    both = {"sampled", "direct"} <= set(system["modes"])
    return system["title"] + {"sampled": ", thinking", "direct": ", no thinking"}.get(side[1], "") * both


def trained_seeds(results: Mapping[str, Any], interval: Mapping[str, Any], *sides: Side) -> int:
    """Count the seeds of an interval; 0 if nothing in it was trained, so that there is no seed to vary."""
    return interval["seeds"] if any(results["systems"][system]["trained"] for system, _ in sides) else 0


def signed(interval: Mapping[str, Any]) -> str:
    mean, low, high = (f"{round(interval[key], 3) + 0.0:+.3f}" for key in ("mean", "low", "high"))  # no "-0.000"
    return f"{mean} [{low}, {high}]"


def bracketed(interval: Mapping[str, Any]) -> str:
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
