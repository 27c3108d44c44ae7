"""Verdicts follow what is planted: they flip with it, a tie shows nothing, and what is missing is said."""

import pytest

from tests.helpers.synthetic import World, planted_errors, planted_learned, planted_means, write_world
from trl_unigrpo.experiments.paper.claims import (
    AS_GOOD,
    CLAIMS,
    DECAY,
    HACKED,
    OTHERS,
    Judgement,
    Part,
    judged,
)
from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, main_mode
from trl_unigrpo.experiments.paper.results import collect


SYSTEMS = tuple(name for group in ("table1", "figure4", "figure5") for name in GROUP_SYSTEMS[group])


def verdicts(output, means=None, errors=None, learned=None, systems=SYSTEMS, seeds=None, **world):
    """Claim -> its entry in the results of a world with these changes."""
    parts = (planted_means() | (means or {}), planted_errors() | (errors or {}))
    planted = World(*parts, learned=planted_learned() | (learned or {}), num_prompts=28, **world)
    write_world(output, planted, systems, seeds)
    return {claim["id"]: claim for claim in collect(output)["claims"]}


def test_what_is_planted_as_the_paper_claims_it_holds(tmp_path):
    found = verdicts(tmp_path)
    assert {name: of["verdict"] for name, of in found.items()} == {claim.id: "holds" for claim in CLAIMS}


FLIPS = {
    # One change, and the claims that it turns. The planted spreads leave differences of 0.03 beyond doubt.
    "fine-tuning harms": ({"sft": 0.42}, {}, {}, {"sft"}),
    "text alone harms": ({"text_grpo": 0.42}, {}, {}, {"one_expert"}),
    "an image objective harms": ({"nft_thinking": 0.42}, {}, {}, {"one_expert"}),
    "one system above": ({"awm_thinking": 0.84}, {}, {}, {"joint"}),
    "two stages above": ({"two_stage": 0.84}, {}, {}, {"two_stage"}),
    "thinking harms ReFL": ({"refl": 0.65}, {}, {}, {"thinking"}),
    "UniFPO converges": ({"unifpo": 0.6}, {}, {}, {"unifpo"}),
    "guidance in training is better": ({"guidance_on": 0.75}, {}, {}, {"guidance"}),
    "the rule does not fall": ({"long_none": 0.79}, {}, {}, {"hacking", "latent_kl"}),
    "the learned reward falls, too": ({}, {}, {"long_none": 0.6}, {"hacking"}),
    "the latent KL keeps the rule": ({"long_latent_kl": 0.83}, {}, {}, {"latent_kl"}),
    "a strong latent KL loses it": ({"long_latent_kl_matched": 0.6}, {}, {}, {"latent_kl"}),
    "images decay a little": ({}, {"long_none": 0.005}, {}, {"decay"}),
    # The clean corpus is no system of the paper, and of other joint ones it claims nothing.
    "clean fine-tuning above": ({"sft_clean": 0.84}, {}, {}, set()),
    "UniNFT above": ({"uninft": 0.84}, {}, {}, set()),
}


@pytest.mark.parametrize("kind", FLIPS)
def test_verdicts_flip_with_what_is_planted(tmp_path, kind):
    means, errors, learned, expected = FLIPS[kind]
    found = verdicts(tmp_path, means, errors, learned)
    assert {name for name, of in found.items() if of["verdict"] != "holds"} == expected
    assert all(found[name]["verdict"] == "contradicted" for name in expected)


def test_only_hacking_asks_for_the_learned_reward(tmp_path):
    """Turned around, it leaves all other verdicts as they are."""
    upside_down = {name: 0.9 - mean for name, mean in planted_learned().items()}
    found = verdicts(tmp_path, learned=upside_down | {"long_none": 0.1})
    assert {name for name, of in found.items() if of["verdict"] != "holds"} == {"hacking"}


def test_ties_show_nothing(tmp_path):
    means = {"sft": 0.45, "text_grpo": 0.45, "two_stage": 0.8, "refl": 0.6}
    means |= {"long_latent_kl": 0.8}
    found = verdicts(tmp_path, means)
    assert {name for name, of in found.items() if of["verdict"] == "not shown"} == {
        "sft", "one_expert", "two_stage", "thinking", "latent_kl",
    }  # fmt: skip
    assert "(no difference seen)" in found["one_expert"]["sentence"]


def test_an_exact_tie_shows_nothing(tmp_path):
    still = {"seed_spread": 0.0, "prompt_spread": 0.0, "rest": 0.0}
    tied = {"sft": 0.45, "two_stage": 0.8, "awm_thinking": 0.8, "guidance_on": 0.7, "unifpo": 0.45}
    found = verdicts(tmp_path, tied, **still)
    lost = {name for name, of in found.items() if of["verdict"] == "not shown"}
    assert lost == {"sft", "joint", "two_stage"}, "as good as, and no better than, hold in a tie"


def test_sentences_carry_the_numbers(tmp_path):
    still = {"seed_spread": 0.0, "prompt_spread": 0.0, "rest": 0.0}
    found = verdicts(tmp_path, {"flow_grpo_thinking": 0.4}, **still)
    assert (
        "; flow grpo, thinking 0.400 against base, thinking 0.450: -0.050 [-0.050, -0.050] (the other way round)"
        in (found["one_expert"]["sentence"])
    )
    assert found["joint"]["sentence"] == (
        "UniGRPO 0.800 [0.800, 0.800] is above 14 of 14; the next is refl, thinking 0.600 [0.600, 0.600]."
    )
    assert found["unifpo"]["sentence"] == "UniFPO 0.440, the base 0.450, difference -0.010 [-0.010, -0.010]."
    assert found["hacking"]["sentence"] == (
        "the rule 0.650 [0.650, 0.650] against 0.800 [0.800, 0.800]: -0.150 [-0.150, -0.150]; "
        "the learned reward +0.000 [+0.000, +0.000]. "
        "Against the base: the rule +0.200 [+0.200, +0.200], the learned reward +0.240 [+0.240, +0.240]."
    )
    assert "image error x " in found["decay"]["sentence"]


def test_other_systems_are_named_where_unigrpo_is_not_above_them(tmp_path):
    sentence = verdicts(tmp_path, {"awm": 0.9, "refl": 0.85})["joint"]["sentence"]
    assert "above 12 of 14; not apart from these, or below: awm 0." in sentence and ", refl 0.8" in sentence


def test_what_is_missing_is_not_measured_yet(tmp_path):
    found = verdicts(tmp_path, systems=("base", "unigrpo", "text_grpo"))
    assert found["joint"]["verdict"] == "not measured yet"
    assert "is above 3 of 14; the next is text grpo" in found["joint"]["sentence"]
    assert "not measured: SFT, no thinking, SFT, thinking, ReFL," in found["joint"]["sentence"]
    assert found["one_expert"]["verdict"] == "not measured yet"
    assert "FlowGRPO (thinking) and base, thinking: not both measured" in found["one_expert"]["sentence"]
    assert {of["verdict"] for of in found.values()} == {"not measured yet"}


def test_one_part_that_fails_settles_a_claim(tmp_path):
    found = verdicts(tmp_path, {"text_grpo": 0.42}, systems=("base", "unigrpo", "text_grpo"))
    assert found["one_expert"]["verdict"] == "contradicted"


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
    assert str(DECAY) in text["decay"] and str(HACKED) in text["hacking"] and str(AS_GOOD) in text["hacking"]


def test_others_are_what_trains_one_expert_or_none():
    assert len(set(OTHERS)) == len(OTHERS) == 14
    assert ("base", "direct") in OTHERS and ("flow_grpo", "direct") in OTHERS and ("text_grpo", "sampled") in OTHERS
    assert not {"unigrpo", "sft_clean", "unifpo", "uninft", "two_stage"} & {system for system, _ in OTHERS}


def test_judged():
    holds, fails, refuted, unknown = Part(True, "a"), Part(False, "b"), Part(False, "c", refuted=True), Part(None, "d")
    assert judged([holds, holds]) == Judgement("holds", "a; a.")
    assert judged([holds, unknown]).verdict == "not measured yet"
    assert judged([holds, fails, unknown]).verdict == "not shown"
    assert judged([holds, fails, refuted, unknown]).verdict == "contradicted"
    assert judged([Part(True, "a", 1)]).sentence.endswith(
        "One seed only: what another would change is not in the interval."
    )


def interval(low, high, seeds=5):
    return {"mean": (low + high) / 2, "low": low, "high": high, "seeds": seeds}


def judgement(name, scores, differences=None, learned=None, ratio=None):
    """The verdict of a claim from intervals made by hand. `scores`: system -> its rule in its own mode."""
    systems = {
        system: {
            "title": system,
            "trained": system != "base",
            "modes": {mode: {"rule": interval(*of)} for mode in (main_mode(system), "guided")},
        }
        for system, of in scores.items()
    }
    results = {
        "systems": systems,
        "comparisons": {
            "rule": {key: interval(*of) for key, of in (differences or {}).items()},
            "learned": {key: interval(*of) for key, of in (learned or {}).items()},
        },
        "figure5": {"long_none": {"image_error_ratio": ratio}},
    }
    return next(claim for claim in CLAIMS if claim.id == name).judge(results).verdict


def test_above_means_that_intervals_do_not_touch():
    own = {"unigrpo": (0.78, 0.82)}
    assert judgement("two_stage", own | {"two_stage": (0.75, 0.779)}) == "holds"
    assert judgement("two_stage", own | {"two_stage": (0.74, 0.79)}) == "not shown"
    assert judgement("two_stage", own | {"two_stage": (0.74, 0.78)}) == "not shown"
    assert judgement("two_stage", own | {"two_stage": (0.81, 0.9)}) == "not shown"
    assert judgement("two_stage", own | {"two_stage": (0.83, 0.9)}) == "contradicted"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((-0.019, 0.1), "holds"),
        ((-0.021, 0.1), "not shown"),
        ((-0.1, -0.019), "not shown"),
        ((-0.1, -0.021), "contradicted"),
    ],
)
def test_as_good_is_surely_not_lower_by_the_margin(difference, verdict):
    differences = {"guidance_off/guided - guidance_on/guided": difference}
    scores = {"guidance_off": (0.4, 0.6), "guidance_on": (0.4, 0.5)}
    assert judgement("guidance", scores, differences) == verdict


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        ((-0.3, -0.2), "holds"),
        ((-0.05, 0.019), "holds"),
        ((-0.05, 0.021), "not shown"),
        ((0.019, 0.2), "not shown"),
        ((0.021, 0.2), "contradicted"),
    ],
)
def test_failing_to_converge_is_a_gain_that_is_surely_small(difference, verdict):
    rewards = {"unifpo": (0.4, 0.6), "base": (0.4, 0.5)}
    assert judgement("unifpo", rewards, {"unifpo/sampled - base/sampled": difference}) == verdict


@pytest.mark.parametrize(
    ("none", "difference", "learned", "verdict"),
    [
        ((0.70, 0.74), (-0.10, -0.04), (-0.01, 0.05), "holds"),
        ((0.70, 0.74), (-0.10, -0.04), (-0.03, 0.09), "not shown"),  # the learned reward may have fallen, too
        ((0.70, 0.74), (-0.10, -0.04), (-0.09, -0.03), "contradicted"),  # it has
        ((0.70, 0.74), (-0.08, -0.01), (-0.01, 0.05), "not shown"),  # a smaller fall
        ((0.70, 0.74), (-0.04, -0.01), (-0.01, 0.05), "contradicted"),  # surely a smaller one
        ((0.70, 0.76), (-0.10, -0.04), (-0.01, 0.05), "not shown"),  # intervals that touch
        ((0.84, 0.88), (0.04, 0.10), (-0.01, 0.05), "contradicted"),
    ],
)
def test_hacking_is_a_rule_that_fell_and_a_learned_reward_that_did_not(none, difference, learned, verdict):
    pair = "long_none/sampled - long_velocity_mse/sampled"
    scores = {"long_none": none, "long_velocity_mse": (0.76, 0.82)}
    assert judgement("hacking", scores, {pair: difference}, {pair: learned}) == verdict
    assert judgement("hacking", scores, {pair: difference}) == "not measured yet"
    base = "long_none/sampled - base/sampled"
    alone = judgement("hacking", scores, {pair: difference, base: difference}, {pair: learned})
    assert alone == verdict, "against the base one score is missing: nothing is told of it"


@pytest.mark.parametrize(
    ("ratio", "verdict"), [((2.1, 8), "holds"), ((1.9, 8), "not shown"), ((0.5, 1.5), "contradicted")]
)
def test_decay_is_surely_large(ratio, verdict):
    found = {"ratio": 4.0, "low": ratio[0], "high": ratio[1], "seeds": 5}
    assert judgement("decay", {"long_none": (0.7, 0.8)}, ratio=found) == verdict
    assert judgement("decay", {}) == "not measured yet"
