"""The pre-training corpus: faultless at rate zero, and each mistake visible when it alone is switched on."""

from dataclasses import fields, replace

import numpy as np
import pytest

from trl_unigrpo.shapeworld.corpus import (
    NO_ERRORS,
    ErrorRates,
    corpus_columns,
    pretraining_corpus,
)
from trl_unigrpo.shapeworld.grammar import parse_prompt, split_of
from trl_unigrpo.shapeworld.plan import parse_plan, plan_cells, score_plans
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.verifier import score
from trl_unigrpo.shapeworld.world import COLORS, PLACES, SHAPES


ROWS = 3000
PLACED = ("place", "region", "one_place", "two_places")


def corpus(rows=ROWS, **rates):
    columns = corpus_columns(rows, seed=1, rates=replace(NO_ERRORS, **rates), no_thinking_share=0.0)
    columns["spec"] = [parse_prompt(prompt) for prompt in columns["prompt"]]
    columns["plan"] = [parse_plan(text) for text in columns["completion"]]
    columns["planned"] = np.stack([plan_cells(plan) for plan in columns["plan"]])
    return columns


def test_without_errors_every_plan_and_image_is_right():
    columns = corpus(10_000)
    assert all(plan is not None for plan in columns["plan"])
    assert score_plans(columns["spec"], columns["completion"]).min() == 1
    assert score(columns["spec"], columns["cells"].astype(int)).score.min() == 1
    np.testing.assert_array_equal(columns["planned"], columns["cells"])


# Mistakes of the plan: field, the families it can strike, and what a spoilt plan looks like.
PLAN_ERRORS = {
    "swapped_sides": (("colored", "shapes"), "position", lambda s, p: kinds(s) == planned_kinds(s, p)),
    "swapped_colors": (("pair", "triple"), "color_attr", lambda s, p: len(p) == s.num_objects),
    "forgotten_second": (None, "two_object", lambda s, p: len(p) == 1 and p[0][1] == (s.groups[0].shape or p[0][1])),
    "misplaced": (PLACED, None, lambda s, p: kinds(s) == planned_kinds(s, p)),
    "wrong_shape": (None, "single_object", lambda s, p: len(p) == 1),
    "wrong_thing_color": (
        ("color_of", "colored_pair", "colored_feature"),
        "reasoning",
        lambda s, p: p[0][0] != s.groups[0].color and p[0][1] == s.groups[0].shape,
    ),
    "wrong_feature_shape": (
        ("feature", "colored_feature"),
        "reasoning",
        lambda s, p: p[0][1] != s.groups[0].shape and p[0][0] == s.groups[0].color,
    ),
    "not_opposite": (
        ("opposite",),
        "reasoning",
        lambda s, p: PLACES.index(p[0][2]) == 8 - s.groups[0].cells[0] and kinds(s) == planned_kinds(s, p),
    ),
}


def kinds(spec):
    """List colour and shape, object by object."""
    return [(g.color, g.shape) for g in spec.groups for _ in range(g.count)]


def planned_kinds(spec, plan):
    """The planned colours and shapes, with those left open by the prompt blanked."""
    if len(plan) != spec.num_objects:
        return None
    return [(c and p[0], s and p[1]) for (c, s), p in zip(kinds(spec), plan, strict=True)]


@pytest.mark.parametrize("name", PLAN_ERRORS)
def test_plan_error(name):
    families, category, looks = PLAN_ERRORS[name]
    columns = corpus(12_000, **{name: 1.0})
    right = score_plans(columns["spec"], columns["completion"]) == 1
    struck = np.array(
        [
            (category is None or spec.category == category) and (families is None or spec.family in families)
            for spec in columns["spec"]
        ]
    )
    assert right[~struck].all()
    # A swap that changes nothing, or a wrong shape where any would do, is the only way to stay right.
    harmless = {"swapped_colors": 0.25, "wrong_shape": 0.25}.get(name, 0.0)
    assert struck.sum() > 40
    assert right[struck].mean() <= harmless
    for spec, plan, good in zip(columns["spec"], columns["plan"], right, strict=True):
        if not good:
            assert looks(spec, plan), (name, spec, plan)
    np.testing.assert_array_equal(columns["planned"], columns["cells"])


def test_swapped_colors_are_the_prompts_own():
    columns = corpus(swapped_colors=1.0)
    for spec, plan in zip(columns["spec"], columns["plan"], strict=True):
        if spec.category == "color_attr":
            first, second = spec.groups[:2]
            assert [p[:2] for p in plan[:2]] == [(second.color, first.shape), (first.color, second.shape)]


def is_sum(spec):
    return spec.family in ("arithmetic", "arithmetic_groups")


def counted(spec):
    return spec.category in ("counting", "groups") or is_sum(spec)


def test_miscounts():
    columns = corpus(12_000, miscount=(0.2, 0.4, 0.6, 0.8))
    right = score_plans(columns["spec"], columns["completion"]) == 1
    number = np.array([spec.num_objects for spec in columns["spec"]])
    counts = np.array([counted(spec) for spec in columns["spec"]])
    assert right[~counts].all()
    for objects, rate in zip(range(2, 6), (0.2, 0.4, 0.6, 0.8), strict=True):
        assert 1 - right[counts & (number == objects)].mean() == pytest.approx(rate, abs=0.06)
    planned = np.array([len(plan) for plan in columns["plan"]])
    assert set(np.unique(planned[~right] - number[~right])) == {-1, 1}
    assert planned.max() == 5
    too_many = (planned > number)[~right & (number < 5)].mean()
    assert too_many == pytest.approx(0.3, abs=0.06)


def test_sums_are_miscounted_more_often():
    columns = corpus(12_000, miscount_sum=1.0)
    right = score_plans(columns["spec"], columns["completion"]) == 1
    sums = np.array([is_sum(spec) for spec in columns["spec"]])
    assert right[~sums].all()
    assert not right[sums].any()


PAINTER_ERRORS = {
    "triangle_as_square": lambda planned: planned[1] == "triangle",
    "ring_as_circle": lambda planned: planned[1] == "ring",
    "yellow_as_green": lambda planned: planned[0] == "yellow",
}
PAINTED = {
    "triangle_as_square": (None, "square"),
    "ring_as_circle": (None, "circle"),
    "yellow_as_green": ("green", None),
}


@pytest.mark.parametrize("name", PAINTER_ERRORS)
def test_painter_mistakes_one_kind_for_another(name):
    columns = corpus(**{name: 1.0})
    assert score_plans(columns["spec"], columns["completion"]).min() == 1
    color, shape = PAINTED[name]
    struck = 0
    for plan, cells in zip(columns["plan"], columns["cells"], strict=True):
        for planned in plan:
            painted = int(cells[PLACES.index(planned[2])]) - 1
            seen = (COLORS[painted // 5], SHAPES[painted % 5])
            if PAINTER_ERRORS[name](planned):
                assert seen == (color or planned[0], shape or planned[1])
                struck += 1
            else:
                assert seen == planned[:2]
    assert struck > 300


def test_random_colors():
    columns = corpus(random_color=0.6)
    there = columns["planned"] > 0
    planned, painted = columns["planned"][there] - 1, columns["cells"][there].astype(int) - 1
    np.testing.assert_array_equal(planned % 5, painted % 5)
    assert (planned // 5 != painted // 5).mean() == pytest.approx(0.6 * 5 / 6, abs=0.03)
    assert not columns["cells"][~there].any()


def test_dropped_objects():
    columns = corpus(dropped=0.5)
    planned, painted = columns["planned"], columns["cells"].astype(int)
    single = (planned > 0).sum(1) == 1
    np.testing.assert_array_equal(planned[single], painted[single])
    lost = (planned > 0) & (painted == 0)
    assert lost[~single].sum() / (planned[~single] > 0).sum() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(planned[~lost], painted[~lost])


def test_extra_objects():
    columns = corpus(extra=0.5)
    planned, painted = columns["planned"], columns["cells"].astype(int)
    added = (planned == 0) & (painted > 0)
    assert set(np.unique(added.sum(1))) == {0, 1}
    assert added.sum(1).mean() == pytest.approx(0.5, abs=0.04)
    np.testing.assert_array_equal(planned[~added], painted[~added])


def test_every_rate_has_a_test():
    tested = {*PLAN_ERRORS, *PAINTER_ERRORS, "miscount", "miscount_sum", "random_color", "dropped", "extra"}
    assert {field.name for field in fields(ErrorRates)} == tested


def test_scaling():
    rates = ErrorRates().scaled(plan=2.0, painter=0.5)
    assert rates.swapped_sides == pytest.approx(0.72)
    assert rates.dropped == pytest.approx(0.0288)
    assert rates.miscount == pytest.approx((0.32, 0.56, 0.72, 0.8))
    assert ErrorRates().scaled(plan=100).swapped_sides == 1
    assert NO_ERRORS.miscount == (0, 0, 0, 0)
    assert NO_ERRORS.extra == 0


def test_default_corpus_is_wrong_as_often_as_it_should_be():
    columns = corpus_columns(10_000, seed=0, no_thinking_share=0.0)
    specs = [parse_prompt(prompt) for prompt in columns["prompt"]]
    assert score_plans(specs, columns["completion"]).mean() == pytest.approx(0.845, abs=0.015)
    assert score(specs, columns["cells"].astype(int)).score.mean() == pytest.approx(0.680, abs=0.015)


def test_places_are_drawn_evenly():
    columns = corpus(12_000)
    free = np.array([spec.category in ("color_attr", "groups") for spec in columns["spec"]])
    share = (columns["cells"][free] > 0).mean(0)
    np.testing.assert_allclose(share / share.sum(), np.full(9, 1 / 9), atol=0.01)


def test_seed_fixes_everything():
    one, same, other = corpus_columns(200, seed=5), corpus_columns(200, seed=5), corpus_columns(200, seed=6)
    assert one["prompt"] == same["prompt"]
    assert one["completion"] == same["completion"]
    np.testing.assert_array_equal(one["cells"], same["cells"])
    assert one["prompt"] != other["prompt"]


def test_dataset_draws_images_when_read():
    data = pretraining_corpus(400, seed=2, no_thinking_share=0.5)
    columns = corpus_columns(400, seed=2, no_thinking_share=0.5)
    rows = data[:]
    assert set(rows) == {"prompt", "completion", "category", "image"}
    assert rows["prompt"] == columns["prompt"]
    assert rows["completion"] == columns["completion"]
    for image, expected in zip(rows["image"], render_images(columns["cells"]), strict=True):
        assert image.tobytes() == expected.tobytes()
    empty = np.mean([text == "" for text in rows["completion"]])
    assert empty == pytest.approx(0.5, abs=0.08)
    assert {split_of(parse_prompt(prompt)) for prompt in rows["prompt"]} == {"train"}
    assert data[3]["image"].size == (48, 48)
