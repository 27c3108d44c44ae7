"""Second looks: their words, the nearest right scene, and the score of a diagnosis, by hand."""

import numpy as np
import pytest

from tests.shapeworld.test_edits import scene
from trl_unigrpo.shapeworld import shapeworld_diagnosis_reward
from trl_unigrpo.shapeworld.edits import draw_scene
from trl_unigrpo.shapeworld.grammar import all_prompts, parse_prompt
from trl_unigrpo.shapeworld.reflection import (
    REFLECTION_TEMPLATE,
    Reflection,
    closest_scene,
    diagnosis_f1,
    parse_reflection,
)
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer
from trl_unigrpo.shapeworld.verifier import score
from trl_unigrpo.shapeworld.world import UNREADABLE, cell_code


LOOK = "<think> green circle left unclear top </think> left red circle top empty"


def test_a_reflection_is_read_as_it_is_written():
    look = parse_reflection(LOOK)
    assert look == Reflection({3: cell_code("green", "circle"), 1: UNREADABLE}, {3: cell_code("red", "circle"), 1: 0})
    assert look.text == LOOK
    for kept in ("keep", "<think> red circle left </think> keep"):
        assert parse_reflection(kept).text == kept
        assert not parse_reflection(kept).fixes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keep keep",
        "keep it",
        "<think> </think>",
        "<think> red left </think> left red circle",
        "<think> left red circle </think> left red circle",
        "<think> red circle left left red circle",
        "red circle left </think> left red circle",
        "<think> red circle left </think> left red circle left empty",
        "<think> red circle left green circle left </think> keep",
        "<think> red circle left </think> keep left empty",
        "<think> red circle top-leftmost </think> keep",
        "<think> red circle",
        "<think> red circle left </think> left",
    ],
)
def test_other_texts_are_no_reflections(text):
    assert parse_reflection(text) is None


@pytest.mark.parametrize(
    "prompt, before, after",
    [
        ("a red circle", scene(left="green circle"), scene(left="red circle")),
        ("a red circle at top", scene(left="red circle"), scene(top="red circle")),
        ("two red circles", scene(left="red circle", top="blue ring"), scene(left="red circle", top="red circle")),
        # Of the two, the circle is nearer; what the prompt leaves open is kept.
        ("a circle", scene(left="pink circle", top="blue ring"), scene(left="pink circle")),
        ("a circle", scene(top="blue ring"), scene(top="blue circle")),
        # Both would be changed; the square has the colour already.
        ("a red circle", scene(top_left="red square", right="blue ring"), scene(top_left="red circle")),
    ],
)
def test_the_nearest_right_scene_by_hand(prompt, before, after):
    assert (closest_scene(parse_prompt(prompt), before) == after).all()


def test_the_nearest_right_scene_is_right_and_near():
    rng = np.random.default_rng(0)
    prompts = list(all_prompts().values())
    specs = [prompts[i] for i in rng.choice(len(prompts), 400)]
    cells = np.stack([draw_scene(rng, 0, 5) for _ in specs])
    targets = np.stack([closest_scene(*row) for row in zip(specs, cells, strict=True)])
    assert score(specs, targets).strict.all()
    assert all((closest_scene(*row) == row[1]).all() for row in zip(specs, targets, strict=True))
    # One wrong cell is never mended by more than one.
    for spec, target in zip(specs, targets, strict=True):
        wrong = target.copy()
        wrong[rng.integers(9)] = rng.integers(0, 31)
        assert (closest_scene(spec, wrong) != wrong).sum() <= 1


def test_f1_by_hand():
    spec = parse_prompt("a red circle and a blue square")
    cells = scene(left="green circle", top="blue ring", right="red cross")  # the cross is too many
    named = {
        "left red circle top blue square right empty": 1.0,
        "left red circle": 2 * 1 / (1 + 3),
        "left green circle": 0.0,  # this is there already
        "left red circle bottom red circle": 2 * 1 / (2 + 3),
    }
    for fixes, expected in named.items():
        assert diagnosis_f1(spec, cells, f"<think> green circle left </think> {fixes}") == pytest.approx(expected)
    assert diagnosis_f1(spec, cells, "keep") == 0.0
    assert diagnosis_f1(spec, closest_scene(spec, cells), "keep") == 1.0
    assert diagnosis_f1(spec, cells, "left") == 0.0


def test_any_of_several_repairs_counts():
    three, spec = scene(left="red circle", top="red circle", right="red circle"), parse_prompt("two red circles")
    for place in ("left", "top", "right"):
        assert diagnosis_f1(spec, three, f"<think> red circle {place} </think> {place} empty") == 1.0


def test_the_diagnosis_reward_reads_the_image_before():
    green, red = render_images(np.stack([scene(left="green circle"), scene(left="red circle")]))
    said = "<think> green circle left </think> left red circle"
    completions = [[{"role": "assistant", "content": said}], said.replace("red", "blue"), said]
    seen = [[red, green], [red], []]
    rewards = shapeworld_diagnosis_reward(["a red circle"] * 3, completions, previous_images=seen)
    assert rewards == [1.0, 0.0, None]
    assert shapeworld_diagnosis_reward.every_round


def test_words_are_in_the_vocabulary():
    tokenizer = shapeworld_tokenizer(seeing=True)
    for text in (LOOK, "keep", REFLECTION_TEMPLATE.format(prompt="a red circle")):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
