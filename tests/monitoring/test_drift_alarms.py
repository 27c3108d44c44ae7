"""Alarms on images, rewards and thinkings, on faults as public runs had them and on runs without."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from trl_unigrpo.monitoring.alarm import (
    Alarm,
    append_alarm,
    forget_alarms,
    read_alarms,
)
from trl_unigrpo.monitoring.events import Generation
from trl_unigrpo.monitoring.image_alarms import ImageWatch
from trl_unigrpo.monitoring.image_statistics import image_statistics
from trl_unigrpo.monitoring.memory import revive
from trl_unigrpo.monitoring.reward_alarms import RewardWatch
from trl_unigrpo.monitoring.shift import Shift
from trl_unigrpo.monitoring.thinking_alarms import plain_text, repetition


def image(random, size=64):
    """Coloured tiles with soft light: about half of it dark, as in UniRL#407 at the start."""
    tiles = random.integers(0, 256, (8, 8, 3)).repeat(size // 8, 0).repeat(size // 8, 1)
    light = np.linspace(0.2, 1, size)[:, None, None]
    return tiles * light * random.uniform(0.8, 1.2)


def hacked(values, progress):
    """Images as UniRL#407's became: dark, with few edges and colours."""
    blurred = values.reshape(8, values.shape[0] // 8, 8, -1, 3).mean((0, 2), keepdims=True)
    flat = np.broadcast_to(blurred, (8, values.shape[0] // 8, 8, values.shape[1] // 8, 3)).reshape(values.shape)
    return ((1 - progress) * values + progress * flat) * (1 - 0.75 * progress)


def blue_noise(values, progress, random):
    """Images as flow_grpo#172's became: noise of high frequency over the image."""
    white = random.normal(0, 120, values.shape)
    blue = white - (np.roll(white, 1, 0) + np.roll(white, -1, 0) + np.roll(white, 1, 1) + np.roll(white, -1, 1)) / 4
    return values + progress * blue


def watch(spoil, rollouts=100, prompts=4, group_size=4, seed=0):
    """Alarm -> first rollout, images; of a run whose images `spoil` as it goes on, with new prompts each time."""
    random, watching, first = np.random.default_rng(seed), ImageWatch(), {}
    for rollout in range(rollouts):
        images = []
        for _ in range(prompts):
            scene = image(random)
            for _ in range(group_size):
                own = scene + random.normal(0, 40, (8, 8, 1)).repeat(8, 0).repeat(8, 1)
                values = np.clip(spoil(own, rollout, random), 0, 255).astype(np.uint8)
                images.append(image_statistics(Image.fromarray(values)))
        texts = [f"{rollout} {i // group_size}" for i in range(len(images))]
        for alarm in watching.look(watching.statistics(images, texts), group_size):
            first.setdefault(alarm.name, (rollout, alarm.indices))
    return first


@pytest.mark.parametrize("prompts", [1, 4, 12])
def test_sound_images_of_ever_new_prompts_give_no_alarm(prompts):
    for seed in range(2):
        assert watch(lambda values, rollout, random: values, 60 if prompts < 12 else 25, prompts, seed=seed) == {}


def test_prompts_of_other_light_are_no_drift():
    # Night and day by chance: means of eight prompts differ by more than an alarm takes, but not by more than chance.
    tones = np.random.default_rng(1).choice([0.2, 1.8], 300)
    assert watch(lambda values, rollout, random: values * tones[rollout], 120, prompts=1) == {}


def test_a_change_that_nobody_sees_is_no_drift():
    scene = image(np.random.default_rng(0))
    found = watch(lambda values, rollout, random: scene * (0.97 if rollout > 20 else 1.0) + random.normal(), 40)
    assert found == {}


@pytest.mark.parametrize("prompts", [1, 4])
def test_images_that_darken_and_lose_detail_are_seen_early(prompts):
    found = watch(lambda values, rollout, random: hacked(values, rollout / 100), 60, prompts)
    for name in ("images/dark_share", "images/color_entropy", "images/edge_density"):
        rollout, indices = found[name]
        assert rollout <= 50, name
        assert indices


def test_blue_noise_is_seen_and_the_noisy_images_are_named():
    def spoil(values, rollout, random):
        # From the 20th rollout on, half of the images.
        return blue_noise(values, 1.0, random) if rollout >= 20 and random.random() < 0.5 else values

    rollout, indices = watch(spoil, 30)["images/noise"]
    assert 20 <= rollout <= 24
    assert indices


def test_a_shift_waits_for_groups_and_knows_chance():
    shift = Shift()
    random = np.random.default_rng(0)
    for _ in range(15):
        shift.add([float(random.normal())])
        assert shift.change() is None
    shift.add([float(random.normal())])
    change = shift.change()
    first, last = np.array(shift.first), np.array(shift.recent)
    welch = (last.mean() - first.mean()) / math.sqrt(first.var(ddof=1) / 8 + last.var(ddof=1) / 8)
    assert change.errors == pytest.approx(welch)
    beyond = 0
    for seed in range(200):
        values = np.random.default_rng(seed).normal(size=16).tolist()
        beyond += abs(Shift(values[:8], values[8:]).change().errors) > 5
    assert beyond <= 1


def generation(rewards, weights, group_size=4, mode="train"):
    n = len(next(iter(rewards.values())))
    return Generation(
        mode=mode,
        group_size=group_size,
        prompts=[f"{i // group_size}" for i in range(n)],
        thinking=[""] * n,
        images=[],
        statistics=[],
        rewards=rewards,
        advantages=[0.0] * n,
        extra={},
        weights=weights,
    )


def evaluations(trained, held_out, count=4, prompts=32, level=0.0):
    """The alarm of the last of some evaluations on the same prompts; slopes are per evaluation, rewards at a level."""
    random, watching = np.random.default_rng(0), RewardWatch()
    easy = random.uniform(0, 1, (2, prompts)) + [[level], [0.0]]  # prompts differ by far more than anything changes
    for i in range(count):
        now = easy + i * np.array([[trained], [held_out]]) + random.normal(0, 0.01, easy.shape)
        for part in np.split(now, 4, axis=1):
            rewards = {"trained": part[0].tolist(), "held_out": part[1].tolist()}
            watching.evaluate(generation(rewards, {"trained": 1.0, "held_out": 0.0}, 1, "eval"))
        alarms = watching.evaluation_ends()
    return alarms


def test_evaluations_are_compared_prompt_by_prompt():
    (alarm,) = evaluations(0.02, -0.01)
    assert alarm.name == "reward/held_out"
    assert {"the reward in evaluation, now", "held_out in evaluation, before"} <= set(alarm.values)
    assert evaluations(0.02, 0.01) == evaluations(0.0, -0.01) == evaluations(0.02, 0.0) == []


def test_rewards_below_zero_are_held_against_a_held_out_score():
    (alarm,) = evaluations(0.02, -0.01, level=-9.0)
    assert alarm.name == "reward/held_out" and alarm.values["the reward in evaluation, now"] < -8
    assert evaluations(0.02, 0.01, level=-9.0) == evaluations(-0.02, -0.01, level=-9.0) == []
    # A sample without a score is neither the best nor the worst.
    random, watching, found = np.random.default_rng(0), RewardWatch(), []
    for step in range(12):
        rewards = {"read": (step - 30 + random.normal(0, 0.1, 32)).tolist(), "held_out": [-float(step)] * 32}
        rewards["held_out"] = [value - 0.01 * place for place, value in enumerate(rewards["held_out"])]
        rewards["read"][4:8] = [math.nan] * 4
        found += watching.look(generation(rewards, {"read": 1.0, "held_out": 0.0}))
    gap = [alarm for alarm in found if alarm.name == "reward/held_out"]
    assert gap and all(len(alarm.indices) == 8 and not {4, 5, 6, 7} & set(alarm.indices) for alarm in gap)


def test_flat_and_falling_rewards_below_zero_are_told_of():
    random, watching, names = np.random.default_rng(0), RewardWatch(), []
    for step in range(12):
        values = np.repeat(-9.0 - step, 32) if step < 6 else -15 - step + random.normal(0, 0.1, 32)
        names += [(step, alarm.name) for alarm in watching.look(generation({"a": values.tolist()}, {"a": 1.0}))]
    assert (4, "reward/zero_variance") in names and (11, "reward/zero_variance") not in names
    assert (11, "reward/fallen") in names


def test_datasets_of_evaluation_are_told_apart():
    watching = RewardWatch()
    for step in range(4):
        for dataset, prompts in (("easy", 32), ("hard", 32)):
            change = {"easy": 0.9, "hard": 0.2}[dataset] + 0.01 * step
            values = (change + np.random.default_rng(step).normal(0, 0.01, prompts)).tolist()
            seen = generation({"a": values, "b": values}, {"a": 1.0, "b": 0.0}, 1, "eval")
            object.__setattr__(seen, "prompts", [f"{dataset} {i}" for i in range(prompts)])
            watching.evaluate(seen)
            assert watching.evaluation_ends() == []
            assert set(watching.evaluated) == ({"the reward", "b"} if step else set())
    assert all(change.now - change.before == pytest.approx(0.03, abs=0.01) for change in watching.evaluated.values())


@pytest.mark.parametrize(("slope", "stalls"), [(0.0, True), (-0.001, True), (0.01, False)])
def test_a_reward_that_does_not_rise_is_said_after_a_hundred_generations(slope, stalls):
    random, watching, steps = np.random.default_rng(0), RewardWatch(), []
    for step in range(101):
        values = (slope * step + random.normal(0, 0.5, 32)).tolist()
        alarms = watching.look(generation({"a": values}, {"a": 1.0}))
        steps += [step] * any(alarm.name == "reward/stalled" for alarm in alarms)
    assert steps == ([99, 100] if stalls else [])


def test_a_reward_that_rises_in_training_alone_is_said():
    random, watching, alarms = np.random.default_rng(0), RewardWatch(), []
    easy = random.uniform(0, 1, 32)
    for i in range(12):
        rewards = {"trained": (0.05 * i + random.normal(0, 0.1, 32)).tolist()}
        alarms += watching.look(generation(rewards, {"trained": 1.0}))
        values = (easy - 0.01 * i + random.normal(0, 0.01, 32)).tolist()
        watching.evaluate(generation({"trained": values}, {"trained": 1.0}, 1, "eval"))
        alarms += watching.evaluation_ends()
    assert {"the reward in training, now", "the reward in evaluation, now"} <= set(alarms[-1].values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("a red circle", 0.0),
        ("one two three four five six", 0.0),
        ("a b c d a b c d", 0.2),  # five phrases, of which abcd stands twice
        ("again " * 23, 0.95),
        ("红色的圆红色的圆", 0.2),
    ],
)
def test_repetition_by_hand(text, expected):
    assert repetition(text) == pytest.approx(expected)


def test_text_of_a_conversation():
    assert (
        plain_text([{"role": "assistant", "content": "a plan"}, {"role": "assistant", "content": None}]) == "a plan "
    )


def test_file_of_alarms_is_read_back_and_cut_where_a_run_goes_on(tmp_path):
    assert read_alarms(tmp_path) == []
    hostile = Alarm("images/noise", 'a "quote",\na new line and <script>', {"now": 0.5}, (1, 7))
    for step in (0, 4, 9):
        append_alarm(tmp_path / "run", step, "train", hostile, stopped=step == 9)
    with (tmp_path / "run" / "alarms.jsonl").open("a") as file:
        file.write('{"step": 10, "ala')  # the process was killed here
    lines = read_alarms(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 4, 9]
    assert lines[2] == {
        "step": 9,
        "mode": "train",
        "alarm": "images/noise",
        "message": hostile.message,
        "indices": [1, 7],
        "values": {"now": 0.5},
        "stopped": True,
    }
    forget_alarms(tmp_path / "run", 9)
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()] == [
        0,
        4,
    ]


def test_memory_of_another_version_is_taken_as_far_as_it_goes():
    watching = RewardWatch()
    watching.look(generation({"a": [0.0, 1.0, 2.0, 3.0]}, {"a": 1.0}))
    memory = json.loads(json.dumps(asdict(watching)))
    assert revive(RewardWatch, memory) == watching
    del memory["flat"]
    assert revive(RewardWatch, {**memory, "gone": 1}) == replace(watching, flat=[])


def test_images_of_one_prompt_per_generation_are_compared_with_those_before():
    random = np.random.default_rng(0)
    scenes = [image_statistics(Image.fromarray(image(random).clip(0, 255).astype(np.uint8))) for _ in range(3)]
    watching = ImageWatch()

    def across(images, prompt, trains=True):
        return watching.statistics(images, [prompt] * len(images), trains)["images/twins_across"].tolist()

    assert across(scenes[:2], "a") == [0, 0]
    assert across([scenes[1]], "b", trains=False) == [0]  # an evaluation between them
    assert across(scenes[1:], "b") == [1, 0]
    assert across([scenes[2]], "b") == [0]  # the same prompt again: no other one
    assert across([scenes[0]], "c") == [0]  # only the generation before counts
