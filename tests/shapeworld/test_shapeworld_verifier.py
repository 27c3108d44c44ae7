"""The renderer and the verifier, against scenes scored by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from trl_unigrpo.shapeworld.diversity import cell_diversity
from trl_unigrpo.shapeworld.grammar import parse_prompt
from trl_unigrpo.shapeworld.plan import (
    format_plan,
    parse_plan,
    plan_cells,
    plan_faithfulness,
    score_plans,
)
from trl_unigrpo.shapeworld.render import (
    BACKGROUND,
    PALETTE,
    render_images,
    render_tensor,
    shape_masks,
)
from trl_unigrpo.shapeworld.verifier import (
    image_error,
    images_to_array,
    read_cells,
    score,
    shapeworld_reward,
)
from trl_unigrpo.shapeworld.world import PLACES


# Codes written out by hand: 1 + 5 * color + shape.
RED_CIRCLE, RED_SQUARE, RED_TRIANGLE, RED_RING = 1, 2, 3, 5
GREEN_CIRCLE, BLUE_CIRCLE, BLUE_SQUARE, CYAN_RING = 6, 11, 12, 30


def scene(**objects: int) -> np.ndarray:
    cells = np.zeros(9, dtype=np.int64)
    for place, code in objects.items():
        cells[PLACES.index(place.replace("_", "-"))] = code
    return cells


SCORED = [
    # prompt, scene, checks passed, checks asked
    ("a red circle", scene(center=RED_CIRCLE), 2, 2),
    ("a red circle", scene(), 0, 2),
    ("a red circle", scene(center=GREEN_CIRCLE), 1, 2),  # right number, wrong object
    ("a red circle", scene(center=RED_CIRCLE, top=RED_CIRCLE), 1, 2),  # one too many
    ("a red circle", scene(center=RED_CIRCLE, top=BLUE_SQUARE), 1, 2),
    ("a red circle", scene(center=RED_CIRCLE, top=-1), 1, 2),  # an unreadable cell is something extra
    ("a red circle", scene(center=-1), 1, 2),  # ... and never the object asked for
    ("a circle", scene(right=BLUE_CIRCLE), 2, 2),
    ("a red shape", scene(right=RED_RING), 2, 2),
    ("a red shape", scene(right=CYAN_RING), 1, 2),
    ("a red circle at top-left", scene(top_left=RED_CIRCLE), 3, 3),
    ("a red circle at top-left", scene(top=RED_CIRCLE), 2, 3),
    ("a red circle at top-left", scene(top_left=BLUE_CIRCLE), 1, 3),  # nothing of the kind lies anywhere
    ("a red circle at top-left", scene(top_left=RED_CIRCLE, top=RED_CIRCLE), 1, 3),
    ("a red circle in a corner", scene(bottom_right=RED_CIRCLE), 3, 3),
    ("a red circle in the top row", scene(left=RED_CIRCLE), 2, 3),
    ("a circle and a square", scene(top=RED_CIRCLE, left=BLUE_SQUARE), 3, 3),
    ("a circle and a square", scene(top=RED_CIRCLE), 1, 3),
    ("a circle at top and a square at left", scene(top=RED_CIRCLE, left=BLUE_SQUARE), 5, 5),
    ("a circle at top and a square at left", scene(left=RED_CIRCLE, top=BLUE_SQUARE), 3, 5),
    ("a circle at top and a square", scene(left=RED_CIRCLE, top=BLUE_SQUARE), 3, 4),
    ("three red circles", scene(top=RED_CIRCLE, left=RED_CIRCLE, right=RED_CIRCLE), 3, 3),
    ("three red circles", scene(top=RED_CIRCLE, left=RED_CIRCLE), 1, 3),
    ("three red circles", scene(top=RED_CIRCLE, left=RED_CIRCLE, right=RED_SQUARE), 2, 3),
    ("two red circles", scene(top=RED_CIRCLE, left=RED_CIRCLE, right=RED_CIRCLE), 1, 3),  # one too many
    ("two red circles in the top row", scene(top=RED_CIRCLE, top_left=RED_CIRCLE), 4, 4),
    ("two red circles in the top row", scene(top=RED_CIRCLE, left=RED_CIRCLE), 3, 4),
    ("a red circle and a blue square", scene(top=RED_CIRCLE, left=BLUE_SQUARE), 3, 3),
    ("a red circle and a blue square", scene(top=BLUE_CIRCLE, left=RED_SQUARE), 1, 3),  # colours swapped
    ("two red circles and a blue square", scene(top=RED_CIRCLE, left=RED_CIRCLE, right=BLUE_SQUARE), 4, 4),
    ("two red circles and a blue square", scene(top=RED_CIRCLE, left=BLUE_SQUARE, right=BLUE_SQUARE), 3, 4),
    ("a red circle left of a blue square", scene(left=RED_CIRCLE, top_right=BLUE_SQUARE), 4, 4),
    ("a red circle left of a blue square", scene(top=RED_CIRCLE, bottom=BLUE_SQUARE), 3, 4),  # same column
    ("a red circle left of a blue square", scene(right=RED_CIRCLE, left=BLUE_SQUARE), 3, 4),
    ("a red circle left of a blue square", scene(left=RED_CIRCLE, right=RED_SQUARE), 2, 4),
    ("a red circle right of a blue square", scene(right=RED_CIRCLE, left=BLUE_SQUARE), 4, 4),
    ("a red circle above a blue square", scene(top_right=RED_CIRCLE, left=BLUE_SQUARE), 4, 4),
    ("a red circle above a blue square", scene(top=RED_CIRCLE, top_left=BLUE_SQUARE), 3, 4),
    ("a red circle below a blue square", scene(bottom=RED_CIRCLE, top=BLUE_SQUARE), 4, 4),
    # A second circle on the wrong side spoils the relation and the total.
    ("a red circle left of a blue square", scene(left=RED_CIRCLE, center=BLUE_SQUARE, right=RED_CIRCLE), 2, 4),
    ("two plus one red circles", scene(top=RED_CIRCLE, left=RED_CIRCLE, right=RED_CIRCLE), 3, 3),
    ("a ring in the color of pool", scene(top=CYAN_RING), 2, 2),
    ("a red circle opposite top-left", scene(bottom_right=RED_CIRCLE), 3, 3),
    ("a red circle opposite top-left", scene(top_left=RED_CIRCLE), 2, 3),
]


@pytest.mark.parametrize(("prompt", "cells", "passed", "asked"), SCORED)
def test_scores_by_hand(prompt, cells, passed, asked):
    result = score([parse_prompt(prompt)], cells[None])
    assert result.score[0] == pytest.approx(passed / asked)
    assert result.strict[0] == (passed == asked)


def test_a_batch_scores_like_its_rows():
    result = score([parse_prompt(s[0]) for s in SCORED], np.stack([s[1] for s in SCORED]))
    np.testing.assert_allclose(result.score, [s[2] / s[3] for s in SCORED])


def test_checks_apart():
    prompts = ["two red circles in the top row", "a red circle left of a blue square"]
    cells = np.stack([scene(top=RED_CIRCLE, left=RED_CIRCLE), scene(right=RED_CIRCLE, left=RED_SQUARE)])
    checks = score([parse_prompt(p) for p in prompts], cells).checks
    expected = {
        "present": [1, 0.5],
        "count": [1, np.nan],
        "place": [0, np.nan],
        "relation": [np.nan, 0],
        "total": [1, 1],
    }
    assert set(checks) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(checks[name], values, err_msg=name)


def test_images_read_back_whatever_the_form():
    cells = np.random.default_rng(0).integers(0, 31, (50, 9))
    some_images = render_tensor(cells)
    assert some_images.shape == (50, 3, 48, 48)
    assert some_images.dtype == torch.float32
    assert some_images.min() >= -1
    assert some_images.max() <= 1
    read, error = read_cells(some_images.numpy())
    np.testing.assert_array_equal(read, cells)
    assert error.max() < 1e-9
    images = render_images(cells)
    assert {(image.size, image.mode) for image in images} == {((48, 48), "RGB")}
    np.testing.assert_allclose(images_to_array(images), some_images.numpy(), atol=1 / 255 + 1e-6)
    np.testing.assert_array_equal(read_cells(images_to_array(images))[0], cells)


def test_objects_lie_where_their_place_says():
    pixels = render_tensor(scene(top_right=RED_SQUARE, left=BLUE_CIRCLE))[0].numpy()
    assert pixels[:, 8, 40].tolist() == PALETTE[0].tolist()
    assert pixels[:, 24, 8].tolist() == PALETTE[2].tolist()
    assert pixels[:, 40, 40].tolist() == BACKGROUND.tolist()


def test_shapes_have_their_areas():
    # Areas of the figures in closed form, in pixels; a triangle of height 12 and base 2 * 0.55 * 12.
    areas = [np.pi * 6**2, 10.4**2, 12 * 13.2 / 2, 2 * 13 * 4 - 16, np.pi * (6.8**2 - 3.6**2)]
    np.testing.assert_allclose(shape_masks().sum((1, 2)), areas, rtol=0.04)
    np.testing.assert_allclose(shape_masks(oversample=32).sum((1, 2)), areas, rtol=0.005)


def test_image_error_is_the_mean_squared_distance():
    clean = images_to_array(render_images(np.stack([scene(top=RED_CIRCLE), scene()])))
    shifted = clean.copy()
    shifted[0, :, :16, :16] += 0.1  # one of nine cells, by 0.1 in every channel
    shifted[1] += 0.05
    error = read_cells(shifted)[1].mean(1)
    np.testing.assert_allclose(error, [0.1**2 / 9, 0.05**2], atol=2e-4)
    # Mid-grey against the empty cell: the nearest clean cell is found by trying all 31.
    grey = Image.new("RGB", (48, 48), (128, 128, 128))
    value = 128 / 127.5 - 1
    clean_cells = render_tensor(np.stack([np.full(9, code) for code in range(31)])).numpy()
    distances = ((clean_cells - value) ** 2).mean((1, 2, 3))
    assert image_error([grey])[0] == pytest.approx(distances.min(), rel=1e-5)
    assert image_error(render_images(scene(top=CYAN_RING))).max() < 2e-5


def test_a_cell_too_far_from_all_is_unreadable():
    pixels = render_tensor(np.stack([scene()] * 2)).numpy()
    pixels[0, :, :16, :16] += 0.27  # 0.0729 < 0.08
    pixels[1, :, :16, :16] += 0.30  # 0.09 > 0.08
    assert read_cells(pixels)[0][:, 0].tolist() == [0, -1]


def test_reward_reads_plain_and_conversational_prompts():
    images = render_images(np.stack([s[1].clip(0) for s in SCORED[:4]]))
    conversation = [
        {"role": "user", "content": "a blue square"},
        {"role": "assistant", "content": "here it is"},
        {"role": "user", "content": "a red circle"},
        {"role": "assistant", "content": "<think>"},
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    prompts = ["a red circle", conversation, parts, conversation]
    rewards = shapeworld_reward(prompts=prompts, completions=[""] * 4, images=images, category=["x"] * 4)
    assert rewards == [1.0, 0.0, 0.5, 0.5]
    assert all(type(reward) is float for reward in rewards)
    assert shapeworld_reward(["a red circle"], [""], [images[0].convert("RGBA")]) == [1.0]


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (["a red hexagon"], [Image.new("RGB", (48, 48))], "'a red hexagon' is not a ShapeWorld prompt"),
        (["a red circle"], [Image.new("RGB", (64, 48))], r"images\[0\] is 64 x 48 pixels"),
        (["a red circle"], [None], r"images\[0\] is NoneType"),
        (["a red circle"] * 2, [Image.new("RGB", (48, 48))], "1 images for 2 prompts"),
        ([[{"role": "system", "content": "x"}]], [Image.new("RGB", (48, 48))], "no message of the user"),
    ],
)
def test_reward_refuses(prompts, images, message):
    with pytest.raises(ValueError, match=message):
        shapeworld_reward(prompts, [""] * len(prompts), images)


def test_rendering_refuses_unreadable_cells():
    with pytest.raises(ValueError, match="cell codes go from 0 to 30"):
        render_images(scene(top=-1))


def test_plans_read_back():
    plan = [("red", "circle", "top-left"), ("blue", "square", "center")]
    text = "<think> red circle top-left blue square center </think>"
    assert format_plan(plan) == text
    assert parse_plan(text) == plan
    assert parse_plan("<think> </think>") == []
    assert plan_cells(plan).tolist() == scene(top_left=RED_CIRCLE, center=BLUE_SQUARE).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle top",
        "<think> red circle top",
        "red circle top </think>",
        "<think> red circle </think>",
        "<think> circle red top </think>",
        "<think> red circle top blue square top </think>",
        "<think> red circle top red red red </think>",
        "<think> " + " ".join(f"red circle {place}" for place in PLACES[:6]) + " </think>",
    ],
)
def test_texts_that_are_no_plans(text):
    assert parse_plan(text) is None
    assert score_plans([parse_prompt("a red circle")], [text])[0] == 0


def test_plan_scores_and_faithfulness():
    specs = [parse_prompt("a red circle at top-left")] * 4
    texts = ["<think> red circle top-left </think>", "<think> red circle top </think>", "<think> </think>", "nothing"]
    np.testing.assert_allclose(score_plans(specs, texts), [1, 2 / 3, 0, 0])
    two = "<think> red circle top-left blue square center </think>"
    cells = np.stack(
        [
            scene(top_left=RED_CIRCLE, center=BLUE_SQUARE),
            scene(top_left=RED_CIRCLE, center=BLUE_CIRCLE),
            scene(top_left=RED_CIRCLE, center=BLUE_SQUARE, right=RED_RING),
        ]
    )
    exact, objects = plan_faithfulness([two] * 3, cells)
    assert exact.tolist() == [1, 0, 0]
    assert objects.tolist() == [1, 0.5, 1]
    assert np.isnan(plan_faithfulness(["nothing"], cells[:1])).all()


def test_diversity_in_closed_form():
    same = np.stack([scene(top=RED_CIRCLE)] * 4)
    spread = np.stack([scene(top=RED_CIRCLE), scene(left=BLUE_CIRCLE), scene(right=RED_RING), scene(center=CYAN_RING)])
    collapsed = cell_diversity(same[None])
    assert (collapsed.position_entropy, collapsed.color_entropy, collapsed.distinct_images) == (0, 0, 0.25)
    varied = cell_diversity(spread[None])
    assert varied.position_entropy == pytest.approx(2)  # four places, equally often
    assert varied.color_entropy == pytest.approx(1.5)  # shares 1/2, 1/4, 1/4
    assert varied.distinct_images == 1
    assert cell_diversity(np.stack([same, spread])).position_entropy == pytest.approx(1)
    everywhere = cell_diversity(np.full((1, 1, 9), RED_CIRCLE))
    assert everywhere.position_entropy == pytest.approx(np.log2(9))
    assert cell_diversity(np.full((1, 2, 9), -1)).position_entropy == 0
    with pytest.raises(ValueError, match="cells have shape"):
        cell_diversity(same)
