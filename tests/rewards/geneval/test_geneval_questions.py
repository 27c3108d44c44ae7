"""Questions from GenEval's metadata, by its six tasks."""

import pytest

from trl_unigrpo.rewards.geneval.geneval_questions import questions_from_geneval


def asked(metadata):
    return [(q.text, q.expected, q.parents) for q in questions_from_geneval(metadata)]


def test_single_object():
    metadata = {"tag": "single_object", "include": [{"class": "apple", "count": 1}], "prompt": "a photo of an apple"}
    assert asked(metadata) == [("Is there an apple in the image?", "yes", ())]


def test_two_objects_with_colours():
    metadata = {
        "tag": "color_attr",
        "include": [{"class": "bench", "count": 1, "color": "red"}, {"class": "oven", "color": "blue"}],
    }
    assert asked(metadata) == [
        ("Is there a bench in the image?", "yes", ()),
        ("Is there an oven in the image?", "yes", ()),
        ("Is the bench in the image red?", "yes", (0,)),
        ("Is the oven in the image blue?", "yes", (1,)),
    ]


def test_position_hangs_on_both_objects():
    metadata = {"include": [{"class": "cow", "count": 1}, {"class": "knife", "count": 1, "position": ["left of", 0]}]}
    assert asked(metadata)[-1] == ("Is the knife in the image to the left of the cow?", "yes", (1, 0))


@pytest.mark.parametrize(
    ("exclude", "bounds"),
    [
        ([{"class": "clock", "count": 4}], "exactly 3"),
        ([{"class": "clock", "count": 6}], "at least 3 and less than 6"),
        (None, "at least 3"),
    ],
)
def test_count(exclude, bounds):
    metadata = {"include": [{"class": "clock", "count": 3}], "exclude": exclude}
    assert asked(metadata) == [
        ("Is there a clock in the image?", "yes", ()),
        (f'Is the number of objects of the kind "clock" in the image {bounds}?', "yes", (0,)),
    ]


def test_other_classes_that_are_excluded():
    metadata = {
        "include": [{"class": "cat"}],
        "exclude": [{"class": "dog", "count": 1}, {"class": "bird", "count": 3}],
    }
    assert asked(metadata)[1:] == [
        ("Is there a dog in the image?", "no", ()),
        ('Is the number of objects of the kind "bird" in the image 3 or more?', "no", ()),
    ]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "x"}, r"no object in 'include'.*\(it has: tag\)"),
        ({"include": []}, "no object in 'include'"),
        ({"include": ["cat"]}, "a list of clauses in 'include'"),
        ({"include": {"class": "cat"}}, "a list of clauses in 'include'"),
        ({"include": 3}, "a list of clauses in 'include'"),
        ({"include": [{"count": 1}]}, "expected a 'class'"),
        ({"include": [{"class": "cat", "count": "2"}]}, "count='2' of the class 'cat'"),
        ({"include": [{"class": "cat", "count": 0}]}, "count=0 of the class 'cat'"),
        ({"include": [{"class": "cat", "position": ["left of", 0]}]}, "no other object at place 0"),
        ({"include": [{"class": "cat", "position": ["left of", 2]}]}, "no other object at place 2"),
        ({"include": [{"class": "cat"}, {"class": "dog", "position": ["near", 0]}]}, r"\['near', 0\]"),
        ({"include": [{"class": "cat"}, {"class": "dog", "position": ["left of", "0"]}]}, "store such rows as JSON"),
        ({"include": [{"class": "cat"}, {"class": "dog", "position": ["left of", 0.7]}]}, r"\['left of', 0.7\]"),
        ({"include": [{"class": "cat"}, {"class": "dog", "position": "left of"}]}, "'position': 'left of'"),
        (
            {"include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 2}]},
            "includes 2 of the class 'cat' and excludes 2",
        ),
    ],
)
def test_wrong_metadata_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        questions_from_geneval(metadata)
