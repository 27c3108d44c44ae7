"""The declared grid: consistent, equal in what every method sees, and accepted by the trainers."""

import pytest
import torch

from trl_unigrpo.experiments.paper.chosen import read_entries
from trl_unigrpo.experiments.paper.constants import matched_kl_weight
from trl_unigrpo.experiments.paper.jobs import grid_jobs, search_jobs
from trl_unigrpo.experiments.paper.systems import (
    CHOSEN,
    FULL,
    GRID,
    GROUPS,
    IMAGE_RATES,
    JOINT_RATES,
    QUICK_SYSTEMS,
    SEARCH,
    SEARCH_SEED,
    SYSTEMS,
    Scale,
    select,
)
from trl_unigrpo.experiments.paper.training import rollouts, run_settings, trainer_arguments
from trl_unigrpo.flow.objectives import constants
from trl_unigrpo.shapeworld.settings import demo_settings, fast_settings, refine_settings
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


SEARCHED = [system for system in GRID if system.candidates]
CHOICE = {system.name: system.candidates[index % 4] for index, system in enumerate(SEARCHED)}
by_name = pytest.mark.parametrize(
    "system", [system for system in GRID if system.method != "none"], ids=lambda system: system.name
)


def settings_of(name, scale=FULL, **options):
    return run_settings(SYSTEMS[name], CHOICE, scale, **options)


def test_the_grid_is_consistent():
    assert len(SYSTEMS) == len(GRID)
    for place, system in enumerate(GRID):
        assert system.method in ("none", "sft", "refl", "unigrpo")
        assert set(system.modes) <= {"sampled", "greedy", "direct", "guided", "rounds"}
        assert system.start is None or SYSTEMS[system.start] in GRID[:place]
        assert all(SYSTEMS[name].candidates for name in system.takes)
        assert system.hidden == (system.name in {other.start for other in GRID})
        assert system.settings.get("thinking", True) == (system.modes != ("direct",))
        assert system.early_stopping == (system.length == 1) == (system.group != "figure5")
        assert system.sees == ("sees" in system.title) and not (system.sees and system.start)
    assert GROUPS == ("table1", "figure5", "figure4", "extras", "ablations")
    assert {len(SYSTEMS[name].seeds) for name in ("unigrpo", "long_none", "guidance_on", "guided_base")} == {5}
    assert {len(SYSTEMS[name].seeds) for name in ("rounds", "cps")} == {3} and len(SYSTEMS["base_seeing"].seeds) == 1
    assert set(QUICK_SYSTEMS) <= set(SYSTEMS)


def test_every_method_tries_five_candidates():
    assert {system.name for system in GRID if system.group == "table1"} - {system.name for system in SEARCHED} == {
        *("base", "sft_clean", "two_stage", "two_stage_refl", "refl", "fpo", "awm", "flow_grpo")
    }
    for system in SEARCHED:
        assert len({tuple(sorted(candidate.items())) for candidate in system.candidates}) == 5
        assert all(candidate.keys() == system.candidates[0].keys() for candidate in system.candidates)
    image_only = [s for s in SEARCHED if s.method == "unigrpo" and s.settings.get("text_weight") == 0]
    assert len(image_only) == 4 and all(system.candidates == IMAGE_RATES for system in image_only)
    for name in ("unigrpo", "unifpo", "uniawm", "uninft"):
        assert SYSTEMS[name].candidates == JOINT_RATES


@by_name
def test_every_method_sees_as_many_images(system):
    seen = rollouts(settings_of(system.name))
    if system.part == "second half":
        seen += rollouts(settings_of(system.start))
    assert seen == 192 * FULL.generations * system.length or system.part == "first half"
    assert system.length == (3 if system.group == "figure5" else 1)


@pytest.mark.parametrize("generations", [5, 34])
def test_two_halves_make_a_whole(generations):
    scale = Scale(generations, 7)
    halves = [rollouts(settings_of(name, scale)) for name in ("two_stage_refl", "two_stage")]
    assert sum(halves) == 192 * generations and abs(halves[0] - halves[1]) <= 192


@by_name
def test_trainers_accept_the_settings(system, tmp_path):
    settings = settings_of(system.name)
    args = trainer_arguments(system, settings, str(tmp_path), seed=3)
    assert args.seed == 3 and args.max_steps == settings["max_steps"]
    for candidate in range(len(system.candidates)):
        trainer_arguments(system, settings_of(system.name, candidate=candidate), str(tmp_path), seed=0)


def test_a_setting_that_no_trainer_knows_is_named(tmp_path):
    settings = {**settings_of("unigrpo"), "flow_wait": 2.0}
    with pytest.raises(ValueError, match="unigrpo: .*flow_wait"):
        trainer_arguments(SYSTEMS["unigrpo"], settings, str(tmp_path), seed=0)


def test_systems_differ_from_unigrpo_in_what_they_declare():
    own = settings_of("unigrpo")
    assert own["learning_rate"] == CHOICE["unigrpo"]["learning_rate"]
    assert own["image_learning_rate"] == CHOICE["unigrpo"]["image_learning_rate"]
    for name in ("cps", "window_1", "context_full", "lambda_3", "no_ratio_norm", "rounds"):
        settings = settings_of(name)
        assert {key for key in settings if settings[key] != own.get(key)} == set(SYSTEMS[name].settings)
    for name in ("long_velocity_mse", "long_none", "long_latent_kl"):
        settings = {**settings_of(name), "max_steps": own["max_steps"]}
        assert {key for key in settings if settings[key] != own.get(key)} == set(SYSTEMS[name].settings)
    assert settings_of("one_epoch")["max_steps"] * 2 == own["max_steps"]
    off, on = settings_of("guidance_off"), settings_of("guidance_on")
    chosen = CHOICE["guided_base"]["guidance_scale"]
    assert off["eval_guidance_scale"] == on["eval_guidance_scale"] == on["guidance_scale"] == chosen
    assert off == {**on, "guidance_scale": 1.0}


def test_a_candidate_replaces_the_choice():
    tried = settings_of("unigrpo", candidate=3)
    assert (tried["learning_rate"], tried["image_learning_rate"]) == (6e-4, 2e-4)
    # The search for guidance takes SFT's choice over, and needs none of its own.
    without = {name: chosen for name, chosen in CHOICE.items() if name != "guided_base"}
    settings = run_settings(SYSTEMS["guided_base"], without, FULL, 0)
    assert settings["eval_guidance_scale"] == 1.5 and settings["learning_rate"] == CHOICE["sft"]["learning_rate"]


def test_a_missing_choice_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="guidance_on needs .* guided_base.*--search --only guided_base"):
        run_settings(SYSTEMS["guidance_on"], {"unigrpo": CHOICE["unigrpo"]}, FULL)
    assert run_settings(SYSTEMS["base"], {}, FULL) == {}


def test_shipped_choices_are_of_the_declared_candidates():
    for name, entry in read_entries(CHOSEN).items():
        assert [of["settings"] for of in entry["candidates"]] == list(SYSTEMS[name].candidates)
        (chosen,) = [of for of in entry["candidates"] if of["settings"] == entry["settings"]]
        assert chosen["reward"] == max(of["reward"] for of in entry["candidates"])
        assert (entry["split"], entry["num_prompts"], entry["seed"]) == ("validation", 700, SEARCH_SEED)
        assert entry["rollouts"] == 192 * SEARCH.generations


def test_jobs_come_seed_by_seed_and_after_their_starts():
    jobs = grid_jobs(select(["table1", "guidance_on"]), [4, 2])
    assert [job.seed for job in jobs if job.system == "base"] == [0]
    trained = [job.seed for job in jobs if job.system != "base"]
    assert trained == sorted(trained, key=[4, 2].index)
    for place, job in enumerate(jobs):
        assert job.start is None or job.start in jobs[:place]
    assert {"guided_base", "two_stage_refl"} <= {job.system for job in jobs}
    assert len(set(jobs)) == len(jobs)
    search = search_jobs(SYSTEMS["unigrpo"])
    assert [(job.candidate, job.seed) for job in search] == [(index, SEARCH_SEED) for index in range(5)]


def test_selection():
    assert [system.name for system in select(["figure5", "base"])] == [
        "base",
        *(f"long_{name}" for name in ("velocity_mse", "none", "latent_kl", "latent_kl_matched", "velocity_mse_10")),
    ]
    assert not [system for system in select([]) if system.hidden]
    assert select(["guided_base"]) == [SYSTEMS["guided_base"]]
    with pytest.raises(ValueError, match="'unigrp'.*expected some of base"):
        select(["unigrp"])


def test_matched_kl_weight():
    """Gaussians of each step, from the formulas of the SDE: their KL, averaged over the windows, against the MSE."""
    noise, dims, dv = 0.8, 72, 0.3
    nodes = [3 * u / (1 + 2 * u) for u in [1 - k / 10 for k in range(11)]]
    divergences = []
    for k in range(5):
        t, dt = nodes[k], nodes[k + 1] - nodes[k]
        sigma_squared = noise**2 * t / (1 - nodes[1 if k == 0 else k])
        drift = dt * (1 + sigma_squared * (1 - t) / (2 * t)) * dv
        std = torch.tensor(sigma_squared * -dt, dtype=torch.float64).sqrt().expand(dims)
        one, other = (torch.distributions.Normal(torch.full_like(std, mean), std) for mean in (drift, 0.0))
        divergences.append(torch.distributions.kl_divergence(one, other).mean().item())
    windows = [(0, 1, 2), (1, 2, 3), (2, 3, 4)]
    average = sum(sum(divergences[k] for k in window) / 3 for window in windows) / 3
    assert matched_kl_weight() * average == pytest.approx(1.5e-5 * dv**2, rel=1e-9)
    assert settings_of("long_latent_kl_matched")["flow_regularizer_weight"] == matched_kl_weight()


def resolved(name):
    """The clip range and the regulariser's weight with which a system is trained, carried to its steps."""
    return constants(trainer_arguments(SYSTEMS[name], settings_of(name), "", seed=0))


def test_constants_are_multiples_of_what_unigrpo_is_trained_with():
    """Of the values that the trainer makes of them: ten times the change of velocity, not ten times a number."""
    epsilon, weight = resolved("unigrpo")
    assert epsilon == pytest.approx(3.23e-6, rel=2e-3), "ten steps are 3.2 times as long as the paper's"
    assert weight == pytest.approx(15 * epsilon, rel=1e-9)
    assert resolved("clip_10") == pytest.approx((10 * epsilon, weight))
    assert resolved("long_velocity_mse") == resolved("long_latent_kl") == (epsilon, weight)
    assert resolved("long_velocity_mse_10") == pytest.approx((epsilon, 10 * weight))
    assert resolved("long_none") == (epsilon, 0)
    assert resolved("long_latent_kl_matched") == pytest.approx((epsilon, weight * matched_kl_weight() / 1.5e-5))


def test_fpo_and_awm_have_the_clip_ranges_of_the_configuration():
    for name, objective in (("fpo", "fpo"), ("unifpo", "fpo"), ("awm_thinking", "awm"), ("uniawm", "awm")):
        assert "flow_epsilon" not in settings_of(name)
        expected = UniGRPOConfig(output_dir="", image_objective=objective).flow_epsilon
        assert trainer_arguments(SYSTEMS[name], settings_of(name), "", seed=0).flow_epsilon == expected


def test_extras_have_what_their_demos_have():
    """Two rounds but for the rates, which are UniGRPO's, and scouts but for the regulariser, which is kept."""
    rates = {"learning_rate", "image_learning_rate", "lr_scheduler_type", "max_steps", "reward_weights"}
    rounds = settings_of("rounds")
    assert {key: rounds[key] for key in refine_settings() if key not in rates} == {
        key: value for key, value in refine_settings().items() if key not in rates
    }
    scouts, demo = settings_of("scouts"), demo_settings()
    changed = {key: value for key, value in fast_settings().items() if demo.get(key) != value and key not in rates}
    assert changed.pop("flow_regularizer") == "none" and "flow_regularizer" not in scouts
    assert {key: scouts[key] for key in changed} == changed
    assert settings_of("read_back") == settings_of("uninft")
