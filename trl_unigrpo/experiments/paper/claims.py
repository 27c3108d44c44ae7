"""
The paper's claims, as functions from results to verdicts.

A claim speaks of the rule's score, which no training sees, unless it says otherwise. It holds if the 95 % interval of
what it says lies wholly on its side, and is contradicted if that lies wholly on the other; between them nothing was
shown. No verdict is written by hand, and the margins below were fixed before the first held-out run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .order import main_mode
from .systems import SYSTEMS


Side = tuple[str, str]
"""A system and the mode in which it is evaluated."""
SidePair = tuple[Side, Side]

ClaimVerdict = Literal["holds", "not shown", "contradicted", "not measured yet"]

BASE_SIDE: Side = ("base", "sampled")
REFERENCE: Side = ("unigrpo", "sampled")
LONG: Side = ("long_velocity_mse", "sampled")
"""UniGRPO as it is, in a long run."""

AS_GOOD = 0.02
"""A score that is lower by less than this counts as being as good."""
HACKED = 0.05
"""The rule's score falls at least so far where a reward is hacked."""
DECAY = 2
"""
The image error grows at least so many times where "images decay without a regulariser".

The paper shows decay without a number. Twice is more than seeds of one system differ by. Ten times the base's error
would be a third of what makes a cell unreadable: the rule has then fallen already, and the claim would say nothing of
images that are worse while the rule still reads them.
"""

ONE_EXPERT = tuple(
    (name, "sampled")
    for name in ("refl_thinking", "fpo_thinking", "awm_thinking", "nft_thinking", "flow_grpo_thinking", "text_grpo")
)
"""Methods that train one of the two experts, each in its best way: with thinking."""
SFT_BASE: tuple[SidePair, ...] = tuple((("sft", mode), ("base", mode)) for mode in ("sampled", "direct"))
ABOVE_BASE: tuple[SidePair, ...] = tuple((side, BASE_SIDE) for side in ONE_EXPERT)
WITH_AND_WITHOUT: tuple[SidePair, ...] = (
    *(((name, "sampled"), (name, "direct")) for name in ("base", "sft")),
    *(((f"{name}_thinking", "sampled"), (name, "direct")) for name in ("refl", "fpo", "awm", "flow_grpo")),
)
UNREGULARIZED: SidePair = (("long_none", "sampled"), LONG)
LATENT_KL: tuple[Side, ...] = (("long_latent_kl", "sampled"), ("long_latent_kl_matched", "sampled"))
IN_BETWEEN: tuple[SidePair, ...] = tuple(
    pair for side in LATENT_KL for pair in ((side, UNREGULARIZED[0]), (LONG, side))
)
GUIDANCE_PAIR: SidePair = (("guidance_off", "guided"), ("guidance_on", "guided"))
UNREGULARIZED_BASE: SidePair = (UNREGULARIZED[0], BASE_SIDE)
UNIFPO: SidePair = (("unifpo", "sampled"), BASE_SIDE)
JOINT: tuple[SidePair, ...] = tuple(
    ((joint, "sampled"), (alone, "sampled"))
    for joint, alone in (
        ("unifpo", "fpo_thinking"),
        ("uniawm", "awm_thinking"),
        ("uninft", "nft_thinking"),
        ("unigrpo", "flow_grpo_thinking"),
    )
)
"""The same image objective with the thinking trained, too, and without. No claim of the paper's rests on these."""

COMPARISONS = (
    *(*SFT_BASE, *ABOVE_BASE, *WITH_AND_WITHOUT, *IN_BETWEEN, *JOINT, GUIDANCE_PAIR, UNIFPO),
    *(UNREGULARIZED, UNREGULARIZED_BASE),
)
"""Paired differences by the rule that the claims, and the page, need besides those of its tables."""
LEARNED_COMPARISONS = (UNREGULARIZED, UNREGULARIZED_BASE)
"""Those by the learned reward."""

OTHERS: tuple[Side, ...] = (
    *((name, mode) for name in ("base", "sft") for mode in ("direct", "sampled")),
    *((name, main_mode(name)) for name in ("refl", "fpo", "awm", "flow_grpo")),
    *ONE_EXPERT,
)
"""The systems that UniGRPO is claimed to be above, besides two stages. Of UniFPO the paper claims something else."""


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
        refuted: the interval lies wholly on the other side.
    """

    holds: bool | None
    says: str
    seeds: int = 0
    refuted: bool = False


ONE_SEED = " One seed only: what another would change is not in the interval."


def judged(parts: Iterable[Part], says: str = "", extra: str = "") -> Judgement:
    """
    Judge a claim by its parts: it holds if all of them do. One that fails settles that it does not, and one that is
    refuted contradicts it, whatever is missing.

    Args:
        says: instead of what the parts say.
        extra: a sentence to go after it.
    """
    of = list(parts)
    verdict: ClaimVerdict = "holds"
    if any(part.refuted for part in of):
        verdict = "contradicted"
    elif any(part.holds is False for part in of):
        verdict = "not shown"
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
    means = [f"{title(results, side)} {mean_rule(results, side)['mean']:.3f}" for side in (left, right)]
    seeds = trained_seeds(results, found, left, right)
    return Part(found["low"] > 0, f"{means[0]} against {means[1]}: {signed(found)}{how}", seeds, found["high"] < 0)


def apart(results: Mapping[str, Any], other: Side) -> Part:
    """Test if UniGRPO is above another system, by intervals that do not touch."""
    own, theirs = mean_rule(results, REFERENCE), mean_rule(results, other)
    if own is None or theirs is None:
        return Part(None, f"{title(results, other)} not measured")
    seeds = min(own["seeds"], trained_seeds(results, theirs, other) or own["seeds"])
    says = f"{title(results, other)} {bracketed(theirs)}"
    return Part(own["low"] > theirs["high"], says, seeds, own["high"] < theirs["low"])


def unigrpo_above_each(results: Mapping[str, Any]) -> Judgement:
    """Judge if UniGRPO is above each of `OTHERS`, by intervals that do not touch."""
    own = mean_rule(results, REFERENCE)
    if own is None:
        return Judgement("not measured yet", "UniGRPO was not measured.")
    measured = sorted(
        (side for side in OTHERS if mean_rule(results, side)), key=lambda s: -mean_rule(results, s)["mean"]
    )
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
    """Judge if UniGRPO is above training one expert after the other, by intervals that do not touch."""
    own = mean_rule(results, REFERENCE)
    part = apart(results, ("two_stage", "sampled"))
    return judged([part._replace(says=f"UniGRPO {bracketed(own) if own else 'not measured'}, {part.says}")])


def hacked(results: Mapping[str, Any]) -> Judgement:
    """
    Judge if, without a regulariser, the rule has fallen against the velocity MSE and the learned reward has not.

    What both did against the base is told beside it, and decides nothing.
    """
    (none, long), rule = UNREGULARIZED, comparison(results, *UNREGULARIZED)
    learned = comparison(results, *UNREGULARIZED, "learned")
    if rule is None or learned is None:
        return Judgement("not measured yet", "Not both long runs were measured.")
    own, other = mean_rule(results, none), mean_rule(results, long)
    fell = rule["mean"] <= -HACKED and own["high"] < other["low"]
    says = f"the rule {bracketed(own)} against {bracketed(other)}: {signed(rule)}"
    as_good = _as_good(learned, f"the learned reward {signed(learned)}")
    return judged([Part(fell, says, rule["seeds"], rule["low"] > -HACKED), as_good], extra=_against_base(results))


def _as_good(difference: Mapping[str, Any], says: str) -> Part:
    """Test if a difference is surely not below `-AS_GOOD`."""
    return Part(difference["low"] > -AS_GOOD, says, difference["seeds"], difference["high"] < -AS_GOOD)


def _against_base(results: Mapping[str, Any]) -> str:
    """Say what a long run without a regulariser changed of the base; nothing where that was not measured."""
    rule, learned = (comparison(results, *UNREGULARIZED_BASE, score) for score in ("rule", "learned"))
    if rule is None or learned is None:
        return ""
    return f" Against the base: the rule {signed(rule)}, the learned reward {signed(learned)}."


def images_decay(results: Mapping[str, Any]) -> Judgement:
    """Judge if the image error without a regulariser is surely `DECAY` times that with the velocity MSE."""
    name = UNREGULARIZED[0][0]
    found = results["figure5"].get(name, {}).get("image_error_ratio")
    if not found:
        return Judgement("not measured yet", f"{title(results, UNREGULARIZED[0])}: not measured.")
    says = f"{title(results, UNREGULARIZED[0])}: image error x {found['ratio']:.3g}"
    low, high = found["low"], found["high"]
    if low is None:
        return judged([Part(found["ratio"] > DECAY, says, 1)])
    return judged([Part(low > DECAY, f"{says} [{low:.3g}, {high:.3g}]", found["seeds"], high < DECAY)])


def trained_without_guidance(results: Mapping[str, Any]) -> Judgement:
    """Judge if, evaluated with guidance, training without it is surely as good as training with it."""
    found = comparison(results, *GUIDANCE_PAIR)
    if found is None:
        return Judgement("not measured yet", "Not both ways of training were measured.")
    means = " and ".join(f"{mean_rule(results, side)['mean']:.3f}" for side in GUIDANCE_PAIR)
    says = f"Evaluated with guidance, trained without and with it: {means}, difference {signed(found)}"
    return judged([_as_good(found, says)])


def unifpo_fails(results: Mapping[str, Any]) -> Judgement:
    """Judge if UniFPO is surely less than `AS_GOOD` above the base."""
    found = comparison(results, *UNIFPO)
    if found is None:
        return Judgement("not measured yet", "UniFPO was not measured.")
    means = [f"{mean_rule(results, side)['mean']:.3f}" for side in UNIFPO]
    says = f"UniFPO {means[0]}, the base {means[1]}, difference {signed(found)}"
    return judged([Part(found["high"] < AS_GOOD, says, found["seeds"], found["low"] > AS_GOOD)])


def _all_above(pairs: tuple[tuple[Side, Side], ...]) -> Callable[[Mapping[str, Any]], Judgement]:
    return lambda results: judged(above(results, left, right) for left, right in pairs)


CLAIMS = (
    Claim("sft", "Supervised fine-tuning is above the base", "Table 1", _all_above(SFT_BASE)),
    Claim("one_expert", "Each method that trains one expert is above the base", "Table 1", _all_above(ABOVE_BASE)),
    Claim(
        "joint",
        "UniGRPO is above the base, fine-tuning and each method that trains one expert, 95 % intervals apart",
        "Table 1",
        unigrpo_above_each,
    ),
    Claim(
        "two_stage",
        "UniGRPO is above training one expert after the other, 95 % intervals apart",
        "Table 1",
        unigrpo_above_two_stage,
    ),
    Claim("thinking", "Thinking helps each method", "Table 1", _all_above(WITH_AND_WITHOUT)),
    Claim(
        "unifpo",
        f"UniFPO fails to converge (here: it is less than {AS_GOOD} above the base)",
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
        "hacking",
        "Without a regulariser the reward is hacked (here: against the velocity MSE at the end of long runs, the rule "
        f"lower by {HACKED} or more, intervals apart, and the learned reward not lower by {AS_GOOD})",
        "Figure 5",
        hacked,
    ),
    Claim(
        "latent_kl",
        "A latent KL (of the same weight, and of the same strength) lies in between: above no regulariser, below the "
        "velocity MSE",
        "Figure 5",
        _all_above(IN_BETWEEN),
    ),
    Claim(
        "decay",
        f"Without a regulariser images decay (here: image error over {DECAY} times that with the velocity MSE)",
        "Figure 5",
        images_decay,
    ),
)


def comparison(results: Mapping[str, Any], left: Side, right: Side, by: str = "rule") -> dict[str, Any] | None:
    """Look up the paired difference of two systems by a score, None where it was not measured."""
    return results["comparisons"][by].get(f"{'/'.join(left)} - {'/'.join(right)}")


def mean_rule(results: Mapping[str, Any], side: Side) -> Any:
    """Look up the mean rule of a system in a mode with its interval, None where it was not measured."""
    return results["systems"].get(side[0], {}).get("modes", {}).get(side[1], {}).get("rule")


def title(results: Mapping[str, Any], side: Side) -> str:
    """Name a system, and how it was evaluated where it is evaluated in several ways."""
    system = results["systems"].get(side[0]) or vars(SYSTEMS[side[0]])
    name, modes = system["title"], set(system["modes"])
    kind = "direct" if "direct" in modes else "rounds"
    if not {"sampled", kind} <= modes:
        return name
    names = {"direct": {"sampled": ", thinking", "direct": ", no thinking"}}
    names["rounds"] = {"sampled": ", first image", "rounds": ", second image"}
    return name + names[kind].get(side[1], "")


def trained_seeds(results: Mapping[str, Any], interval: Mapping[str, Any], *sides: Side) -> int:
    """Count the seeds of an interval; 0 if nothing in it was trained, so that there is no seed to vary."""
    return interval["seeds"] if any(results["systems"][system]["trained"] for system, _ in sides) else 0


def signed(interval: Mapping[str, Any]) -> str:
    """Write a difference and its interval, all with their signs."""
    mean, low, high = (f"{round(interval[key], 3) + 0.0:+.3f}" for key in ("mean", "low", "high"))  # no "-0.000"
    return f"{mean} [{low}, {high}]"


def bracketed(interval: Mapping[str, Any]) -> str:
    """Write a mean and its interval."""
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
