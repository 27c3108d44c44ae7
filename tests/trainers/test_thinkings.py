"""Several images of one thinking: what is sampled and encoded once, and the two levels of credit."""

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.helpers.editing import edits, tiny_editor
from tests.helpers.tiny_unified import OneByOne, broken, prompts_dataset, tiny_bagel, tiny_config
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.monitoring.image_statistics import near_twins
from trl_unigrpo.trainers.credit import alike, spreads, two_levels
from trl_unigrpo.trainers.thinkings_config import check_thinkings
from trl_unigrpo.trajectory import from_state, to_state


NAN = float("nan")


# Credit


def group_advantages(rewards, group_size):
    """Rewards minus their group's mean, failures left out; 0 where there is none."""
    groups = rewards.view(-1, group_size)
    return (groups - groups.nanmean(1, keepdim=True)).flatten().nan_to_num(0.0)


def test_one_image_a_thinking_pays_the_text_what_trl_pays():
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(0))
    text, _ = two_levels(advantages, torch.ones(8, dtype=torch.bool), 1)
    assert torch.equal(text, advantages)


def test_two_levels_by_hand():
    """Two groups of two thinkings with three images; failures count in no mean."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, NAN, 2.0, 5.0, 5.0, 5.0, NAN, NAN, NAN])
    known = ~rewards.isnan()
    text, image = two_levels(group_advantages(rewards, 6), known, 3)
    group = torch.tensor([11 / 5, 5.0])
    expected = torch.tensor([3.0, 1.0, 5.0, NAN]) - group.repeat_interleave(2)
    torch.testing.assert_close(text, expected.nan_to_num(0.0).repeat_interleave(3))
    torch.testing.assert_close(image, torch.tensor([-2.0, -1.0, 3.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    assert torch.equal(image[6:], torch.zeros(6))  # exactly: nothing can be learnt from them
    equal = torch.tensor([0.7] * 12 + [0.1] * 12)
    assert equal[:12].mean() != equal[0]
    assert not two_levels(equal, torch.ones(24, dtype=torch.bool), 12)[1].any()


@pytest.mark.parametrize("each", [1, 2])
def test_both_gradients_have_the_direction_of_the_true_ones(each):
    """
    Every group of 4 that a tiny softmax policy can sample: 3 thinkings, then 2 images, of which the reward is a table.
    The mean gradient is the true one, the thinking's 1 - K / G times, the image's 1 - 1 / K times.
    """
    generator = torch.Generator().manual_seed(0)
    of_text = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    of_image = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    reward = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    text, image = of_text.log_softmax(0), of_image.log_softmax(1)
    mean = (text.exp()[:, None] * image.exp() * reward).sum()
    true = torch.autograd.grad(mean, (of_text, of_image), retain_graph=True)
    one = list(itertools.product(range(3), itertools.product(range(2), repeat=each)))  # a thinking and its images
    loss = [torch.zeros((), dtype=torch.float64)] * 2
    for group in itertools.product(one, repeat=4 // each):
        rows = torch.tensor([(thought, painted) for thought, images in group for painted in images])
        log_p = sum(text[thought] + image[thought, list(images)].sum() for thought, images in group)
        advantages = group_advantages(reward[tuple(rows.T)], 4)
        paid = two_levels(advantages, torch.ones(4, dtype=torch.bool), each)
        paid = paid if each > 1 else (paid[0], advantages)
        for level, logs in enumerate((text[rows[:, 0]], image[tuple(rows.T)])):
            loss[level] = loss[level] + log_p.detach().exp() * (paid[level] * logs).mean()
    found = torch.autograd.grad(sum(loss), (of_text, of_image))
    shares = (1 - each / 4, 1 - 1 / (each if each > 1 else 4))
    for gradient, expected, share in zip(found, true, shares, strict=True):
        torch.testing.assert_close(gradient, share * expected, rtol=0, atol=1e-12)
        assert expected.abs().max() > 0.02


def test_equal_rewards_are_alike_whatever_their_mean_rounds_to():
    rewards = torch.tensor([0.7] * 12 + [0.7] * 11 + [0.70001])[:, None]
    assert alike(rewards, 12).tolist() == [True] * 12 + [False] * 12
    failed = torch.tensor([0.5, NAN, 0.5, NAN, NAN, NAN, 0.5, NAN, 0.6])[:, None]
    assert alike(failed, 3).tolist() == [True] * 6 + [False] * 3
    assert alike(torch.cat([rewards, torch.arange(24.0)[:, None]], 1), 12).sum() == 0  # two functions


def test_spreads_are_those_of_the_levels():
    """Thinkings of standard deviation 2, images of 3 around them: 4 of each."""
    generator = torch.Generator().manual_seed(0)
    thinkings = 2 * torch.randn(4000, 4, 1, generator=generator)
    rewards = (thinkings + 3 * torch.randn(4000, 4, 4, generator=generator)).flatten()
    found = spreads(rewards, 4, 16)
    assert found["thinking/reward_std_within"] == pytest.approx(3, rel=0.02)
    assert found["thinking/reward_std_between"] == pytest.approx(2, rel=0.03)
    rewards[0] = NAN
    assert spreads(rewards[:32], 4, 16).keys() == found.keys()
    assert spreads(rewards[:4], 4, 4) == {}


# A run


class Told:
    """A reward that tells rows and lengths of thinkings apart, and what it was told."""

    __name__ = "told"

    def __init__(self):
        self.calls = []

    def __call__(self, completion_ids, **columns):
        self.calls.append(completion_ids)
        return [float(i % 5) + 0.1 * len(ids) for i, ids in enumerate(completion_ids)]


CASES = {
    "windows": {},
    "lines, lora": {"image_objective": "nft", "matching_samples": 2, "peft_config": LoraConfig(r=2)},
    "one by one": {"model": OneByOne, "image_objective": "awm", "matching_samples": 2},
    "guided, cut in two": {"guidance_scale": 2.0, "image_batch_size": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_share_thinkings_and_contexts(make_trainer, train, case):
    case = dict(case)
    model = broken(case.pop("model")) if "model" in case else None
    reward = Told()
    case |= {"images_per_thinking": 2, "max_steps": 1, "eval_dataset": prompts_dataset(copies=1)}
    trainer = make_trainer(model=model, reward_funcs=reward, **case)
    asked, generate = [], trainer.unified.generate

    def counted(*args, **kwargs):
        asked.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    trainer.unified.generate = counted
    seen = train(trainer)
    assert asked == [4]  # of two groups of four
    (ids,) = reward.calls
    assert ids[::2] == ids[1::2] and len({tuple(row) for row in ids}) > 1
    rows = {t.row: t for batch in seen.batches for t in batch["trajectories"]}
    painted = [rows[row].rounds[0].images[0] for row in range(8)]
    assert len({image.seed for image in painted}) == 8
    for first, second in zip(painted[::2], painted[1::2], strict=True):
        assert first.context is second.context
        assert not torch.equal(first.latents, second.latents)
        assert all(first.branches[name] is second.branches[name] for name in first.branches)
    known = trainer.unified.context_types
    state = from_state(to_state([rows[row] for row in range(8)], known), known)
    assert state[2].rounds[0].images[0].context is state[3].rounds[0].images[0].context

    rewards = torch.tensor([float(i % 5) + 0.1 * len(row) for i, row in enumerate(ids)])
    scale = rewards.view(2, 4).std(1).repeat_interleave(4) + 1e-4
    means = rewards.view(-1, 2).mean(1).repeat_interleave(2)
    of_text = (means - rewards.view(2, 4).mean(1).repeat_interleave(4)) / scale
    of_image = (rewards - means) / scale
    for batch in seen.batches:
        at = [t.row for t in batch["trajectories"]]
        torch.testing.assert_close(batch["text_advantages"], of_text[at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["advantages"], of_image[at], rtol=1e-4, atol=1e-5)
    log = trainer.state.log_history[0]
    assert log["thinking/reward_std_within"] == pytest.approx(
        rewards.view(-1, 2).var(1).mean().sqrt().item(), rel=1e-4
    )
    assert "thinking/reward_std_between" in log

    trainer.evaluate()
    assert asked[1:] == [8] * (len(asked) - 1)  # each image has a thinking of its own


@pytest.mark.parametrize(("order", "held"), [("aaabbb", 2), ("abbbaa", 6), ("bbbbbb", 1)])
def test_contexts_that_are_one_object_give_every_image_its_velocity(order, held):
    """However often each is there, and however they are cut."""
    model, generator = tiny_bagel(), torch.Generator().manual_seed(0)
    made = {"a": ContextRow(torch.tensor([1, 7, 8, 2])), "b": ContextRow(torch.tensor([1, 9, 10, 11, 12, 2]))}
    x, t = torch.randn(6, *model.latent_shape((8, 8)), generator=generator), torch.rand(6, generator=generator)
    encoded = model.encode_context([made[name] for name in order])
    assert len(encoded.lengths) == len(encoded.keys[0]) == held
    together = model.predict_velocity(encoded, x, t, (8, 8))
    for i, name in enumerate(order):
        alone = model.predict_velocity(model.encode_context([made[name]]), x[i : i + 1], t[i : i + 1], (8, 8))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_edits_share_thinkings_too(make_trainer, train):
    trainer = make_trainer(model=tiny_editor(), train_dataset=edits(), images_per_thinking=2, max_steps=1)
    seen = train(trainer)
    rows = {t.row: t for batch in seen.batches for t in batch["trajectories"]}
    assert all(rows[row].text_ids == rows[row + 1].text_ids for row in range(0, 8, 2))
    assert rows[0].rounds[0].images[0].context is rows[1].rounds[0].images[0].context


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"images_per_thinking": 3}, "num_generations=4: expected one of 1, 2, 4"),
        ({"images_per_thinking": 0}, "images_per_thinking=0"),
        ({"images_per_thinking": 4}, "one thinking has none to compare"),
        ({"images_per_thinking": 2, "per_device_train_batch_size": 1, "num_generations": 2}, "none to compare"),
        ({"images_per_thinking": 2, "thinking": False, "text_weight": 0.0}, "thinking=False"),
        ({"images_per_thinking": 2, "num_rounds": 2}, "num_rounds=2"),
    ],
)
def test_what_is_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, **settings)


def test_thinking_that_processes_would_cut_is_refused(tmp_path):
    config = tiny_config(tmp_path, images_per_thinking=2)
    config.per_device_train_batch_size, config.steps_per_generation = 3, 1
    with pytest.raises(ValueError, match="3 trajectories per process"):
        check_thinkings(config)


def test_images_of_one_thinking_are_no_twins():
    thumbnails = np.repeat(np.array([0.1, 0.1, 0.5, 0.9]), 192).reshape(4, 192)
    assert near_twins(thumbnails, [0] * 4)[0].tolist() == [True, True, False, False]
    assert near_twins(thumbnails, [0] * 4, 2)[0].tolist() == [False] * 4
    thumbnails[2] = 0.1
    assert near_twins(thumbnails, [0] * 4, 2)[0].tolist() == [True, True, True, False]
