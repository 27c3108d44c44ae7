"""Questions asked one by one, against answers that a person reads off a grid of cells."""

import numpy as np
import pytest

from trl_unigrpo.shapeworld.grammar import all_prompts, parse_prompt
from trl_unigrpo.shapeworld.question_points import points, question_points, questions
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.verifier import score
from trl_unigrpo.shapeworld.world import UNREADABLE, cell_code


def grid(**objects):
    """Cells from places, as in `c4="red circle"`."""
    cells = np.zeros(9, dtype=np.int64)
    for place, what in objects.items():
        cells[int(place[1])] = UNREADABLE if what == "unreadable" else cell_code(*what.split())
    return cells


def answers(prompt, **objects):
    return {text: answer(grid(**objects)) for text, answer in questions(parse_prompt(prompt)).items()}


def test_colour_shape_and_number_are_asked_apart():
    prompt = "two red circles"
    assert answers(prompt, c0="red circle", c3="red square", c4="unreadable") == {
        "at least one red shape?": True,
        "at least one circle?": True,
        "at least one red circle?": True,
        "at least two red circle?": False,
        "exactly two red circle?": False,
        "two in all?": False,  # what can't be read is there all the same
    }
    assert set(answers(prompt, c0="red circle", c3="red circle").values()) == {True}
    assert list(answers(prompt, c0="blue circle").values()) == [False, True, False, False, False, False]
    assert list(answers(prompt, **{f"c{i}": "red circle" for i in range(3)}).values()) == [True] * 4 + [False] * 2


def test_places_and_relations():
    assert answers("two crosses in the top row", c0="red cross", c8="blue cross") == {
        "at least one cross?": True,
        "at least two cross?": True,
        "exactly two cross?": True,
        "a cross in its place?": True,
        "every cross in its place?": False,
        "two in all?": True,
    }
    assert not answers("two crosses in the top row")["every cross in its place?"], "nothing is nowhere"
    question = "a red circle left of a blue square?"
    prompt = "a red circle left of a blue square"
    assert answers(prompt, c0="red circle", c2="blue square")[question]
    assert not answers(prompt, c2="red circle", c0="blue square")[question]
    assert not answers(prompt, c0="red circle", c3="blue square")[question], "below, not left"


def test_points_are_the_share_of_yes():
    specs = [parse_prompt("a red circle"), parse_prompt("a triangle and a ring")]
    # Of a red circle: red, a circle, both, exactly one, one in all. Of the pair: at least and exactly one, twice; two.
    cells = np.stack([grid(c4="blue circle"), grid(c0="red triangle", c1="red triangle")])
    assert points(specs, cells) == pytest.approx([2 / 5, 2 / 5])


def test_what_the_rule_calls_perfect_answers_every_question_and_the_other_way_round():
    """Two scores of the same prompts: both are full for the same images, and only for these."""
    rng = np.random.default_rng(0)
    texts = [str(text) for text in rng.choice(list(all_prompts()), 3000, replace=False)]
    specs = [parse_prompt(text) for text in texts]
    cells = np.zeros((len(specs), 9), dtype=np.int64)
    for row, spec in enumerate(specs):  # what was asked for, by chance in the right places
        free = list(rng.permutation(9))
        for group in spec.groups:
            for _ in range(group.count):
                color, shape = group.color or rng.choice(["red", "blue"]), group.shape or rng.choice(["ring", "cross"])
                cells[row, free.pop()] = cell_code(str(color), str(shape))
    found, rule = points(specs, cells), score(specs, cells)
    assert 0.3 < rule.strict.mean() < 0.99
    assert ((found == 1) == (rule.strict == 1)).all()


def test_images_are_read():
    images = render_images(np.stack([grid(c4="red circle"), grid(c4="blue circle")]))
    assert question_points(["a red circle"] * 2, images) == pytest.approx([1, 2 / 5])
