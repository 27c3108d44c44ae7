"""The words between two rounds, and the answer that keeps an image."""

import pytest

from trl_unigrpo.sampling.reflection import TEMPLATE, check_template, reflection, stops


@pytest.mark.parametrize(
    ("text", "stopped"),
    [
        ("<think> all is well </think> keep", True),
        ("all is well </think> keep", True),  # its opening was not sampled
        ("<think></think>\n  Keep. ", True),
        (" keep", True),  # without a thinking
        ("<think> a </think> keep the cat", False),
        ("keep the cat", False),
        ("<think> a </think> keeper", False),
        ("<think> keep </think> paint the cat red", False),
        ("<think> a </think>", False),
        ("<think> a keep", False),
        ("<think> a </think> <think> b </think> keep", False),
        ("<think> a </think> keep </think> keep", False),
        ("well <think> a </think> keep", False),
        ("", False),
    ],
)
def test_only_a_whole_answer_of_the_right_form_stops(text, stopped):
    assert stops(text, "keep") == stopped


def test_stop_text_of_several_words():
    assert stops("<think> a </think> No further  edit!", "no further edit")
    assert not stops("<think> a </think> no further edit is needed", "no further edit")


def test_template_is_filled_in():
    asked = reflection(TEMPLATE, "a {red} cat", 2, "keep")
    assert "a {red} cat" in asked
    assert asked.endswith("the answer: keep.")
    assert "keep" not in reflection(TEMPLATE, "a cat", 2, None)
    assert reflection("{round}: {prompt}", "a cat", 3, None) == "3: a cat"


@pytest.mark.parametrize("template", ["{prompt} {image}", "{prompt", "{}"])
def test_template_of_other_fields_is_refused(template):
    with pytest.raises(ValueError, match="reflection_template"):
        check_template(template)
    check_template(TEMPLATE)
