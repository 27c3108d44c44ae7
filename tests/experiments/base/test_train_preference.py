"""The annotator of ShapeWorld's learned reward, its training, and how often the shipped one is right."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_model

from trl_unigrpo.experiments.base.train_preference import (
    MISTAKES,
    PaintedGroups,
    annotate,
    build_preference,
    judge_all,
    opinion,
    paint_groups,
    pair_accuracy,
    train_preference,
)
from trl_unigrpo.shapeworld import load_base
from trl_unigrpo.shapeworld.preference import PreferenceModel, load_preference_model, word_ids
from trl_unigrpo.shapeworld.render import render_tensor


NAN = float("nan")


def test_the_annotator_looks_at_positions_least():
    checks = {"present": [[1.0, 0.5]], "place": [[0.0, 1.0]], "relation": [[NAN, NAN]]}
    worth = opinion({name: np.array(values) for name, values in checks.items()})
    assert worth == pytest.approx(np.array([[1 / 1.25, 0.75 / 1.25]]))


def test_the_annotator_errs_now_and_then_and_says_nothing_of_equals():
    rng = np.random.default_rng(0)
    checks = {"present": rng.integers(0, 3, (4000, 3)) / 2, "total": rng.integers(0, 2, (4000, 3)) * 1.0}
    first_wins, told = (x.numpy() for x in annotate(checks, seed=1))
    worth = (checks["present"] + 0.5 * checks["total"]) / 1.5
    for pair, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        assert (told[:, pair] == ~np.isclose(worth[:, a], worth[:, b])).all()
        wrong = (first_wins[:, pair] != (worth[:, a] > worth[:, b]))[told[:, pair]]
        assert wrong.mean() == pytest.approx(MISTAKES, abs=0.015)


def test_accuracy_counts_pairs_that_the_rule_tells_apart():
    checks = {"present": np.array([[1.0, 1.0, 0.0]]), "count": np.array([[1.0, 0.0, 0.0]])}
    groups = PaintedGroups(torch.zeros(1, 12), torch.zeros(1, 3, 3, 48, 48), (sum(checks.values())) / 2, checks)
    found = pair_accuracy(np.array([[0.3, 0.7, 0.5]]), groups)  # right of the three: the last
    assert found == {"all": (pytest.approx(1 / 3), 3), "present": (1.0, 1), "count": (0.0, 1)}
    assert pair_accuracy(np.array([[3.0, 2.0, 1.0]]), groups)["all"] == (1.0, 3)


def drawings(number):
    """Groups of three drawings each for "a red circle": right, empty, and of another object."""
    cells = np.zeros((3, 9), dtype=int)
    cells[0, 4], cells[2, 4] = 1, 8
    pixels = ((render_tensor(cells) + 1) * 127.5).round().to(torch.uint8)
    checks = {"present": np.tile([1.0, 0.0, 0.0], (number, 1)), "total": np.tile([1.0, 0.0, 1.0], (number, 1))}
    words = word_ids(["a red circle"]).expand(number, -1)
    return PaintedGroups(words, pixels.expand(number, -1, -1, -1, -1), sum(checks.values()) / 2, checks)


def test_training_finds_the_odds_of_the_annotator():
    """
    Of one question asked again and again, the model ends where Bradley and Terry's likelihood is highest. With answers
    s, 0 and -s, and one in ten wrong of each pair, its slope is 0 where sigmoid(s) + sigmoid(2 s) = 1.8.
    """
    groups = drawings(400)
    answers = judge_all(train_preference(groups, steps=60, learning_rate=3e-3, show_progress=False), groups)
    assert answers[0].mean() == pytest.approx(0, abs=1e-5)
    right, empty, other = answers[0]
    s = 1.634
    assert 1 / (1 + np.exp(-s)) + 1 / (1 + np.exp(-2 * s)) == pytest.approx(1.8, abs=1e-3)
    assert (right - other, other - empty) == (pytest.approx(s, abs=0.3), pytest.approx(s, abs=0.3))


def test_the_shipped_reward_is_useful_and_can_be_misled():
    base, tokenizer = load_base()
    groups = paint_groups(base, tokenizer, 105, "validation", seed=3)
    found = pair_accuracy(judge_all(load_preference_model(torch.device("cpu")), groups), groups)
    assert 0.80 <= found["all"][0] <= 0.95  # .895 of ten times as many prompts
    assert found["place"][0] < 0.7 < 0.8 < found["present"][0]


@pytest.mark.slow
def test_what_is_built_loads_again(tmp_path):
    file = tmp_path / "new" / "preference.safetensors"
    found = build_preference(file, num_prompts=70, num_held_out=35, steps=20)
    assert 0.3 < found["all"][0] < 0.8
    assert load_model(PreferenceModel(), file) == (set(), [])
