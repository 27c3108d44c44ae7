"""Scouts: which of a pool are chosen, what they are paid, and that the chosen are painted as without."""

import numpy as np
import pytest
import torch

from tests.helpers.rounds import FixedRounds, rounds_trainer
from tests.helpers.tiny_unified import FixedTexts, Recorder, build_trainer, spy_paint, tiny_config
from trl_unigrpo.trainers.scouts import agreement, best_and_worst, centred
from trl_unigrpo.trainers.scouts_config import check_scouts


NAN = float("nan")
LINES = {"image_objective": "awm", "flow_regularizer": "none"}


@pytest.mark.parametrize(
    ("rewards", "count", "expected"),
    [
        ([[5, 1, 4, 2, 3, 6]], 2, [1, 5]),
        ([[5, 1, 4, 2, 3, 6]], 3, [0, 1, 5]),  # the odd one is the second best
        ([[5, 1, 4, 2, 3, 6]], 4, [0, 1, 3, 5]),
        ([[NAN, 1, NAN, 2, 3, 6]], 2, [1, 5]),  # what failed is not the worst
        ([[NAN, 1, NAN, 2, NAN, NAN]], 3, [0, 1, 3]),  # unless there is no other
        ([[7, 7, 7, 7], [0, 1, 2, 4]], 2, [4, 5, 6, 7]),  # pools that teach nothing give their places away
        ([[7, 7, 7, 7], [0, 1, 2, 9], [0, 5, 5, 5]], 2, [4, 7, 8, 9, 10, 11]),  # to .5 before .49
        ([[7, 7, 7, 7], [NAN, 1, 1, 1]], 2, [0, 1, 2, 3]),
        ([[NAN, NAN], [3, 3]], 1, [2, 3]),
    ],
)
def test_the_best_and_the_worst_are_chosen(rewards, count, expected):
    chosen = best_and_worst(torch.tensor(rewards, dtype=torch.float32), count)
    assert chosen == expected


def test_pools_may_keep_their_places():
    rewards = torch.tensor([[7.0, 7.0, 7.0, 7.0], [0.0, 1.0, 2.0, 4.0], [NAN, NAN, 1.0, NAN]])
    assert best_and_worst(rewards, 2) == [0, 1, 4, 5, 6, 7]
    assert best_and_worst(rewards, 2, refill=False) == [0, 1, 4, 7, 8, 10]


def test_agreement_is_the_correlation():
    before, after = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 0.0, 3.0, 4.0])
    expected = np.corrcoef(before.numpy(), after.numpy())[0, 1]
    assert agreement(before, after) == {"scouts/agreement": pytest.approx(expected)}
    assert agreement(before, torch.ones(4)) == agreement(before[:1], after[:1]) == {}


def test_the_chosen_of_a_pool_are_centred():
    advantages, pools = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]), torch.tensor([0, 0, 0, 2, 2])
    found = centred(advantages, pools, torch.tensor([True, True, False, True, True]))
    assert found.tolist() == [1.5, -1.5, 0.0, -1.25, 1.25]  # a row without a reward has no part in it


class Watched:
    """A reward that keeps what it was asked, and fails on some of its first images."""

    __name__ = "watched"

    def __init__(self, failing=()):
        self.calls, self.failing = [], failing

    def __call__(self, prompts, completions, images, **columns):
        means = [float(np.asarray(image, dtype=np.float32)[..., 0].mean()) for image in images]
        scores = [None if not self.calls and i in self.failing else mean for i, mean in enumerate(means)]
        self.calls.append((list(images), scores))
        return scores


def one_generation(folder, reward, make=build_trainer, **settings):
    """A run of one generation, with fixed texts: what the optimizer saw, and the log."""
    given = {"max_steps": 1, "num_iterations": 1, "trainer_class": FixedTexts, "logging_steps": 1, **settings}
    trainer = make(folder, reward_funcs=reward, **given)
    recorder = Recorder().attach(trainer)
    trainer.train()
    return recorder, trainer


def by_row(recorder):
    """Row -> its trajectory and its advantage, of what was trained."""
    return {
        t.row: (t, advantage)
        for batch in recorder.batches
        for t, advantage in zip(batch["trajectories"], batch["advantages"].tolist(), strict=True)
    }


def paid(rewards, rows):
    """Advantages within pools of eight, less the mean of those that are trained of a pool."""
    pools = rewards.reshape(-1, 8)
    found = ((pools - pools.mean(1, keepdims=True)) / (pools.std(1, ddof=1, keepdims=True) + 1e-4)).flatten()
    alike = {row: [other for other in rows if other // 8 == row // 8] for row in rows}
    return {row: found[row] - found[alike[row]].mean() for row in rows}


POOL = {"scout_generations": 8, "scout_num_inference_steps": 2}


@pytest.mark.parametrize("objective", [{}, LINES], ids=["windows", "lines"])
def test_the_chosen_are_what_a_group_of_that_size_would_have_painted(tmp_path, monkeypatch, objective):
    """The pool's texts and noise are those of a plain run with groups as large; only few of its images are exact."""
    calls, reward = spy_paint(monkeypatch), Watched()
    scouted, trainer = one_generation(tmp_path / "scouted", reward, **POOL, **objective)
    [log] = [row for row in trainer.state.log_history if "reward" in row]
    assert log["time/scout"] > 0 and -1 <= log["scouts/agreement"] <= 1
    (pool, scouts, _), (chosen, exact, _) = calls
    assert [len(pool), len(chosen)] == [16, 8]
    assert [len(scouts.timesteps) - 1, len(exact.timesteps) - 1] == [2, 6] and scouts.windows is None

    plain, _ = one_generation(
        tmp_path / "plain", Watched(), num_generations=8, gradient_accumulation_steps=4, **objective
    )
    expected, found = by_row(plain), by_row(scouted)
    assert len(found) == 8
    for row, (trajectory, _) in found.items():
        image, other = trajectory.rounds[0].images[0], expected[row][0].rounds[0].images[0]
        assert trajectory.text_ids == expected[row][0].text_ids
        torch.testing.assert_close(image.latents, other.latents)
        torch.testing.assert_close(image.steps.x, other.steps.x)
        assert len(image.steps) > 0

    first, again = (np.array(scores) for _, scores in reward.calls)
    for group in range(2):
        ranked, own = np.sort(first[8 * group :][:8]), [row for row in found if row // 8 == group]
        assert sorted(first[own]) == sorted([*ranked[:2], *ranked[-2:]])  # the best and the worst two
    rewards = first.copy()
    rewards[sorted(found)] = again
    expected = paid(rewards, found)
    assert {row: advantage for row, (_, advantage) in found.items()} == pytest.approx(expected, abs=1e-4)


def test_scouts_that_are_exact_are_trained_on_themselves(tmp_path, monkeypatch):
    """Nothing is painted or rewarded twice."""
    calls, reward = spy_paint(monkeypatch), Watched()
    exact = {"scout_generations": 8, "scout_num_inference_steps": 6, **LINES}
    scouted, trainer = one_generation(tmp_path / "scouted", reward, **exact)
    assert [len(trajectories) for trajectories, *_ in calls] == [16] and len(reward.calls) == 1
    found = {row: advantage for row, (_, advantage) in by_row(scouted).items()}
    assert found == pytest.approx(paid(np.array(reward.calls[0][1]), found), abs=1e-4)
    [log] = [row for row in trainer.state.log_history if "reward" in row]
    assert log["reward"] == pytest.approx(np.mean(reward.calls[0][1]), rel=1e-5)  # of the pool


def test_a_judge_that_fails_on_scouts_has_none_of_them_chosen(tmp_path):
    reward = Watched(failing=[1, 2, 3, 8])
    scouted, _ = one_generation(tmp_path, reward, **POOL)
    assert len(by_row(scouted)) == 8 and not {1, 2, 3, 8} & set(by_row(scouted))


def test_scouts_pay_where_they_are_to(tmp_path):
    reward = Watched()
    scouted, _ = one_generation(tmp_path, reward, scout_reward="scouts", **POOL)
    [(_, scores)] = reward.calls
    found = {row: advantage for row, (_, advantage) in by_row(scouted).items()}
    assert found == pytest.approx(paid(np.array(scores), found), abs=1e-4)


@pytest.mark.parametrize("steps", [2, 6], ids=["painted again", "exact"])
def test_scouts_are_scored_while_others_are_painted(tmp_path, steps):
    """A judge that allows it is asked about each chunk, of the pool and of the chosen; nothing else differs."""
    settings = {**POOL, **LINES, "scout_num_inference_steps": steps, "image_batch_size": 3}
    whole, parts = Watched(failing=[1]), []

    async def judge(prompts, images, completion_ids, **columns):
        parts.append((list(prompts), list(completion_ids), list(images)))
        return [
            None if len(parts) == 1 and i == 1 else float(np.asarray(image, dtype=np.float32)[..., 0].mean())
            for i, image in enumerate(images)
        ]

    judge.per_image = True
    asked, _ = one_generation(tmp_path / "parts", judge, **settings)
    expected, _ = one_generation(tmp_path / "whole", whole, **settings)
    assert [len(images) for *_, images in parts] == [3] * 5 + [1] + ([3, 3, 2] if steps == 2 else [])
    found, wanted = by_row(asked), by_row(expected)
    assert {row: advantage for row, (_, advantage) in found.items()} == {row: a for row, (_, a) in wanted.items()}
    texts = [text for _, some, _ in parts[:6] for text in some]
    assert all(t.text_ids == texts[row] for row, (t, _) in found.items())


def test_the_chosen_alone_go_on_to_later_rounds(tmp_path):
    rounds = {"make": rounds_trainer, "trainer_class": FixedRounds, "allow_stop": False}
    scouted, _ = one_generation(tmp_path, Watched(), **rounds, **POOL)
    trained = [t for batch in scouted.batches for t in batch["trajectories"]]
    assert len(trained) == 8 and all(len(t.rounds) == 2 for t in trained)
    assert all(len(image.steps) for t in trained for _, image in t.painted())
    # In each round the chosen of a pool are paid against each other: nothing is left over.
    paid_for = torch.stack([row for batch in scouted.batches for row in batch["round_advantages"]])
    by_pool = torch.tensor([t.row // 8 for t in trained])
    for pool in range(2):
        torch.testing.assert_close(paid_for[by_pool == pool].sum(0), torch.zeros(2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scout_generations": 2}, "expected a pool of 8, 12"),
        ({"scout_generations": 4}, "expected a pool of 8, 12"),
        ({"scout_generations": 10}, "expected a pool of 8, 12"),
        ({"scout_generations": 8, "scout_num_inference_steps": 7}, "num_inference_steps=6: expected 1 to 6"),
        ({"scout_generations": 8, "scout_num_inference_steps": 0}, "expected 1 to 6"),
        ({"scout_generations": 8, "images_per_thinking": 2}, "would not be chosen together"),
        ({"scout_reward": "both"}, "expected 'repainted' or 'scouts'"),
    ],
)
def test_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(tmp_path, **settings)


def test_groups_that_several_processes_share_are_refused(tmp_path):
    config = tiny_config(tmp_path, scout_generations=8, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    check_scouts(config, processes=2)
    config.steps_per_generation = 1
    with pytest.raises(ValueError, match="no whole groups of 4"):
        check_scouts(config, processes=2)
