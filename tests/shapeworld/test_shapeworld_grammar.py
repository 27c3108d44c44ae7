"""The grammar: what prompts mean, that none means two things, the splits and their sizes."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from trl_unigrpo.shapeworld.dataset import shapeworld_dataset
from trl_unigrpo.shapeworld.grammar import (
    CATEGORIES,
    FAMILIES,
    SPLITS,
    all_prompts,
    parse_prompt,
    prompts_by_split,
    sampling_weights,
    split_of,
)
from trl_unigrpo.shapeworld.world import (
    COLORS,
    MAX_GROUPS,
    MAX_OBJECTS,
    MAX_PROMPT_WORDS,
    SHAPES,
    WORDS,
    ObjectGroup,
    PromptSpec,
    cell_code,
    cell_colors,
    cell_shapes,
    encode_specs,
)


G = ObjectGroup
MEANINGS = {
    "a circle": ([G(1, None, "circle")], None),
    "a red shape": ([G(1, "red")], None),
    "a pink ring at bottom-left": ([G(1, "pink", "ring", (6,))], None),
    "a pink ring in the right column": ([G(1, "pink", "ring", (2, 5, 8))], None),
    "a red shape and a cyan shape": ([G(1, "red"), G(1, "cyan")], None),
    "a circle and a green cross": ([G(1, None, "circle"), G(1, "green", "cross")], None),
    "a circle at top and a square": ([G(1, None, "circle", (1,)), G(1, None, "square")], None),
    "a circle and a square at right": ([G(1, None, "circle"), G(1, None, "square", (5,))], None),
    "a circle at center and a square at left": ([G(1, None, "circle", (4,)), G(1, None, "square", (3,))], None),
    "five blue triangles": ([G(5, "blue", "triangle")], None),
    "five red crosses": ([G(5, "red", "cross")], None),
    "two blue shapes in the middle row": ([G(2, "blue", None, (3, 4, 5))], None),
    "four rings in the corners": ([G(4, None, "ring", (0, 2, 6, 8))], None),
    "a red circle and a red square": ([G(1, "red", "circle"), G(1, "red", "square")], None),
    "a red ring and a pink cross and a cyan circle": (
        [G(1, "red", "ring"), G(1, "pink", "cross"), G(1, "cyan", "circle")],
        None,
    ),
    "three red circles and a blue square": ([G(3, "red", "circle"), G(1, "blue", "square")], None),
    "a red circle right of a blue square": ([G(1, "red", "circle"), G(1, "blue", "square")], "right of"),
    "a circle above a square": ([G(1, None, "circle"), G(1, None, "square")], "above"),
    "two plus one red circles": ([G(3, "red", "circle")], None),
    "five minus one red circles": ([G(4, "red", "circle")], None),
    "two plus two red circles and a blue ring": ([G(4, "red", "circle"), G(1, "blue", "ring")], None),
    "a ring in the color of grass": ([G(1, "green", "ring")], None),
    "a yellow shape with twelve sides": ([G(1, "yellow", "cross")], None),
    "a pig colored shape with a hole": ([G(1, "pink", "ring")], None),
    "a sea colored circle and a red cross": ([G(1, "blue", "circle"), G(1, "red", "cross")], None),
    "a red circle opposite top-left": ([G(1, "red", "circle", (8,))], None),
    "a red circle opposite right": ([G(1, "red", "circle", (3,))], None),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_prompt_means_what_it_says(text):
    groups, relation = MEANINGS[text]
    spec = parse_prompt(text)
    assert spec.groups == tuple(groups)
    assert spec.relation == relation
    assert parse_prompt(f"  {text.replace(' ', '   ')} ") == spec


@pytest.mark.parametrize("text", ["three shapes", "a red hexagon", "", "six red circles", "a red circle and", "red"])
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(ValueError, match="is not a ShapeWorld prompt") as error:
        parse_prompt(text)
    assert repr(text) in str(error.value)
    if "hexagon" in text:
        assert "unknown words: 'hexagon'" in str(error.value)


PLURALS = ("circles", "squares", "triangles", "crosses", "rings")


def read_back(text: str) -> tuple[str, ...] | None:
    """A second, independent reading of the plain noun phrases: the (count, color, shape) of every "and" part."""
    numbers = {"a": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    parts = []
    for part in text.split(" and "):
        words = part.split()
        if words[0] not in numbers or not set(words[1:]) <= {*COLORS, *SHAPES, *PLURALS, "shape", "shapes"}:
            return None
        color = next((w for w in words if w in COLORS), None)
        shape = next((s for s, plural in zip(SHAPES, PLURALS, strict=True) if s in words or plural in words), None)
        parts.append(f"{numbers[words[0]]} {color} {shape}")
    return tuple(parts)


def test_every_plain_prompt_reads_back():
    checked = 0
    for text, spec in all_prompts().items():
        plain = read_back(text)
        if plain is not None:
            assert plain == tuple(f"{g.count} {g.color} {g.shape}" for g in spec.groups), text
            assert all(g.cells is None for g in spec.groups), text
            assert spec.relation is None, text
            checked += 1
    assert checked > 12_000


def test_prompts_stay_within_the_limits():
    prompts = all_prompts()
    assert len(prompts) >= 9_000
    words = {word for text in prompts for word in text.split()}
    assert words | {"<think>", "</think>"} == set(WORDS)
    assert len(WORDS) <= 90
    for text, spec in prompts.items():
        assert len(text.split()) <= MAX_PROMPT_WORDS
        assert 1 <= spec.num_objects <= MAX_OBJECTS
        assert len(spec.groups) <= MAX_GROUPS
        assert spec.category in FAMILIES
        assert spec.family in FAMILIES[spec.category]
        assert all(g.cells is None or g.count <= len(g.cells) for g in spec.groups)
    assert {(s.category, s.family) for s in prompts.values()} == {(c, f) for c, fs in FAMILIES.items() for f in fs}
    assert all(sum(families.values()) == pytest.approx(1) for families in FAMILIES.values())


def test_no_object_belongs_to_two_groups():
    for text, spec in all_prompts().items():
        for i, one in enumerate(spec.groups):
            for other in spec.groups[:i]:
                apart = any(a and b and a != b for a, b in ((one.color, other.color), (one.shape, other.shape)))
                assert apart, text


def test_splits_share_no_meaning():
    splits = prompts_by_split()
    contents = {split: {spec.content for spec in prompts.values()} for split, prompts in splits.items()}
    assert sum(map(len, splits.values())) == len(all_prompts())
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not contents[one] & contents[other]
    shares = np.array([len(contents[split]) for split in SPLITS]) / sum(map(len, contents.values()))
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.02)


def test_every_category_is_large_enough():
    test = prompts_by_split()["test"]
    texts, meanings = Counter(s.category for s in test.values()), {}
    for spec in test.values():
        meanings.setdefault(spec.category, set()).add(spec.content)
    for category in CATEGORIES:
        assert texts[category] >= 140, category
        assert len(meanings[category]) >= 140, category


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red circle and a blue square", "a blue square and a red circle"),
        ("a red circle left of a blue square", "a blue square right of a red circle"),
        ("a red circle above a blue square", "a blue square below a red circle"),
        ("two plus one red circles", "three red circles"),
        ("five minus two red circles", "one plus two red circles"),
        ("a red circle opposite top", "a red circle at bottom"),
        ("a ring in the color of frog", "a green ring"),
    ],
)
def test_same_meaning_same_split(one, other):
    assert parse_prompt(one).content == parse_prompt(other).content
    assert split_of(parse_prompt(one)) == split_of(parse_prompt(other))


def test_other_meaning_other_content():
    texts = [
        "a red circle and a blue square",
        "a red circle left of a blue square",
        "a red circle above a blue square",
    ]
    texts += ["a blue square left of a red circle", "a red circle at top", "a red circle in the top row"]
    assert len({parse_prompt(text).content for text in texts}) == len(texts)


def test_split_is_fixed_for_ever():
    # Shipped weights were trained on the train split: a change here would leak test prompts into it.
    assert split_of(parse_prompt("a red circle")) == "validation"
    assert split_of(parse_prompt("two blue rings")) == "train"
    assert split_of(parse_prompt("five pink squares")) == "test"
    digest = hashlib.sha256("\n".join(sorted(prompts_by_split()["test"])).encode()).hexdigest()
    assert digest == "4507590f03cf77d2716766d7516ee95c4b4404496944bad039df3e1588e5588a"


def test_specs_become_arrays():
    spec = PromptSpec("x", "y", (G(2, "green", None, (0, 4)), G(1, None, "ring")), "above")
    arrays = encode_specs([spec])
    assert arrays.count.tolist() == [[2, 1, 0]]
    assert arrays.color[0, :2].tolist() == [1, -1]
    assert arrays.shape[0, :2].tolist() == [-1, 4]
    assert np.flatnonzero(arrays.region[0, 0]).tolist() == [0, 4]
    assert arrays.region[0, 1].all()
    assert arrays.relation.tolist() == [2]


def test_cell_codes():
    assert [cell_code("red", "circle"), cell_code("green", "circle"), cell_code("cyan", "ring")] == [1, 6, 30]
    codes = np.array([-1, 0, 1, 8, 30])
    assert cell_colors(codes).tolist() == [-1, -1, 0, 1, 5]
    assert cell_shapes(codes).tolist() == [-1, -1, 0, 2, 4]


def test_sampling_weights_follow_the_shares():
    specs = list(prompts_by_split()["train"].values())
    weights = np.array(sampling_weights(specs))
    assert weights.sum() == pytest.approx(1)
    for category in CATEGORIES:
        assert weights[[s.category == category for s in specs]].sum() == pytest.approx(1 / 7)
    triple = weights[[s.family == "triple" for s in specs]]
    assert triple.sum() == pytest.approx(0.3 / 7)
    assert np.ptp(triple) == 0


def test_dataset_is_balanced_seeded_and_distinct():
    data = shapeworld_dataset("test", 701, seed=3)
    assert data.column_names == ["prompt", "category"]
    assert all(parse_prompt(row["prompt"]).category == row["category"] for row in data)
    assert {split_of(parse_prompt(prompt)) for prompt in data["prompt"]} == {"test"}
    counts = Counter(data["category"])
    assert set(counts) == set(CATEGORIES)
    assert max(counts.values()) - min(counts.values()) == 1
    assert len(set(data["prompt"])) == 701
    assert shapeworld_dataset("test", 701, seed=3)["prompt"] == data["prompt"]
    assert set(shapeworld_dataset("test", 701, seed=4)["prompt"]) != set(data["prompt"])
    assert len(set(data["category"][:50])) > 4  # not category by category


def test_dataset_repeats_only_when_a_category_is_exhausted():
    counts = Counter(shapeworld_dataset("validation", 1400)["prompt"])
    by_category: dict[str, list[int]] = {}
    for prompt, count in counts.items():
        by_category.setdefault(parse_prompt(prompt).category, []).append(count)
    assert all(sum(c) == 200 and max(c) - min(c) <= 1 for c in by_category.values())


def test_whole_split():
    data = shapeworld_dataset("validation")
    assert sorted(data["prompt"]) == sorted(prompts_by_split()["validation"])


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"split": "dev"}, "split='dev'"), ({"num_prompts": 0}, "num_prompts=0")]
)
def test_dataset_refuses_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        shapeworld_dataset(**kwargs)
