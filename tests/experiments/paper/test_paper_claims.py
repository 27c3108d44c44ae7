"""Verdicts follow what is planted: they flip with it, a tie does not hold, and what is missing is said."""

import pytest

from tests.helpers.synthetic import World, planted_errors, planted_means, write_world
from trl_unigrpo.experiments.paper.claims import (
    AS_GOOD,
    CLAIMS,
    DECAY,
    OTHERS,
    SIMILAR,
    Judgement,
    Part,
    judged,
)
from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, main_mode
from trl_unigrpo.experiments.paper.results import collect


SYSTEMS = tuple(name for group in ("table1", "figure4", "figure5") for name in GROUP_SYSTEMS[group])


def verdicts(output, means=None, errors=None, systems=SYSTEMS, seeds=None, **world):
    """Claim -> its entry in the results of a world with these changes."""
    planted = World(planted_means() | (means or {}), planted_errors() | (errors or {}), num_prompts=28, **world)
    write_world(output, planted, systems, seeds)
    return {claim["id"]: claim for claim in collect(output)["claims"]}


def test_what_is_planted_as_the_paper_claims_it_holds(tmp_path):
    found = verdicts(tmp_path)
    assert {name: of["verdict"] for name, of in found.items()} == {claim.id: "holds" for claim in CLAIMS}


FLIPS = {
    # One change, and the claims that it turns. The planted spreads leave differences of 0.03 beyond doubt.
    "fine-tuning harms": ({"sft": 0.42}, {}, {"sft"}),
    "text alone harms": ({"text_grpo": 0.42}, {}, {"one_expert"}),
    "one system above": ({"awm_thinking": 0.84}, {}, {"joint"}),
    "two stages above": ({"two_stage": 0.84}, {}, {"joint", "two_stage"}),
    "thinking harms ReFL": ({"refl": 0.65}, {}, {"thinking"}),
    "UniFPO converges": ({"unifpo": 0.6}, {}, {"unifpo"}),
    "guidance in training is better": ({"guidance_on": 0.75}, {}, {"guidance"}),
    "pictures decay a little": ({}, {"no_regularizer": 0.02}, {"regularizer"}),
    "decay with less reward": ({"no_regularizer": 0.7}, {}, {"regularizer"}),
    "the latent KL keeps pictures": ({}, {"latent_kl_matched": 0.002}, {"velocity_mse"}),
    # The clean corpus is no system of the paper.
    "clean fine-tuning above": ({"sft_clean": 0.84}, {}, set()),
}


@pytest.mark.parametrize("kind", FLIPS)
def test_verdicts_flip_with_what_is_planted(tmp_path, kind):
    means, errors, expected = FLIPS[kind]
    found = verdicts(tmp_path, means, errors)
    assert {name for name, of in found.items() if of["verdict"] != "holds"} == expected
    assert all(found[name]["verdict"] == "does not hold" for name in expected)


def test_ties_do_not_hold(tmp_path):
    means = {"sft": 0.45, "text_grpo": 0.45, "two_stage": 0.8, "refl": 0.6}
    found = verdicts(tmp_path, means, {"latent_kl": 0.003})
    assert {name for name, of in found.items() if of["verdict"] == "does not hold"} == {
        "sft", "one_expert", "joint", "two_stage", "thinking", "velocity_mse",
    }  # fmt: skip
    assert "(no difference seen)" in found["one_expert"]["sentence"]


def test_an_exact_tie_does_not_hold(tmp_path):
    still = {"seed_spread": 0.0, "prompt_spread": 0.0, "rest": 0.0}
    found = verdicts(tmp_path, {"sft": 0.45, "two_stage": 0.8, "guidance_on": 0.7, "unifpo": 0.45}, **still)
    lost = {name for name, of in found.items() if of["verdict"] == "does not hold"}
    assert lost == {"sft", "joint", "two_stage"}, "as good as, and no better than, hold in a tie"


def test_sentences_carry_the_numbers(tmp_path):
    still = {"seed_spread": 0.0, "prompt_spread": 0.0, "rest": 0.0}
    found = verdicts(tmp_path, {"flow_grpo_thinking": 0.4}, **still)
    assert found["one_expert"]["sentence"].startswith(
        "flow grpo, thinking 0.400 against base, thinking 0.450: -0.050 [-0.050, -0.050] (the other way round); text"
    )
    assert found["joint"]["sentence"] == (
        "UniGRPO 0.800 [0.800, 0.800] is above 16 of 16; the next is two stage 0.650 [0.650, 0.650]."
    )
    assert "began at 0.450, was 0.450 at its best and 0.440 at the end" in found["unifpo"]["sentence"]
    assert "image error x 28.7 [" in found["regularizer"]["sentence"]


def test_other_systems_are_named_where_unigrpo_is_not_above_them(tmp_path):
    sentence = verdicts(tmp_path, {"awm": 0.9, "refl": 0.85})["joint"]["sentence"]
    assert "above 14 of 16; not apart from these, or below: awm 0." in sentence and ", refl 0.8" in sentence


def test_what_is_missing_is_not_measured_yet(tmp_path):
    found = verdicts(tmp_path, systems=("base", "unigrpo", "text_grpo"))
    assert found["joint"]["verdict"] == "not measured yet"
    assert "is above 3 of 16; the next is text grpo" in found["joint"]["sentence"]
    assert "not measured: sft" in found["joint"]["sentence"] and "two_stage" in found["joint"]["sentence"]
    assert found["one_expert"]["verdict"] == "not measured yet"
    assert "flow_grpo_thinking and base, thinking: not both measured" in found["one_expert"]["sentence"]
    assert {of["verdict"] for of in found.values()} == {"not measured yet"}


def test_one_part_that_fails_settles_a_claim(tmp_path):
    found = verdicts(tmp_path, {"text_grpo": 0.42}, systems=("base", "unigrpo", "text_grpo"))
    assert found["one_expert"]["verdict"] == "does not hold"


def test_without_unigrpo_nothing_is_above(tmp_path):
    found = verdicts(tmp_path, systems=("base", "sft", "two_stage"))
    assert found["joint"]["verdict"] == found["two_stage"]["verdict"] == "not measured yet"
    assert found["joint"]["sentence"] == "UniGRPO was not measured."
    assert found["sft"]["verdict"] == "holds"


def test_a_single_seed_is_said(tmp_path):
    found = verdicts(tmp_path, seeds=(0,))
    assert all("One seed only" in of["sentence"] for of in found.values())
    assert {of["verdict"] for of in found.values()} == {"holds"}


def test_margins_are_those_of_the_texts():
    text = {claim.id: claim.text for claim in CLAIMS}
    assert str(AS_GOOD) in text["unifpo"] and str(AS_GOOD) in text["guidance"]
    assert str(DECAY) in text["regularizer"] and str(SIMILAR) in text["regularizer"]


def test_others_are_the_systems_of_the_paper():
    assert len(set(OTHERS)) == len(OTHERS) == 16
    assert ("base", "direct") in OTHERS and ("flow_grpo", "direct") in OTHERS and ("unifpo", "sampled") in OTHERS
    assert not {"unigrpo", "sft_clean"} & {system for system, _ in OTHERS}


def test_judged():
    assert judged([Part(True, "a"), Part(True, "b")]) == Judgement("holds", "a; b.")
    assert judged([Part(True, "a"), Part(None, "b")]).verdict == "not measured yet"
    assert judged([Part(False, "a"), Part(None, "b")]).verdict == "does not hold"
    assert judged([Part(True, "a", 1)]).sentence.endswith(
        "One seed only: what another would change is not in the interval."
    )


def interval(low, high, seeds=5):
    return {"mean": (low + high) / 2, "low": low, "high": high, "seeds": seeds}


def judgement(name, rewards, differences=None, ratio=None):
    """The verdict of a claim from intervals made by hand. `rewards`: system -> its reward in its own mode."""
    systems = {
        system: {"title": system, "trained": system != "base", "modes": {main_mode(system): {"reward": interval(*of)}}}
        for system, of in rewards.items()
    }
    results = {
        "systems": systems,
        "comparisons": {key: interval(*of) for key, of in (differences or {}).items()},
        "figure5": {"no_regularizer": {"picture_error_ratio": ratio}},
        "curves": {},
    }
    return next(claim for claim in CLAIMS if claim.id == name).judge(results).verdict


def test_above_means_that_intervals_do_not_touch():
    own = {"unigrpo": (0.78, 0.82)}
    assert judgement("two_stage", own | {"two_stage": (0.75, 0.779)}) == "holds"
    assert judgement("two_stage", own | {"two_stage": (0.74, 0.79)}) == "does not hold"
    assert judgement("two_stage", own | {"two_stage": (0.74, 0.78)}) == "does not hold"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((-0.3, -0.2), "holds"),
        ((-0.05, 0.019), "holds"),
        ((-0.05, 0.021), "does not hold"),
        ((0.1, 0.2), "does not hold"),
    ],
)
def test_failing_to_converge_is_a_gain_that_is_surely_small(difference, verdict):
    rewards = {"unifpo": (0.4, 0.6), "base": (0.4, 0.5)}
    assert judgement("unifpo", rewards, {"unifpo/sampled - base/sampled": difference}) == verdict


@pytest.mark.parametrize(
    ("ratio", "difference", "verdict"),
    [
        ((11, 40), (-0.04, 0.04), "holds"),
        ((9, 40), (-0.04, 0.04), "does not hold"),
        ((11, 40), (-0.06, 0.04), "does not hold"),
        ((11, 40), (-0.04, 0.06), "does not hold"),
        ((11, 40), (-0.2, -0.1), "does not hold"),
    ],
)
def test_decay_is_surely_large_at_a_reward_that_is_surely_similar(ratio, difference, verdict):
    rewards = {"no_regularizer": (0.7, 0.8), "unigrpo": (0.7, 0.8)}
    found = {"ratio": 20.0, "low": ratio[0], "high": ratio[1], "seeds": 5}
    assert (
        judgement("regularizer", rewards, {"no_regularizer/sampled - unigrpo/sampled": difference}, found) == verdict
    )
