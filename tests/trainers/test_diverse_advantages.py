"""Advantages shared among the good images of a group by how different these are."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_unified import FixedTexts, prompts_dataset, redness, tiny_config, weights
from trl_unigrpo.images import mark_failed
from trl_unigrpo.monitoring.image_statistics import image_distance
from trl_unigrpo.rewards import thinking_reward
from trl_unigrpo.trainers.diversity import diverse_advantages, features_of, isolation


NAN = float("nan")


def random_images(number, seed=0):
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (16, 24, 3), dtype=np.uint8)) for _ in range(number)]


def by_loops(advantages, features, weight, group_size):
    """The formula, image by image; returns the advantages and the distances."""
    found, distances = list(advantages), [NAN] * len(advantages)
    for start in range(0, len(advantages), group_size):
        group = range(start, start + group_size)
        for i in group:
            others = [math.dist(features[i], features[j]) for j in group if j != i]
            others = [distance for distance in others if not math.isnan(distance)]
            distances[i] = min(others, default=NAN)
        good = [i for i in group if advantages[i] > 0 and not math.isnan(distances[i])]
        total = sum(advantages[i] * distances[i] for i in good)
        for i in good if total > 0 else []:
            share = distances[i] * sum(advantages[j] for j in good) / total
            found[i] = advantages[i] * ((1 - weight) + weight * share)
    return found, distances


# The formula


def test_by_hand():
    """On a line at 0, 1, 1, 4 and 9: the twins get nothing, and the last is bad, however far it stands."""
    features = torch.tensor([[0.0], [1.0], [1.0], [4.0], [9.0]])
    apart = isolation(features, 5)
    assert apart.tolist() == [1, 0, 0, 3, 5]
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -4.0])
    assert diverse_advantages(advantages, apart, 1.0, 5).tolist() == [1, 0, 0, 3, -4]
    assert diverse_advantages(advantages, apart, 0.5, 5).tolist() == [1, 0.5, 0.5, 2, -4]
    torch.testing.assert_close(
        diverse_advantages(torch.tensor([2.0, 0.0, 0.0, 1.0, -3.0]), apart, 1.0, 5),
        torch.tensor([2 * 0.6, 0.0, 0.0, 3 * 0.6, -3.0]),  # d_mean = (2 * 1 + 1 * 3) / 3
    )


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_as_a_loop_over_images_has_it(weight):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 3, generator=generator)
    features[7], features[9] = features[6], NAN
    advantages = torch.randn(24, generator=generator)
    expected, distances = by_loops(advantages.tolist(), features.tolist(), weight, 6)
    apart = isolation(features, 6)
    torch.testing.assert_close(apart, torch.tensor(distances, dtype=torch.float64), equal_nan=True)
    found = diverse_advantages(advantages, apart, weight, 6)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not torch.allclose(found, advantages, atol=0.1)
    torch.testing.assert_close(found.view(4, 6).sum(1), advantages.view(4, 6).sum(1))  # each group's mean stays
    assert torch.equal(found[advantages <= 0], advantages[advantages <= 0])


def test_order_and_scale_of_features_are_no_matter():
    generator = torch.Generator().manual_seed(1)
    features, advantages = torch.randn(8, 5, generator=generator), torch.randn(8, generator=generator)
    order = torch.randperm(8, generator=generator)
    found = diverse_advantages(advantages, isolation(features, 8), 1.0, 8)
    turned = diverse_advantages(advantages[order], isolation(7 * features[order], 8), 1.0, 8)
    torch.testing.assert_close(turned, found[order])


def test_where_nothing_can_be_compared_advantages_stay():
    """Equal rewards, one image eight times, no image whole, one of a group whole, groups of one."""
    random = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -2.0, 0.0])
    alone = torch.full((8, 2), NAN)
    alone[2] = 1.0
    for given, features, group_size in (
        (torch.zeros(8), random, 8),
        (advantages, torch.ones(8, 2), 8),
        (advantages, torch.full((8, 2), NAN), 8),
        (advantages, alone, 8),
        (advantages, random, 1),
    ):
        found = diverse_advantages(given, isolation(features, group_size), 1.0, group_size)
        assert torch.equal(found, given)


def test_failed_image_is_nobody_s_neighbour():
    images = random_images(4)
    images[2] = images[1].copy()
    mark_failed(images[1:2], [False])
    features = features_of(images)
    assert features.isnan().any(1).tolist() == [False, True, False, False]
    apart = isolation(features, 4)
    assert apart.isnan().tolist() == [False, True, False, False]
    assert apart[2].item() == pytest.approx(min(image_distance(images[2], images[i]) for i in (0, 3)), rel=1e-6)


def test_features_of_one_s_own():
    images = random_images(3)
    means = features_of(images, lambda some: torch.tensor([[np.asarray(image).mean()] for image in some]))
    assert means.shape == (3, 1) and means.dtype == torch.float32
    for wrong in (torch.ones(2, 4), torch.ones(3)):
        with pytest.raises(ValueError, match="3 images: expected one row"):
            features_of(images, lambda some, wrong=wrong: wrong)


# A run


def trl_advantages(rewards, group_size):
    groups = torch.tensor(rewards).view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def of_rows(seen, name="advantages"):
    """List the advantage that each row was trained with, in order."""
    pairs = [
        (t.row, value.item())
        for batch in seen.batches
        for t, value in zip(batch["trajectories"], batch[name], strict=True)
    ]
    return [value for _, value in sorted(dict(pairs).items())]


class Painted(FixedTexts):
    """Keeps what was decoded. In the first group one image stands twice, and the last one failed."""

    def _painted(self, trajectories, plan=None):
        images = super()._painted(trajectories, plan)
        if len(images) == 8:
            images[2] = images[1].copy()
            mark_failed(images[3:4], [False])
        self.shown = images
        return images


@pytest.mark.parametrize("experts", ["text", "both"])
def test_what_a_run_trains_on(make_trainer, train, experts):
    """Process rewards are added to what is shared."""
    words = thinking_reward(lambda completions, **_: [float(place) for place in range(len(completions))])
    trainer = make_trainer(
        trainer_class=Painted,
        reward_funcs=[lambda images, **_: [0.2, 0.8, 0.9, 0.5, 0.5, 0.1, 0.6], words],
        diversity_weight=0.75,
        diversity_experts=experts,
        process_reward_weight=0.5,
        max_steps=1,
    )
    with pytest.warns(UserWarning, match="no score"):
        seen = train(trainer)
    known = [*trl_advantages([0.2, 0.8, 0.9], 3), 0.0, *trl_advantages([0.5, 0.5, 0.1, 0.6], 4)]
    expected, distances = by_loops(known, features_of(trainer.shown).tolist(), 0.75, 4)
    assert distances[1] == distances[2] == 0 and math.isnan(distances[3])
    assert of_rows(seen) == pytest.approx(expected if experts == "both" else known, abs=1e-4)
    assert max(abs(one - other) for one, other in zip(expected, known, strict=True)) > 0.05
    process = [*trl_advantages([0.0, 1.0, 2.0], 3), 0.0, *trl_advantages([4.0, 5.0, 6.0, 7.0], 4)]
    texts = [a + 0.5 * p for a, p in zip(expected, process, strict=True)]
    assert of_rows(seen, "text_advantages") == pytest.approx(texts, abs=1e-4)
    log = trainer.state.log_history[0]
    assert log["images/isolation"] == pytest.approx(np.nanmean(distances), rel=1e-5)


def test_nothing_is_shared_where_it_is_off(make_trainer, monkeypatch):
    """Off by default, to the bit; features are not asked for, nor in evaluation."""
    asked = []

    def features(images):
        asked.append(len(images))
        return torch.stack([torch.tensor(np.asarray(image), dtype=torch.float32).flatten() for image in images])

    given = {"trainer_class": FixedTexts, "max_steps": 1, "eval_dataset": prompts_dataset(copies=1)}
    after = []
    for own in ({}, {"image_features": features}, {"image_features": features, "diversity_weight": 1.0}):
        trainer = make_trainer(**given, **own)
        trainer.train()
        trainer.evaluate()
        after.append(weights(trainer.model))
    assert asked == [8]
    plain, off, on = after
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert any(not torch.equal(plain[name], on[name]) for name in plain)


def test_pools_of_scouts_are_shared_before_some_are_chosen(make_trainer, train):
    """By the pool's images; what the chosen of a pool have in common is taken from them after."""
    trainer = make_trainer(
        trainer_class=Painted,
        diversity_weight=1.0,
        scout_generations=8,
        scout_num_inference_steps=6,
        max_steps=1,
        image_objective="nft",
        flow_regularizer="none",
        matching_samples=2,
    )
    seen = train(trainer)
    rewards = redness(None, None, trainer.shown)
    shared, _ = by_loops(trl_advantages(rewards, 8), features_of(trainer.shown).tolist(), 1.0, 8)
    chosen = sorted({t.row for batch in seen.batches for t in batch["trajectories"]})
    means = {pool: np.mean([shared[row] for row in chosen if row // 8 == pool]) for pool in (0, 1)}
    expected = [shared[row] - means[row // 8] for row in chosen]
    assert of_rows(seen, "text_advantages") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"diversity_weight": -0.1}, "diversity_weight=-0.1: expected a number from 0"),
        ({"diversity_weight": 1.5}, "expected a number from 0"),
        ({"diversity_weight": NAN}, "expected a number from 0"),
        ({"diversity_experts": "image"}, "diversity_experts='image': expected 'text' or 'both'"),
        ({"diversity_weight": 0.5, "text_weight": 0.0}, "the text that would be paid is not trained"),
        ({"diversity_weight": 0.5, "num_rounds": 2}, "num_rounds=2: images are compared"),
        ({"diversity_weight": 0.5, "images_per_thinking": 2}, "images_per_thinking=2: images are compared"),
    ],
)
def test_weights_and_groups_that_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, **settings)
