"""Words of a text that was read back: which tokens they are of, and what each is worth."""

import json

import pytest

from trl_unigrpo.rewards.readback.reading import Reading
from trl_unigrpo.rewards.readback.words import Word, logged_reading, read_words, reading_columns


def words(tokens, log_probs=None):
    log_probs = [-float(place) for place in range(1, len(tokens) + 1)] if log_probs is None else log_probs
    return [(word.text, word.log_prob) for word in read_words(Reading(tokens, log_probs))]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["a", " red", " cat"], [("a", None), (" red", -2), (" cat", -3)]),
        (["un", "usual", " c", "at", "s"], [("unusual", -2), (" cats", -12)]),  # the first token counts nothing
        ([" ball", ",", " on"], [(" ball", None), (",", -2), (" on", -3)]),
        (["blue", "-", "green"], [("blue", None), ("-", -2), ("green", -3)]),
        (["don", "'", "t", " walk"], [("don't", -5), (" walk", -4)]),
        (["看", "板に", "「", "営業"], [("看", None), ("板に", -2), ("「", -3), ("営業", -4)]),
        (["a", " ", "\n", "cat"], [("a", None), (" \ncat", -9)]),  # white space belongs to the word behind it
        (["a", " 🐈", "", "", " x"], [("a", None), (" 🐈", -9), (" x", -5)]),  # a sign of several tokens
        (["cat"], [("cat", -1)]),  # all that there is
    ],
)
def test_tokens_of_a_word_are_joined(tokens, expected):
    assert words(tokens) == expected
    assert "".join(text for text, _ in words(tokens)) == "".join(tokens)


def test_what_was_logged_is_read_again():
    reading = Reading(["a", ' "red"', " \n<b>cat"], [-0.5, -1.25, -12.0])
    again = logged_reading(reading.to_json())
    assert (list(again.tokens), list(again.log_probs)) == (list(reading.tokens), list(reading.log_probs))
    assert read_words(again)[0] == Word("a", None)


@pytest.mark.parametrize(
    "value", [None, "", "no json", "3", "[]", '"text"', '[["a"]]', '[["a", "b"]]', '[["a", NaN]]', '{"a": 1}', 3.0]
)
def test_what_is_no_reading_is_none(value):
    assert logged_reading(value) is None
    assert logged_reading(json.dumps([["a", -1], ["b", 0]])) is not None


def test_columns_of_readings():
    names = ["judge answers", "read_back", "read_back_2", "read_back qwen", "read_backwards"]
    assert reading_columns(names) == names[1:4]
