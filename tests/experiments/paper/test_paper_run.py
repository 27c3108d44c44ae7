"""One run in its own process: what it writes, that it can be repeated, and what is logged without being trained on."""

import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.experiments.paper.jobs import Job
from trl_unigrpo.experiments.paper.run import run_job
from trl_unigrpo.experiments.paper.scoring import (
    evaluate_in_mode,
    sample_traces,
    strip,
    summary,
    trace_rows,
)
from trl_unigrpo.experiments.paper.systems import SYSTEMS, Scale
from trl_unigrpo.experiments.paper.training import (
    HistoryFile,
    image_error_reward,
    make_trainer,
    rollouts,
    run_settings,
)
from trl_unigrpo.shapeworld import (
    image_error,
    load_base,
    preference_reward,
    shapeworld_dataset,
    shapeworld_reward,
)
from trl_unigrpo.shapeworld.evaluate import Evaluation
from trl_unigrpo.shapeworld.grammar import CATEGORIES
from trl_unigrpo.shapeworld.question_points import question_points


SCALE = Scale(2, 14)
CHOICE = {
    "sft": {"learning_rate": 2e-4},
    "unigrpo": {"learning_rate": 3e-4, "image_learning_rate": 1e-4},
    "flow_grpo_thinking": {"image_learning_rate": 1e-4},
    "refl_thinking": {"learning_rate": 1e-4},
    "text_grpo": {"learning_rate": 3e-4},
    "uninft": {"learning_rate": 3e-4, "image_learning_rate": 1e-4},
    "guided_base": {"guidance_scale": 2.0, "eval_guidance_scale": 2.0},
}
JOB = Job("unigrpo", 3)
NOT_REPEATED = ("train_cpu_seconds", "cpu_seconds", "seconds", "date")


def process(output, *options):
    """The run as the command starts it."""
    file = output / "choice.json"
    file.write_text(json.dumps({name: {"settings": settings} for name, settings in CHOICE.items()}))
    command = [
        sys.executable,
        "-m",
        "trl_unigrpo.experiments.paper.run",
        str(output),
        JOB.system,
        "--seed",
        str(JOB.seed),
    ]
    command += ["--rollouts", "2", "--num-prompts", "14", "--chosen", str(file), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def lines(output):
    file = JOB.folder(output) / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_lines(output, number):
    end = time.monotonic() + 120
    while len(lines(output)) < number:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    child = process(output)
    child.communicate()
    assert child.returncode == 0
    return output


@pytest.mark.slow
def test_run_folder(whole):
    folder = JOB.folder(whole)
    assert sorted(file.name for file in folder.iterdir()) == [
        "history.jsonl",
        "run.json",
        "strip.png",
        "validation.jsonl",
    ]
    result = json.loads((folder / "run.json").read_text())
    settings = run_settings(SYSTEMS["unigrpo"], CHOICE, SCALE)
    assert result["settings"] == settings and settings["image_learning_rate"] == 1e-4
    expected = {"system": "unigrpo", "title": "UniGRPO", "group": "table1", "seed": 3, "split": "test", "start": None}
    expected |= {"rollouts": 384, "threads": 1}
    assert {name: result[name] for name in expected} == expected
    assert 0 < result["train_cpu_seconds"] < result["cpu_seconds"]
    assert result["seconds"] > 0
    assert {"trl-unigrpo", "torch", "trl"} <= set(result["versions"])
    assert list(result["evaluations"]) == ["sampled", "greedy"]
    for found in result["evaluations"].values():
        for score in ("rule", "learned"):
            assert len(found[score]) == 14 and all(0 <= value <= 1 for value in found[score])
        assert found["image_error_interval"][0] < found["image_error"] < found["image_error_interval"][1]
        assert 0 < found["questions"] < 1
    points = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [point["rollouts"] for point in points] == [0, 192, 384]
    assert result["chosen_point"] == max(points, key=lambda point: point["learned"])
    assert set(result["diversity"]) == {"position_entropy", "color_entropy", "distinct_images"}
    assert [trace["category"] for trace in result["traces"]] == sorted(
        [*CATEGORIES, *CATEGORIES[:5]], key=CATEGORIES.index
    )
    with Image.open(folder / "strip.png") as image:
        assert image.size == (12 * 48, 48)


@pytest.mark.slow
def test_history(whole):
    first, second = lines(whole)
    assert [first["rollouts"], second["rollouts"]] == [192, 384]
    assert 0 < first["cpu_seconds"] < second["cpu_seconds"]
    for row in (first, second):
        assert set(row) == {
            *("rollouts", "reward", "rule", "image_error", "velocity_mse"),
            *("clip_frac", "entropy", "length", "cpu_seconds"),
        }
        assert 0 < row["reward"] < 1 and 0 < row["clip_frac"] < 1 and 0 < row["image_error"] < 0.1


@pytest.mark.slow
def test_a_run_ends_with_its_command_and_is_made_again_to_the_same_numbers(whole, tmp_path):
    child = process(tmp_path, "--end-with-parent")
    wait_for_lines(tmp_path, 1)
    assert child.poll() is None
    child.stdin.close()  # as the end of the command does, by whatever signal
    assert child.wait(10) == 1
    assert not JOB.finished(tmp_path) and len(lines(tmp_path)) == 1  # line by line: the second was not there yet

    child = process(tmp_path)
    child.communicate()
    assert child.returncode == 0
    one, other = (json.loads((JOB.folder(output) / "run.json").read_text()) for output in (whole, tmp_path))
    for name in NOT_REPEATED:
        del one[name], other[name]
    assert one == other
    without = [[{**row, "cpu_seconds": 0} for row in lines(output)] for output in (whole, tmp_path)]
    assert without[0] == without[1]
    strips = [(JOB.folder(output) / "strip.png").read_bytes() for output in (whole, tmp_path)]
    assert strips[0] == strips[1]


def small_trainer(output, rewards, **options):
    model, tokenizer = load_base()
    settings = run_settings(SYSTEMS["unigrpo"], CHOICE, SCALE)
    settings |= {"num_generations": 4, "per_device_train_batch_size": 8, **options}
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=UniGRPOConfig(output_dir=str(output), seed=1, disable_tqdm=True, **settings),
        train_dataset=shapeworld_dataset("train", seed=1),
        processing_class=tokenizer,
        callbacks=[HistoryFile(output / "history.jsonl", settings)],
    )
    return trainer


def test_rule_and_image_error_are_logged_and_change_nothing(tmp_path):
    """Weights equal to the bit with and without them, and far from equal with a weight on one."""
    weights, logged = [], []
    rewards = [preference_reward, shapeworld_reward, image_error_reward]
    variants = [(rewards[:1], [1.0]), (rewards, [1.0, 0.0, 0.0]), (rewards, [1.0, 1.0, 0.0])]
    for rewards, reward_weights in variants:
        trainer = small_trainer(tmp_path, rewards, reward_weights=reward_weights)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        logged.append([row["reward"] for row in trainer.state.log_history if "reward" in row])
    assert logged[0] == logged[1] != logged[2]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert any(not torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_history_is_what_the_trainer_logged(tmp_path):
    """One row per rollout batch: its reward, and the clipping of its last pass; a single pass has none."""
    rewards = [preference_reward, shapeworld_reward, image_error_reward]
    trainer = small_trainer(tmp_path, rewards)
    trainer.train()
    log = [row for row in trainer.state.log_history if "learning_rate" in row]
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["rollouts"] for row in rows] == [8, 16] and len(log) == 4
    for row, first, second in zip(rows, log[::2], log[1::2], strict=True):
        assert row["reward"] == float(f"{first['reward']:.5g}")
        assert row["rule"] == float(f"{first['rewards/shapeworld_reward/mean']:.5g}") != row["reward"]
        assert row["image_error"] == float(f"{first['rewards/image_error_reward/mean']:.5g}")
        assert row["clip_frac"] == float(f"{second['flow/clip_frac']:.5g}") and first["flow/clip_frac"] == 0

    trainer = small_trainer(tmp_path, rewards, num_iterations=1, max_steps=3)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["rollouts"] for row in rows] == [8, 16, 24] and {row["clip_frac"] for row in rows} == {0}


def test_the_logged_error_is_the_verifiers():
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))]
    assert image_error_reward(["a red circle"], [""], images=images) == image_error(images).tolist()


def test_without_thinking(tmp_path):
    """Scored from the prompt alone; what has no value, such as the entropy of no thinking, is left out."""
    settings = run_settings(SYSTEMS["flow_grpo"], CHOICE, Scale(1, 7))
    result = run_job(Job("flow_grpo", 0), tmp_path, Scale(1, 7), settings)
    assert list(result["evaluations"]) == ["direct"] and result["evaluations"]["direct"]["plan"] is None
    assert {trace["thinking"] for trace in result["traces"]} == {""}
    (row,) = (tmp_path / "flow_grpo" / "seed-0" / "history.jsonl").read_text().splitlines()
    assert all(math.isfinite(value) for value in json.loads(row).values())


def test_the_base_is_scored_as_it_is(tmp_path):
    result = run_job(Job("base", 0), tmp_path, Scale(1, 7), {})
    assert result["rollouts"] == 0 and result["train_cpu_seconds"] == 0 and result["settings"] == {}
    assert list(result["evaluations"]) == ["sampled", "greedy", "direct"]
    assert not (tmp_path / "base" / "seed-0" / "history.jsonl").exists()


@pytest.mark.slow
def test_a_start_is_kept_and_gone_on_from(tmp_path):
    """SFT for guidance, then one rollout from it: trained with what it is scored with."""
    scale = Scale(1, 7)
    start = Job("guided_base", 0)
    result = run_job(start, tmp_path, scale, run_settings(SYSTEMS["guided_base"], CHOICE, scale))
    assert list(result["evaluations"]) == ["guided", "sampled"]
    assert result["evaluations"]["guided"] != result["evaluations"]["sampled"]
    model = start.folder(tmp_path) / "model"
    assert (model / "config.json").is_file()
    rows = [json.loads(line) for line in (start.folder(tmp_path) / "history.jsonl").read_text().splitlines()]
    assert [row["rollouts"] for row in rows] == [96, 192] and {"text_loss", "flow_loss"} <= set(rows[0])

    settings = run_settings(SYSTEMS["guidance_on"], CHOICE, scale)
    result = run_job(Job("guidance_on", 0), tmp_path, scale, settings)
    assert result["start"] == "guided_base" and result["settings"]["guidance_scale"] == 2.0
    assert not (Job("guidance_on", 0).folder(tmp_path) / "model").exists()
    (model / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):  # it is that model that it starts from
        run_job(Job("guidance_on", 0), tmp_path, scale, settings)


def test_a_run_of_the_search_is_scored_in_one_mode_on_validation_prompts(tmp_path):
    scale = Scale(1, 7, "validation")
    settings = run_settings(SYSTEMS["sft"], {}, scale, candidate=2)
    result = run_job(Job("sft", 100, 2), tmp_path, scale, settings)
    assert result["settings"]["learning_rate"] == 1e-4 and result["split"] == "validation"
    assert list(result["evaluations"]) == ["sampled"] and result["diversity"] is None
    assert {trace["prompt"] for trace in result["traces"]} == set(shapeworld_dataset("validation", 7, 1234)["prompt"])
    assert (tmp_path / "search" / "sft" / "2" / "run.json").is_file()


@pytest.mark.parametrize("clean", [False, True])
def test_sft_sees_the_corpus_with_or_without_its_errors(tmp_path, clean):
    name = "sft_clean" if clean else "sft"
    settings = run_settings(SYSTEMS[name], CHOICE, Scale(4, 7))
    trainer = make_trainer(SYSTEMS[name], settings, 2, *load_base(), tmp_path)
    corpus = trainer.train_dataset
    assert len(corpus) == rollouts(settings) == 768
    rows = corpus[:768]
    scores = shapeworld_reward(rows["prompt"], rows["completion"], rows["image"])
    assert (min(scores) == 1.0) == clean and np.mean(scores) > 0.5


def evaluation(number, model):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(np.full((48, 48, 3), value, dtype=np.uint8)) for value in range(number)]
    columns = {name: rng.random(number) for name in ("reward", "strict", "plan", "error")}
    categories = [CATEGORIES[index % 3] for index in range(number)]
    prompts = list(shapeworld_dataset("test", number, seed=1)["prompt"])
    return Evaluation(prompts, categories, [f"t{i}" for i in range(number)], images, latents=torch.zeros(1), **columns)


def test_summary_and_traces_are_of_the_evaluation():
    model, _ = load_base()
    made = evaluation(21, model)
    found = summary(model, made, thinking=True)
    assert found["rule"] == [round(float(value), 3) for value in made.reward]
    learned = preference_reward(made.prompts, [""] * 21, images=made.images)
    assert found["learned"] == [round(value, 3) for value in learned]
    assert found["questions"] == pytest.approx(question_points(made.prompts, made.images).mean(), rel=1e-4)
    assert found["strict"] == pytest.approx(made.strict.mean(), rel=1e-4)
    assert found["plan"] == pytest.approx(made.plan.mean(), rel=1e-4)
    assert found["image_error"] == pytest.approx(made.error.mean(), rel=1e-4)
    rows = trace_rows(made.categories)
    assert rows == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    traces = sample_traces(made)
    assert [trace["thinking"] for trace in traces] == [f"t{row}" for row in rows]
    assert [trace["rule"] for trace in traces] == pytest.approx(made.reward[rows], rel=1e-4)
    assert [trace["learned"] for trace in traces] == pytest.approx([learned[row] for row in rows], rel=1e-4)
    pixels = np.asarray(strip(made))
    assert pixels.shape == (48, 12 * 48, 3) and pixels[0, ::48, 0].tolist() == rows
    assert trace_rows(["counting", "counting"]) == [0, 1]


@pytest.mark.slow
def test_two_rounds_are_scored_by_their_last_images(tmp_path):
    """From the base that sees: the first images are those of another mode, the last ones are other images."""
    scale = Scale(1, 14)
    result = run_job(Job("rounds", 0), tmp_path, scale, run_settings(SYSTEMS["rounds"], CHOICE, scale))
    assert list(result["evaluations"]) == ["rounds", "sampled"] and result["rollouts"] == 192
    assert result["settings"]["num_rounds"] == 2
    base = run_job(Job("base_seeing", 0), tmp_path, Scale(1, 70), {})
    first, second = (base["evaluations"][mode] for mode in ("sampled", "rounds"))
    assert first["rule"] != second["rule"] and first["plan"] == second["plan"]
    model, tokenizer = load_base(seeing=True)
    made = evaluate_in_mode(model, tokenizer, "rounds", Scale(1, 70))
    assert [round(value, 3) for value in shapeworld_reward(made.prompts, made.prompts, made.images)] == second["rule"]


@pytest.mark.slow
def test_read_back_is_rewarded_by_its_own_reading_and_scouts_by_the_learned_reward(tmp_path):
    for name, trained_on in (("read_back", None), ("scouts", "learned")):
        settings = run_settings(SYSTEMS[name], CHOICE, Scale(1, 7))
        result = run_job(Job(name, 0), tmp_path, Scale(1, 7), settings)
        assert result["rollouts"] == 192, "of a pool of scouts, all"
        (row,) = (tmp_path / name / "seed-0" / "history.jsonl").read_text().splitlines()
        row = json.loads(row)
        assert (0 < row["reward"] < 1) == (trained_on == "learned"), "a log-likelihood is negative"
        assert 0 < row["rule"] < 1 and row["rollouts"] == 192


def test_modes():
    model, tokenizer = load_base()
    scale = Scale(1, 7)
    made = {
        mode: evaluate_in_mode(model, tokenizer, mode, scale, 2.0)
        for mode in ("sampled", "greedy", "direct", "guided")
    }
    assert made["sampled"].thinking == made["guided"].thinking != made["greedy"].thinking
    assert set(made["direct"].thinking) == {""}
    assert not torch.equal(made["sampled"].latents, made["guided"].latents)
    with pytest.raises(ValueError, match="eval_guidance_scale"):
        evaluate_in_mode(model, tokenizer, "guided", scale)
