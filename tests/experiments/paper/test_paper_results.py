"""From run folders to results.json: planted effects come back, and what cannot be used is named."""

import json
import math
import re

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from tests.helpers.synthetic import CATEGORIES, DIRECT, World, edit, planted_means, write, write_world
from trl_unigrpo.experiments.paper.curves import POINTS, curve
from trl_unigrpo.experiments.paper.loading import FinishedRun
from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, full_grid
from trl_unigrpo.experiments.paper.results import collect
from trl_unigrpo.experiments.paper.systems import SYSTEMS
from trl_unigrpo.statistics import crossed_interval, holm


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The whole grid, with each claim of the paper planted."""
    output = tmp_path_factory.mktemp("grid")
    write_world(output, World(categories={"counting": -0.1}))
    return output


@pytest.fixture(scope="module")
def results(output):
    return collect(output)


def table(output, system, mode, score="rule"):
    """(seeds, prompts) of the run folders, read without the code under test."""
    files = sorted(output.glob(f"{system}/seed-*/run.json"))
    return np.array([json.loads(file.read_text())["evaluations"][mode][score] for file in files])


def holds(interval, truth):
    return interval["low"] <= truth <= interval["high"]


def test_means_and_intervals_are_those_of_the_runs(output, results):
    expected = crossed_interval(table(output, "unigrpo", "greedy"))
    found = results["systems"]["unigrpo"]["modes"]["greedy"]["rule"]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected[:3], abs=5e-5)
    assert found["seeds"] == 5 and found["prompts"] == 70


def test_the_learned_reward_has_intervals_of_its_own(output, results):
    expected = crossed_interval(table(output, "unigrpo", "sampled", "learned"))
    found = results["systems"]["unigrpo"]["modes"]["sampled"]["learned"]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected[:3], abs=5e-5)
    rows = (table(output, name, "sampled", "learned") for name in ("long_none", "long_velocity_mse"))
    expected = crossed_interval(np.subtract(*rows))
    found = results["comparisons"]["learned"]["long_none/sampled - long_velocity_mse/sampled"]
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected[:3], abs=5e-5)


def test_validations_are_those_of_the_long_runs(output, results):
    assert list(results["validation"]) == list(GROUP_SYSTEMS["figure5"])
    found = results["validation"]["long_none"]
    lines = [json.loads(line) for line in (output / "long_none/seed-3/validation.jsonl").read_text().splitlines()]
    assert found["rollouts"] == [line["rollouts"] for line in lines] and found["seeds"] == [0, 1, 2, 3, 4]
    for name in ("learned", "rule", "image_error"):
        assert found[name][3] == [line[name] for line in lines]


def test_where_runs_were_stopped_is_a_share_of_them(output, results):
    edit(output / "unigrpo/seed-1/run.json", lambda record: record["chosen_point"].update(rollouts=960))
    assert collect(output)["systems"]["unigrpo"]["stopped"] == [0.5, 0.25, 0.5, 0.5, 0.5]
    edit(output / "unigrpo/seed-1/run.json", lambda record: record["chosen_point"].update(rollouts=1920))
    collect(output)
    assert results["systems"]["base"]["stopped"] == []


def test_results_file_holds_what_is_returned(output, results):
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results


def test_same_folders_give_the_same_bytes(output, results):
    first = (output / "results.json").read_bytes()
    collect(output)
    assert (output / "results.json").read_bytes() == first
    assert not list(output.glob("*.part"))


def test_categories_are_means_over_their_own_prompts(output, results):
    rewards = table(output, "unigrpo", "sampled")
    chosen = np.arange(70) % len(CATEGORIES) == CATEGORIES.index("counting")
    found = results["systems"]["unigrpo"]["modes"]["sampled"]["categories"]["counting"]
    assert found["mean"] == pytest.approx(rewards[:, chosen].mean(), abs=5e-5)
    assert found["prompts"] == chosen.sum() == 10
    others = [
        of["mean"] for name, of in results["systems"]["unigrpo"]["modes"]["sampled"]["categories"].items()
        if name != "counting"
    ]  # fmt: skip
    assert np.mean(others) - found["mean"] == pytest.approx(0.1, abs=0.04), "the planted effect"


@pytest.mark.parametrize(
    ("system", "mode", "other"),
    [
        ("flow_grpo", "direct", ("unigrpo", "sampled")),
        ("long_none", "sampled", ("long_velocity_mse", "sampled")),
        ("scouts", "sampled", ("uninft", "sampled")),
        ("rounds", "rounds", ("base_seeing", "rounds")),
        ("unifpo_8", "sampled", ("unifpo", "sampled")),
    ],
)
def test_differences_are_paired_by_seed_and_prompt(output, results, system, mode, other):
    """To UniGRPO, of long runs to its long run, or to what a system builds on; over the seeds of both."""
    left, right = table(output, system, mode), table(output, *other)
    expected = crossed_interval(left - right[: len(left)])
    found = results["systems"][system]["modes"][mode]["difference"]
    assert found["to"] == list(other)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected[:3], abs=5e-5)
    assert "difference" not in results["systems"]["unigrpo"]["modes"]["sampled"]


def test_other_starts_are_not_compared(results):
    assert "difference" not in results["systems"]["two_stage_refl"]["modes"]["sampled"], "only another's start"
    assert "difference" not in results["systems"]["guidance_on"]["modes"]["sampled"], "starts from another base"
    seeing = results["systems"]["base_seeing"]["modes"]
    assert seeing["sampled"]["difference"]["to"] == ["base", "sampled"]
    assert "difference" not in seeing["rounds"], "the base has no second image"


def test_the_base_stands_beside_every_seed(output, results):
    expected = crossed_interval(table(output, "base", "sampled") - table(output, "unigrpo", "sampled"))
    found = results["systems"]["base"]["modes"]["sampled"]["difference"]
    assert found["seeds"] == 5
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(expected[:3], abs=5e-5)
    assert results["systems"]["base"]["trained"] is False


def test_p_values_are_corrected_within_tables_of_five_seeds(results):
    families = {group: [] for group in GROUP_SYSTEMS}
    for system in results["systems"].values():
        for mode in system["modes"].values():
            if mode.get("difference"):
                families[system["group"]].append(mode["difference"])
    assert len(families["table1"]) == len(GROUP_SYSTEMS["table1"]) - 1 + 3, "the base and both SFTs come twice"
    assert len(families["figure5"]) == len(GROUP_SYSTEMS["figure5"]) - 1
    for group in ("table1", "figure5"):
        expected = holm([of["p"] for of in families[group]])
        assert [of["p_holm"] for of in families[group]] == pytest.approx(expected, rel=0.01)
    assert len(families["ablations"]) == len(GROUP_SYSTEMS["ablations"])
    assert len(families["extras"]) == len(GROUP_SYSTEMS["extras"]) + 1, "both images of two rounds"
    assert not any("p_holm" in of for group in ("extras", "ablations") for of in families[group])


def test_fewer_than_five_seeds_have_no_p_values(tmp_path):
    write_world(tmp_path, World(num_prompts=14), systems=("base", "unigrpo", "text_grpo"), seeds=(0, 1))
    modes = [mode for of in collect(tmp_path)["systems"].values() for mode in of["modes"].values()]
    found = [mode["difference"] for mode in modes if "difference" in mode]
    assert len(found) == 3 and not any("p_holm" in of for of in found)


def test_a_system_that_is_not_known_is_compared_as_its_group_is(tmp_path):
    """Its runs may be of another version."""
    write_world(tmp_path, World(num_prompts=14), systems=("unigrpo", "text_grpo"), seeds=(0,))
    (tmp_path / "text_grpo").rename(tmp_path / "other")
    edit(tmp_path / "other" / "seed-0" / "run.json", lambda run: run.update(system="other"))
    found = collect(tmp_path)["systems"]["other"]["modes"]["sampled"]["difference"]
    assert found["to"] == ["unigrpo", "sampled"] and found["mean"] < 0


def test_rollouts_of_the_stages_add_up(results):
    systems = results["systems"]
    assert systems["two_stage"]["rollouts"] == systems["unigrpo"]["rollouts"] == 192 * 20
    assert systems["guidance_on"]["rollouts"] == 2 * 192 * 20


def test_costs_add_up(results):
    assert results["systems"]["unigrpo"]["train_cpu_seconds"] == pytest.approx(102)
    assert results["systems"]["two_stage"]["train_cpu_seconds"] == pytest.approx(2 * 102)
    assert results["systems"]["unigrpo"]["clip_frac"] == pytest.approx(0.1 + 0.02 * 2 + 0.1 / 2)  # five seeds
    assert results["systems"]["base"]["clip_frac"] is None
    seeds = {name: of for name, of in full_grid().items() if SYSTEMS[name].method != "none"}
    assert results["machine"]["runs"] == sum(map(len, seeds.values())) + 2
    assert results["machine"]["train_cpu_seconds"] == sum(100 + seed for of in seeds.values() for seed in of)
    assert results["machine"]["dates"] == ["2026-01-01", "2026-01-05"]


def test_image_error_ratio_is_a_t_interval_of_its_logarithm(output, results):
    def errors(system):
        files = sorted(output.glob(f"{system}/seed-*/run.json"))
        return np.array([json.loads(file.read_text())["evaluations"]["sampled"]["image_error"] for file in files])

    logs = np.log(errors("long_none") / errors("long_velocity_mse"))
    low, high = np.exp(ttest_1samp(logs, 0.0).confidence_interval(0.95))
    found = results["figure5"]["long_none"]["image_error_ratio"]
    assert (found["ratio"], found["low"], found["high"]) == pytest.approx((np.exp(logs.mean()), low, high), rel=1e-3)
    assert holds(found, 30), "the planted ratio"


def test_planted_differences_are_found(results):
    means = planted_means()
    comparisons = results["comparisons"]["rule"]
    assert comparisons["base/sampled - base/direct"]["mean"] == pytest.approx(DIRECT, abs=0.02)
    expected = means["flow_grpo_thinking"] - means["flow_grpo"]
    assert comparisons["flow_grpo_thinking/sampled - flow_grpo/direct"]["mean"] == pytest.approx(expected, abs=0.02)
    assert results["figure4"]["guidance_scale"] == 2.0
    assert results["figure4"]["cells"]["guidance_off"]["guided"]["mean"] == pytest.approx(0.7, abs=0.02)


@pytest.mark.slow
def test_intervals_cover_what_was_planted(tmp_path):
    """Over 300 worlds: means for new seeds and prompts, differences and categories, each about 95 % of the time."""
    names = ("mean", "difference", "category")
    hits, draws = dict.fromkeys(names, 0), 300
    for draw in range(draws):
        output = tmp_path / str(draw)
        write_world(output, World(seed_spread=0.02), systems=("unigrpo", "text_grpo"), draw=draw)
        systems = collect(output)["systems"]
        found = systems["text_grpo"]["modes"]["sampled"]
        hits["mean"] += holds(found["rule"], 0.6)
        hits["difference"] += holds(found["difference"], 0.6 - 0.8)
        hits["category"] += holds(found["categories"]["position"], 0.6)
    for name in names:
        assert 0.915 <= hits[name] / draws <= 0.985, (name, hits)


def test_a_run_with_one_seed_has_an_interval_over_prompts(tmp_path):
    write_world(tmp_path, systems=("base", "unigrpo"), seeds=(3,))
    write_world(tmp_path, systems=("base",), seeds=(0,))
    results = collect(tmp_path)
    found = results["systems"]["unigrpo"]["modes"]["sampled"]["rule"]
    assert found["seeds"] == 1
    expected = ttest_1samp(table(tmp_path, "unigrpo", "sampled")[0], 0.0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected), abs=5e-5)


def test_systems_without_common_seeds_are_not_compared(tmp_path):
    write_world(tmp_path, systems=("unigrpo",), seeds=(0, 1))
    write_world(tmp_path, systems=("text_grpo",), seeds=(2, 3))
    assert collect(tmp_path)["systems"]["text_grpo"]["modes"]["sampled"]["difference"] is None


def test_missing_seeds_systems_and_evaluations_are_listed(tmp_path):
    write_world(tmp_path, systems=("base", "unigrpo", "sft"), seeds=(0, 1, 2))
    edit(tmp_path / "unigrpo/seed-1/run.json", lambda record: record["evaluations"].pop("greedy"))
    missing = collect(tmp_path)["missing"]
    assert missing["seeds"]["unigrpo"] == {"expected": list(SYSTEMS["unigrpo"].seeds), "missing": [3, 4]}
    assert missing["seeds"]["fpo"] == {
        "expected": list(SYSTEMS["unigrpo"].seeds),
        "missing": list(SYSTEMS["unigrpo"].seeds),
    }
    assert "base" not in missing["seeds"], "one run stands for all seeds"
    assert missing["modes"] == {"unigrpo": {"greedy": [1]}}
    assert collect(tmp_path, {"base": [0], "sft": [0, 1, 2]})["missing"]["seeds"] == {}


BROKEN = {
    "half written": (lambda file: file.write_text('{"system": "unig'), "run.json is not JSON"),
    "a list": (lambda file: file.write_text("[]"), "holds a list, expected an object"),
    "unfinished": (lambda file: file.unlink(), "has no run.json: the run is not finished"),
    "no settings": (lambda file: edit(file, lambda r: r.pop("settings")), "has no 'settings'"),
    "rollouts": (
        lambda file: edit(file, lambda r: r.update(rollouts="many")),
        "'rollouts' is 'many', expected a whole",
    ),
    "other folder": (lambda file: edit(file, lambda r: r.update(seed=2)), "is that of unigrpo/seed-2"),
    "prompts": (
        lambda file: edit(file, lambda r: r["evaluations"]["sampled"]["learned"].pop()),
        "'sampled' has 69 numbers 'learned', expected one for each of the 70 prompts",
    ),
    "nan": (
        lambda file: edit(file, lambda r: r["evaluations"]["sampled"]["rule"].__setitem__(0, math.nan)),
        "'sampled' has no list of numbers 'rule'",
    ),
    "range": (
        lambda file: edit(file, lambda r: r["evaluations"]["greedy"]["learned"].__setitem__(0, 1.5)),
        "'greedy' has numbers 'learned' outside of [0, 1]",
    ),
    "measure": (
        lambda file: edit(file, lambda r: r["evaluations"]["greedy"].update(strict="all")),
        "'greedy' has strict = 'all'",
    ),
    "traces": (lambda file: edit(file, lambda r: r.update(traces=[{"prompt": "x"}])), "traces are not all objects"),
    "other settings": (
        lambda file: edit(file, lambda r: r["settings"].update(learning_rate=1.0)),
        "was trained otherwise than seed 0: learning_rate = 1.0 and not 0.0003",
    ),
    "other length": (
        lambda file: edit(file, lambda r: r.update(rollouts=7)),
        "was trained otherwise than seed 0: rollouts = 7 and not 3840",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_that_cannot_be_used_is_named_and_left_out(tmp_path, kind):
    write_world(tmp_path, systems=("base", "unigrpo"), seeds=(0, 1, 2))
    write_world(tmp_path / "without", systems=("base", "unigrpo"), seeds=(0, 2))
    spoil, message = BROKEN[kind]
    spoil(tmp_path / "unigrpo/seed-1/run.json")
    results = collect(tmp_path)
    [problem] = results["problems"]
    assert problem["run"] == "unigrpo/seed-1" and message in problem["why"]
    assert results["systems"] == collect(tmp_path / "without")["systems"]
    assert results["missing"]["seeds"]["unigrpo"]["missing"] == [1, 3, 4]


def test_a_broken_history_costs_the_curve_alone(tmp_path):
    write_world(tmp_path, systems=("unigrpo",), seeds=(0, 1))
    file = tmp_path / "unigrpo/seed-1/history.jsonl"
    file.write_text(file.read_text() + '{"rollouts": 1, "rew')
    results = collect(tmp_path)
    assert "history.jsonl, line 21, is not JSON" in results["problems"][0]["why"]
    assert results["systems"]["unigrpo"]["seeds"] == [0, 1]
    assert results["curves"]["unigrpo"]["seeds"] == 1


def test_a_broken_validation_is_named(tmp_path):
    write_world(tmp_path, systems=("long_none",), seeds=(0, 1))
    file = tmp_path / "long_none/seed-1/validation.jsonl"
    file.write_text(json.dumps({"rollouts": 0, "learned": 0.5, "rule": 0.5}) + "\n")
    results = collect(tmp_path)
    assert (
        "validation.jsonl, line 1, lacks one of the numbers rollouts, rule, learned, image_error"
        in (results["problems"][0]["why"])
    )
    assert results["validation"]["long_none"]["seeds"] == [0]


def test_without_a_run_the_error_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts.json is missing"):
        collect(tmp_path)
    write_world(tmp_path, systems=())
    with pytest.raises(ValueError, match="holds no finished run, so there is nothing to show"):
        collect(tmp_path)
    (tmp_path / "unigrpo/seed-0").mkdir(parents=True)
    with pytest.raises(ValueError, match="unigrpo/seed-0: has no run.json"):
        collect(tmp_path)
    write(tmp_path / "prompts.json", {"prompts": ["a"], "categories": []})
    with pytest.raises(ValueError, match="1 prompts and 0 categories"):
        collect(tmp_path)


def rows(number, start=0.0, reward=lambda i: i):
    return [
        {"rollouts": 10.0 * (i + 1), "cpu_seconds": start + i + 1, "reward": float(reward(i))} for i in range(number)
    ]


def record(seed, **changes):
    return {"system": "x", "seed": seed, "rollouts": 100, "train_cpu_seconds": 30.0, **changes}


def test_curve_is_the_mean_of_blocks_and_of_seeds():
    number = 3 * POINTS
    runs = [FinishedRun(f"x/seed-{s}", record(s), rows(number, reward=lambda i, s=s: i + 10 * s)) for s in (0, 1, 2)]
    found = curve(runs)
    ends = np.arange(3, number + 1, 3)
    assert found["rollouts"] == (10 * ends).tolist()
    assert found["cpu_seconds"] == pytest.approx(ends)
    assert found["reward"] == pytest.approx(ends - 2 + 10, rel=1e-3)
    assert found["low"] == pytest.approx(ends - 2, rel=1e-3)
    assert found["high"] == pytest.approx(ends - 2 + 20, rel=1e-3)
    assert found["seeds"] == 3


def test_curve_of_a_second_stage_begins_where_the_first_ended():
    found = curve([FinishedRun("x/seed-0", record(0), rows(3))], [FinishedRun("y/seed-0", record(0), [])])
    assert found["rollouts"] == [110, 120, 130]
    assert found["cpu_seconds"] == [31, 32, 33]


def test_a_run_that_logs_no_reward_has_no_curve():
    assert curve([FinishedRun("x/seed-0", record(0), [{"rollouts": 1.0, "cpu_seconds": 1.0, "loss": 3.0}])]) is None
    assert curve([FinishedRun("x/seed-0", record(0), [])]) is None


def test_search_is_that_of_chosen_json(output, tmp_path):
    write_world(tmp_path, systems=("unigrpo",), seeds=(0,))
    candidates = [{"settings": {"learning_rate": rate}, "reward": 0.12345} for rate in (1e-4, 2e-4)]
    entry = {"settings": {"learning_rate": 1e-4}, "candidates": candidates, "at_edge": ["learning_rate"]}
    write(tmp_path / "chosen.json", {"text_grpo": entry})
    write(tmp_path / "search/text_grpo/0/run.json", {"cpu_seconds": 100.0})
    write(tmp_path / "search/text_grpo/1/run.json", {"half": "written"})
    results = collect(tmp_path)
    assert results["search"]["text_grpo"]["chosen"] == {"learning_rate": 1e-4}
    assert [of["reward"] for of in results["search"]["text_grpo"]["candidates"]] == [0.1235, 0.1235]
    assert results["search"]["text_grpo"]["at_edge"] == ["learning_rate"]
    assert results["machine"]["search_cpu_seconds"] == 100
    write(tmp_path / "chosen.json", {"text_grpo": {"settings": {}}})
    with pytest.raises(ValueError, match=re.escape("chosen.json cannot be read (KeyError('candidates'))")):
        collect(tmp_path)


def test_categories_stand_in_the_order_of_the_grammar(tmp_path):
    write_world(tmp_path, systems=("base",))

    def turn(prompts):
        prompts["categories"] = [*reversed(prompts["categories"][:-2]), "new", "new"]

    edit(tmp_path / "prompts.json", turn)
    assert list(collect(tmp_path)["prompts"]["categories"]) == [*CATEGORIES, "new"]
