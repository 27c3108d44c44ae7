"""The soft reward against the verifier: on clean drawings, over all readings of unclear ones, and by its gradient."""

import itertools
import math

import numpy as np
import pytest
import torch

from trl_unigrpo.shapeworld import shapeworld_dataset, shapeworld_reward, soft_shapeworld_reward
from trl_unigrpo.shapeworld.corpus import (
    ErrorRates,
    draw_plans,
    painted_cells,
    spoil_plans,
)
from trl_unigrpo.shapeworld.grammar import FAMILIES, parse_prompt, prompts_by_split
from trl_unigrpo.shapeworld.render import CLEAN_CELLS, render_images, render_tensor
from trl_unigrpo.shapeworld.soft_reward import cell_probabilities, count_distribution, expected_score
from trl_unigrpo.shapeworld.verifier import read_cells, score
from trl_unigrpo.shapeworld.world import SPATIAL_RELATIONS, encode_specs


def prompts_of_every_kind():
    """One prompt of each family, and one of each relation."""
    prompts = prompts_by_split()["train"]
    kinds = {(spec.category, spec.family, spec.relation): text for text, spec in prompts.items()}
    assert len({kind[:2] for kind in kinds}) == sum(map(len, FAMILIES.values()))
    assert {kind[2] for kind in kinds} == {*SPATIAL_RELATIONS, None}
    return list(kinds.values())


def scenes(prompts, rng):
    """Cells (B, 9): faultless scenes, scenes with the corpus' mistakes, and random ones, by turns."""
    specs = [parse_prompt(prompt) for prompt in prompts]
    arrays, rates = encode_specs(specs), ErrorRates().scaled(2, 2)
    plans = draw_plans(arrays, rng)
    right = painted_cells(plans, ErrorRates().scaled(0, 0), rng)
    wrong = painted_cells(spoil_plans(plans, arrays, specs, rates, rng), rates, rng)
    random = np.where(rng.random(right.shape) < 0.6, 0, rng.integers(0, 31, right.shape))
    return np.choose(np.arange(len(prompts))[:, None] % 3, [right, wrong, random])


@pytest.fixture
def blurred():
    """Unclear images in [0, 1], float64: mixtures of two scenes each, with noise."""
    rng = np.random.default_rng(5)
    one, other = (render_tensor(rng.integers(0, 31, (4, 9))).double() for _ in range(2))
    noise = torch.from_numpy(rng.normal(0, 0.05, one.shape))
    return ((0.6 * one + 0.4 * other + noise + 1) / 2).clamp(0, 1)


def test_on_clean_drawings_it_is_the_verifiers_score():
    prompts = [*shapeworld_dataset("test", 700, seed=3)["prompt"], *prompts_of_every_kind()]
    cells = scenes(prompts, np.random.default_rng(0))
    images = render_images(cells)
    hard = np.array(shapeworld_reward(prompts, [""] * len(prompts), images))
    assert 0.2 < np.mean(hard == 1) < 0.8
    assert len(set(hard)) > 8
    soft = soft_shapeworld_reward((render_tensor(cells) + 1) / 2, prompts)
    # The nearest two templates, a green circle and a green square, are 0.0365 apart.
    np.testing.assert_allclose(soft, hard, atol=9 * math.exp(-0.0365 / 0.005))
    np.testing.assert_allclose(soft_shapeworld_reward((render_tensor(cells) + 1) / 2, prompts, 1e-3), hard, atol=1e-6)


def test_conversations_are_scored_like_plain_prompts():
    pixels = (render_tensor(np.eye(9, dtype=np.int64)[:2]) + 1) / 2
    talks = [[{"role": "user", "content": "a red circle"}], "a red circle"]
    assert soft_shapeworld_reward(pixels, talks, category=["a", "b"]).tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("prompt", prompts_of_every_kind())
def test_expected_score_is_the_mean_over_all_readings(prompt):
    """Every cell may be one of two codes: the verifier scores all 512 images, weighted by their probability."""
    spec = parse_prompt(prompt)
    rng = np.random.default_rng(sum(map(ord, prompt)))
    asked = [code for code in range(1, 31) if score([spec], np.array([[code] + [0] * 8])).checks["present"][0] > 0]
    for _ in range(8):
        # Codes that are asked for, empty cells, unreadable ones, and any others.
        others = rng.choice([*[0] * 60, *[-1] * 20, *range(31)], (9, 2))
        codes = np.where(rng.random((9, 2)) < 0.25, rng.choice(asked, (9, 2)), others)
        weight = rng.random(9)
        p = torch.zeros(1, 9, 32, dtype=torch.float64)
        for cell, (one, other) in enumerate(codes):
            p[0, cell, one] += weight[cell]  # unreadable, -1, is the last of the 32
            p[0, cell, other] += 1 - weight[cell]
        choices = np.array(list(itertools.product([0, 1], repeat=9)))
        chances = np.where(choices == 0, weight, 1 - weight).prod(1)
        hard = score([spec] * 512, codes[np.arange(9), choices]).score
        assert expected_score([spec], p).item() == pytest.approx(chances @ hard, abs=1e-12)


def test_expected_score_is_the_mean_over_sampled_readings():
    prompts = prompts_of_every_kind()
    specs = [parse_prompt(prompt) for prompt in prompts]
    logits = torch.randn(len(prompts), 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[..., 0] += 3
    p = (2 * logits).softmax(-1)
    rng, draws = np.random.default_rng(1), 20_000
    for spec, row, expected in zip(specs, p.numpy(), expected_score(specs, p).tolist(), strict=True):
        cells = np.stack([rng.choice([*range(31), -1], draws, p=cell) for cell in row], 1)
        values = score([spec] * draws, cells).score
        assert abs(values.mean() - expected) < 4.5 * values.std() / draws**0.5


def test_a_batch_scores_like_its_rows(blurred):
    prompts = prompts_of_every_kind()[-4:]
    together = soft_shapeworld_reward(blurred, prompts, 0.05)
    apart = [soft_shapeworld_reward(blurred[i : i + 1], prompts[i : i + 1], 0.05) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(apart))
    assert soft_shapeworld_reward(blurred[:0], []).shape == (0,)


def test_cells_are_read_by_a_softmax_of_their_squared_distances(blurred):
    p = cell_probabilities(blurred, 0.05)
    assert p.shape == (4, 9, 32)
    for image, cell in itertools.product(range(4), range(9)):
        row, column = divmod(cell, 3)
        tile = blurred[image, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].numpy() * 2 - 1
        errors = [((tile - template) ** 2).mean() for template in CLEAN_CELLS.astype(np.float64)] + [0.08]
        weights = np.exp(-np.array(errors) / 0.05)
        np.testing.assert_allclose(p[image, cell], weights / weights.sum(), rtol=1e-6)


def test_without_temperature_it_reads_as_the_verifier(blurred):
    half = (0.1 * blurred + 0.9 * (render_tensor(np.full((4, 9), 7)) + 1) / 2).clamp(0, 1)
    pixels = torch.cat([blurred, half])
    cells, _ = read_cells((2 * pixels - 1).float().numpy())
    assert (cells == -1).any()
    assert (cells == 7).any()
    read = cell_probabilities(pixels, 1e-7).argmax(-1).numpy()
    np.testing.assert_array_equal(np.where(read == 31, -1, read), cells)


def test_number_of_events_in_closed_form():
    p = 0.3
    alike = count_distribution(torch.full((9,), p, dtype=torch.float64))
    binomial = [math.comb(9, k) * p**k * (1 - p) ** (9 - k) for k in range(10)]
    np.testing.assert_allclose(alike, binomial, rtol=1e-12)
    certain = count_distribution(torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert certain.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("temperature", [0.005, 0.05])
def test_gradient_is_that_of_the_reward(blurred, temperature):
    prompts = ["two red circles in the top row", "a red circle left of a blue square", "a ring", "three green shapes"]
    pixels = blurred[:4].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_shapeworld_reward(x, prompts, temperature), pixels, fast_mode=True)
    # Where cells are certain, probabilities are 0 and 1, and products and their derivatives hold zeros.
    p = torch.zeros(4, 9, 32, dtype=torch.float64)
    p.scatter_(2, torch.randint(0, 3, (4, 9, 1), generator=torch.Generator().manual_seed(0)), 1.0)
    specs = [parse_prompt(prompt) for prompt in prompts]
    assert torch.autograd.gradcheck(lambda x: expected_score(specs, x), p.requires_grad_(), fast_mode=True)


def test_its_gradient_makes_wrong_images_right():
    prompts = shapeworld_dataset("validation", 35, seed=3)["prompt"]
    specs = [parse_prompt(prompt) for prompt in prompts]
    rng = np.random.default_rng(0)
    cells = np.where(rng.random((35, 9)) < 0.7, 0, rng.integers(0, 31, (35, 9)))
    pixels = ((render_tensor(cells).double() + 1) / 2).requires_grad_()

    def hard():
        return score(specs, read_cells((2 * pixels.detach() - 1).float().numpy())[0]).score

    before = hard()
    # Gradients of clean images are tiny, and Adam does not mind.
    optimizer = torch.optim.Adam([pixels], lr=0.02, eps=1e-300)
    for _ in range(100):
        optimizer.zero_grad()
        (-soft_shapeworld_reward(pixels, prompts).sum()).backward()
        optimizer.step()
        pixels.data.clamp_(0, 1)
    after = hard()
    assert before.mean() < 0.2
    assert after.mean() > before.mean() + 0.3
    assert (after < before).mean() < 0.05


@pytest.mark.parametrize(
    ("pixels", "prompts", "temperature", "message"),
    [
        (torch.rand(1, 3, 48, 48), ["a red hexagon"], 0.01, "'a red hexagon' is not a ShapeWorld prompt"),
        (torch.rand(1, 3, 48, 48), ["a red circle"] * 2, 0.01, "1 images for 2 prompts"),
        (torch.rand(1, 3, 64, 48), ["a red circle"], 0.01, r"\(1, 3, 64, 48\), expected \(B, 3, 48, 48\)"),
        (torch.rand(1, 1, 48, 48), ["a red circle"], 0.01, r"\(1, 1, 48, 48\), expected"),
        (torch.rand(1, 3, 48, 48), ["a red circle"], 0.0, "temperature=0.0, expected a number above 0"),
    ],
)
def test_what_it_refuses(pixels, prompts, temperature, message):
    with pytest.raises(ValueError, match=message):
        soft_shapeworld_reward(pixels, prompts, temperature)
