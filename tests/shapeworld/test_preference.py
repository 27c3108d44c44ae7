"""The learned reward: what it computes, what it may be asked, and how often the one that is shipped is right."""

import math

import numpy as np
import pytest
import torch

from trl_unigrpo.shapeworld import preference_reward, soft_preference_reward
from trl_unigrpo.shapeworld.preference import PREFERENCE_WEIGHTS, PreferenceModel, load_preference_model, word_ids
from trl_unigrpo.shapeworld.render import render_images, render_tensor
from trl_unigrpo.shapeworld.world import WORDS, cell_code


CPU = torch.device("cpu")


def scene(**cells):
    """Cells (9,) that hold what is named by place: `scene(top_left=("red", "circle"))`."""
    places = ("top_left", "top", "top_right", "left", "center", "right", "bottom_left", "bottom", "bottom_right")
    return np.array([cell_code(*cells[place]) if place in cells else 0 for place in places])


RED, BLUE, RING = (scene(center=of) for of in (("red", "circle"), ("blue", "circle"), ("red", "ring")))


def pixels(*scenes):
    return torch.cat([(render_tensor(cells) + 1) / 2 for cells in scenes])


def test_words_are_counted_from_one_and_padded_by_zero():
    ids = word_ids(["a red circle", [{"role": "user", "content": "two  blue rings"}]])
    assert ids.shape == (2, 12)
    assert ids[0, :3].tolist() == [1 + WORDS.index(word) for word in ("a", "red", "circle")]
    assert ids[1, :3].tolist() == [1 + WORDS.index(word) for word in ("two", "blue", "rings")]
    assert not ids[:, 3:].any()


def test_padding_says_nothing():
    torch.manual_seed(0)
    model = PreferenceModel().eval()
    ids, shown = word_ids(["a red circle"]), pixels(RED)
    before = model(ids, shown)
    with torch.no_grad():
        model.words.weight[0] += 1.0
    assert torch.equal(model(ids, shown), before)
    with torch.no_grad():
        model.words.weight[ids[0, 1]] += 1.0
    assert not torch.allclose(model(ids, shown), before)


def test_both_forms_give_the_same_scores():
    prompts = ["a red circle", [{"role": "user", "content": "a red circle"}], "a blue shape"]
    scenes = RED, RING, BLUE
    hard = preference_reward(prompts, [""] * 3, render_images(np.stack(scenes)))
    soft = soft_preference_reward(pixels(*scenes), prompts)
    assert all(0 < value < 1 for value in hard)
    assert torch.allclose(torch.tensor(hard), soft, atol=5e-3)  # eight bits a channel


def test_the_score_is_the_chance_against_an_average_image():
    model, prompts, shown = load_preference_model(CPU), ["a red circle"] * 2, pixels(RED, BLUE)
    answers = model(word_ids(prompts), shown)
    expected = [1 / (1 + math.exp(-value)) for value in answers.tolist()]
    assert soft_preference_reward(shown, prompts).tolist() == pytest.approx(expected)


def test_the_gradient_is_that_of_the_score():
    shown = pixels(RED).requires_grad_()
    soft_preference_reward(shown, ["a red ring"]).sum().backward()
    direction = shown.grad / shown.grad.norm()
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (soft_preference_reward(shown + s * direction, ["a red ring"]) for s in (step, -step))
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(shown.grad.norm().item(), rel=0.05)


def test_it_sees_colours_and_shapes():
    prompts = ["a red circle"] * 3
    right, color, shape = preference_reward(prompts, [""] * 3, render_images(np.stack([RED, BLUE, RING])))
    assert right > max(color, shape)


@pytest.mark.parametrize(
    ("shown", "prompts", "match"),
    [
        (pixels(RED), ["a red circle"] * 2, "1 images for 2 prompts"),
        (torch.zeros(1, 3, 32, 32), ["a red circle"], r"\(1, 3, 32, 32\).*image_size=48"),
        (pixels(RED), ["a portrait"], "'a portrait' is not a ShapeWorld prompt"),
    ],
)
def test_what_does_not_fit_is_refused(shown, prompts, match):
    with pytest.raises(ValueError, match=match):
        soft_preference_reward(shown, prompts)


def test_half_precision_in_and_out():
    score = soft_preference_reward(pixels(RED).bfloat16(), ["a red circle"])
    assert score.dtype == torch.bfloat16
    assert score.item() == pytest.approx(soft_preference_reward(pixels(RED), ["a red circle"]).item(), abs=0.02)


def test_loading_it_draws_no_random_numbers():
    before = torch.get_rng_state()
    load_preference_model.__wrapped__(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shipped_model_is_small_and_frozen():
    assert PREFERENCE_WEIGHTS.stat().st_size < 2_000_000
    assert not any(parameter.requires_grad for parameter in load_preference_model(CPU).parameters())
