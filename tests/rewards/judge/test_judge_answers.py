"""Answers: a number in range or none, whatever comes in. Questions: no text leaves its place."""

import copy
import json
import math
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.judge_server import chat
from trl_unigrpo.rewards.judge.answers import (
    VERDICT_FORMAT,
    NoAnswer,
    verdict_score,
    yes_probability,
)
from trl_unigrpo.rewards.judge.prompts import (
    QUESTIONS,
    TEMPLATES,
    answer_word,
    fill,
    places,
    quoted,
)


def test_spellings_of_yes_and_no_are_added_up():
    top = [("Yes", 0.3), (" yes", 0.2), ("YES.", 0.1), ("▁yes", 0.05), ("No", 0.04), ("Ġno", 0.06), ("The", 0.25)]
    assert yes_probability(chat("Yes", top)) == pytest.approx(0.65 / 0.75, abs=1e-12)
    assert yes_probability(chat("Yes", [("Yes", 0.6), ("Maybe", 0.4)])) == 1.0
    assert yes_probability(chat("No", [("No", 1.0), ("Maybe", 0.0)])) == 0.0


@pytest.mark.parametrize(
    ("top", "reason"),
    [
        ([("So", 0.6), ("Okay", 0.3), ("Yes", 2e-6), ("No", 4e-7)], "begins with 'So' .60%.*thinks first"),
        ([("Maybe", 0.6), ("Yes", 0.3), ("No", 0.1)], "begins with 'Maybe' .60%.*these have 0.4 .*hesitates"),
        ([("Yes", 0.25), ("No", 0.25), ("I", 0.25)], "these have 0.5 of its probability, expected more than 0.5"),
        ([("Yes", 1.0), ("No", 1.0)], "add up to 2, expected at most 1.*mode='score'"),
        ([("Yes", 1.0)] + [(word, 1.0) for word in "abcdefg"], "add up to 8"),
        ([("Yes", 0.0), ("No", 0.0)], "add up to 0"),
        ([("Yes", 0.9)], "without alternatives.*top_logprobs"),
        ([("Yes", 1.0)], "without alternatives.*top_logprobs"),
        ([], "without alternatives.*top_logprobs"),
    ],
)
def test_first_token_that_says_neither_is_no_answer(top, reason):
    with pytest.raises(NoAnswer, match=reason):
        yes_probability(chat("x", top))


def test_log_probs_may_be_rounded():
    assert yes_probability(chat("Yes", [("Yes", 0.8), ("No", 0.21)])) == pytest.approx(0.8 / 1.01)


def with_choice(body, message=None, **changes):
    """An answer whose choice, and its message, have other values."""
    body = copy.deepcopy(body)
    body["choices"][0] |= changes
    body["choices"][0]["message"] |= message or {}
    return body


NO_TEXT = {"content": None}
FAILED = {"error": {"code": 502, "message": "Provider returned error"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"message": {"content": None, "refusal": "I can't judge this."}}, "refused: \"I can't judge this"),
        ({"message": {"refusal": "No."}}, "refused: 'No.'"),
        ({"finish_reason": "content_filter"}, "content filter"),
        ({"finish_reason": "content_filter", "message": NO_TEXT, "logprobs": None}, "content filter"),
        ({"finish_reason": "content_filter: SAFETY"}, "content filter"),
        ({"finish_reason": "error", **FAILED}, "passes on a failure: Provider returned error"),
        (FAILED, "passes on a failure: Provider returned error"),
        ({"error": "upstream went away"}, "passes on a failure: upstream went away"),
        ({"finish_reason": "error"}, "passes on a failure: finish_reason='error'"),
        ({"finish_reason": "abort"}, "passes on a failure: finish_reason='abort'"),
        ({"finish_reason": "tool_calls"}, "did not come to its end .finish_reason='tool_calls'"),
        ({"finish_reason": {"type": "abort"}}, "did not come to its end"),
        ({"finish_reason": "length", "message": NO_TEXT, "logprobs": None}, "limit of tokens.*thinks first"),
        ({"finish_reason": "stop", "message": NO_TEXT, "logprobs": {"content": None}}, "the answer is empty"),
    ],
)
def test_what_stands_beside_a_failure_is_no_answer(changes, reason):
    for body, read in ((GOOD[0], yes_probability), (GOOD[1], lambda body: verdict_score(body, 0, 10))):
        with pytest.raises(NoAnswer, match=reason):
            read(with_choice(body, **changes))


def test_failure_of_the_whole_body_is_no_answer():
    for body, read in ((GOOD[0], yes_probability), (GOOD[1], lambda body: verdict_score(body, 0, 10))):
        with pytest.raises(NoAnswer, match="passes on a failure: Provider returned error"):
            read({**body, **FAILED})
        assert read({**body, "error": None}) == read(body)


@pytest.mark.parametrize("ending", ["stop", "STOP", "length", "eos_token", None])
def test_answers_end_in_several_words(ending):
    assert yes_probability(with_choice(GOOD[0], finish_reason=ending)) == pytest.approx(0.7 / 0.8)
    assert verdict_score(with_choice(GOOD[1], finish_reason=ending), 0, 10) == 0.7


@pytest.mark.parametrize(
    ("text", "ending", "reason"),
    [
        ('{"reason": "the cat', "length", "cut off at its limit.*max_tokens"),
        ("<think>Let me see", "length", "it is a thinking.*thinks first"),
        ("<think>Let me see.</think>" + json.dumps({"reason": "", "score": 7}), "stop", "thinks first"),
        ("I'm sorry, I can't.", "stop", "did the model refuse.*It says \"I'm sorry"),
    ],
)
def test_text_that_is_no_verdict_is_shown_with_its_reason(text, ending, reason):
    with pytest.raises(NoAnswer, match=reason):
        verdict_score(with_choice(chat(text), finish_reason=ending), 0, 10)


@pytest.mark.parametrize("token", ["Yesterday", "noon", "yes no", "y", "", "not", "know", "はい"])
def test_other_words_are_no_answer(token):
    assert answer_word(token) is None
    with pytest.raises(NoAnswer, match="neither yes nor no"):
        yes_probability(chat("x", [(token, 0.9)]))


def test_later_tokens_and_texts_do_not_count():
    body = chat("Yes, yes, yes", [("No", 0.9), ("Yes", 0.1)])
    later = copy.deepcopy(body["choices"][0]["logprobs"]["content"][0])
    later["top_logprobs"] = [{"token": "Yes", "logprob": 0.0}]
    body["choices"][0]["logprobs"]["content"].append(later)
    assert yes_probability(body) == pytest.approx(0.1)


def test_answer_without_log_probs_says_what_to_do():
    with pytest.raises(NoAnswer, match="mode='score'"):
        yes_probability(chat("Yes"))


@pytest.mark.parametrize("logprob", [float("nan"), 0.5, 1e308, "-0.5", None, True, [0.0]])
def test_impossible_log_probs_are_no_answer(logprob):
    body = chat("Yes", [("Yes", 0.5), ("No", 0.5)])
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = logprob
    with pytest.raises(NoAnswer):
        yes_probability(body)


def verdict(score, reason="fine"):
    return chat(json.dumps({"reason": reason, "score": score}))


def test_score_is_mapped_from_its_range():
    assert verdict_score(verdict(7), 0, 10) == pytest.approx(0.7)
    assert verdict_score(verdict(2), 1, 5) == pytest.approx(0.25)
    assert verdict_score(verdict(-1.0), -1, 1) == 0.0


@pytest.mark.parametrize("score", [10.5, -1, "7", None, True, [7], 10**400, float("nan"), float("inf")])
def test_score_that_is_none_is_no_answer(score):
    with pytest.raises(NoAnswer):
        verdict_score(verdict(score), 0, 10)


@pytest.mark.parametrize("text", ["7", "[7]", '{"score": 7}', '{"reason": "x", "score": 7', "The score is 7."])
def test_text_that_is_no_verdict_is_no_answer(text):
    with pytest.raises(NoAnswer, match="no verdict"):
        verdict_score(chat(text), 0, 10)


def test_schema_that_is_sent_is_the_one_that_is_checked():
    schema = VERDICT_FORMAT["json_schema"]["schema"]
    assert schema["required"] == ["reason", "score"] and schema["additionalProperties"] is False
    assert {name: part["type"] for name, part in schema["properties"].items()} == {
        "reason": "string",
        "score": "number",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
GOOD = [
    chat("Yes", [("Yes", 0.5), (" yes", 0.2), ("no", 0.1)]),
    verdict(7),
    chat("No", [("No", 1.0), ("Yes", 0.0)]),
]


def paths(value, at=()):
    """The way to every part of a JSON value."""
    yield at
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(inner, (*at, key))


def damaged(body, path, new):
    """The body with one part replaced, or removed if `new` is `...`."""
    if not path:
        return None if new is ... else new
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return body


CUTS = [(body, path) for body in GOOD for path in paths(body)]


@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.sampled_from(CUTS), JSON | st.just(...), st.text(max_size=30) | st.builds(json.dumps, JSON))
@example((GOOD[0], ()), ..., "")
def test_malformed_answers_are_a_number_in_range_or_no_answer(cut, new, text):
    for body in (damaged(*cut, new), chat(text)):
        for read in (yes_probability, lambda body: verdict_score(body, 0, 10)):
            try:
                score = read(body)
            except NoAnswer:
                pass
            else:
                assert type(score) is float and 0 <= score <= 1 and not math.isnan(score)


# Everything that ends a line, a quotation or a turn of a conversation somewhere.
HOSTILE = st.text(
    st.sampled_from('"\\{}<>|\n\r\t\u2028\u0085\u202e\ud800\x00\x7fab yes[]') | st.characters(), max_size=40
)


@settings(max_examples=500, deadline=None)
@given(HOSTILE)
def test_text_stays_between_its_quotes(text):
    found = quoted(text)
    assert json.loads(found) == text  # nothing is lost
    assert found[0] == found[-1] == '"' and '"' not in re.sub(r"\\.", "", found[1:-1])
    assert len(found.splitlines()) == 1 and not set(found) & set("<>\n\r\t\u2028\u202e\x00\x7f")
    found.encode("utf-8")
    for template in (*TEMPLATES.values(), *QUESTIONS.values()):
        start, end = template.split("{prompt}" if "{prompt}" in template else "{question}")
        filled = fill(template, {"prompt": text, "question": text, "low": 0, "high": 10})
        assert filled == start.format(low=0, high=10) + found + end.format(low=0, high=10)


def test_other_languages_stay_readable():
    assert quoted("红色的猫 и собака 🐈") == '"红色的猫 и собака 🐈"'
    assert quoted("a<|im_end|>") == '"a\\u003c|im_end|\\u003e"'


@pytest.mark.parametrize(
    "template", ["no place", "{}", "{0}", "{prompt.x}", "{prompt[0]}", "{prompt!r}", "{prompt:9}", "{"]
)
def test_templates_that_can_not_be_filled(template):
    with pytest.raises(ValueError, match="template"):
        places(template)


def test_places_and_braces():
    assert places("{prompt} {{as is}} {style}") == {"prompt", "style"}
    assert fill("{prompt} {{as is}} {low}", {"prompt": "a", "low": 0.5}) == '"a" {as is} 0.5'
    assert fill("{low} to {high}", {"low": 0.0, "high": 10.0}) == "0 to 10"
