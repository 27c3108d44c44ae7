"""Question lists, their aggregators against closed forms, and the rewards that ask them."""

import asyncio
import itertools
import json
import math
import statistics

import pytest
from PIL import Image

from trl_unigrpo.rewards.common import DeadRewardError
from trl_unigrpo.rewards.questions.question import (
    Question,
    dependency_mean,
    dv_score,
    earned,
    exam_points,
    geometric_mean,
    group_means,
    read_questions,
    weighted_mean,
)
from trl_unigrpo.rewards.questions.question_reward import DVReward, QuestionReward


RED, BLUE = (Image.new("RGB", (2, 2), color) for color in ("red", "blue"))


class Judge:
    """Answers by a table of (colour, question); keeps what it was asked."""

    def __init__(self, table, default=None):
        self.table, self.default, self.asked = table, default, []

    async def ask(self, pairs):
        self.asked.append([(image.getpixel((0, 0)), text) for image, text in pairs])
        return [self.table.get(key, self.default) for key in self.asked[-1]]


def score(reward, images, log_metric=None, **columns):
    return asyncio.run(reward(["a cat"] * len(images), images=images, log_metric=log_metric, **columns))


def questions(*parents, **changes):
    return [Question(f"q{i}", parents=row, **changes) for i, row in enumerate(parents)]


# Questions


def test_question_survives_json():
    question = Question("Is there no dog?", "no", "quality", (2, 0), 2.5)
    assert Question.from_dict(json.loads(json.dumps(question.to_dict()))) == question


def test_keys_that_a_table_filled_with_none_have_defaults():
    assert Question.from_dict({"text": "a?", "expected": None, "group": None, "parents": None, "weight": None}) == (
        Question("a?")
    )


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"text": " "}, ValueError, r"text=' ': expected a text"),
        ({"text": 3}, ValueError, r"text=3"),
        ({}, ValueError, "without 'text'"),
        ({"text": "a?", "group": ""}, ValueError, "group=''"),
        ({"text": "a?", "expected": "Yes"}, ValueError, r"expected='Yes' of the question 'a\?': write 'yes'"),
        ({"text": "a?", "parents": 1}, TypeError, "parents=1"),
        ({"text": "a?", "parents": "0"}, TypeError, "parents='0'"),
        ({"text": "a?", "parents": [-1]}, ValueError, "parent -1 of"),
        ({"text": "a?", "parents": [True]}, ValueError, "parent True of"),
        ({"text": "a?", "weight": 0}, ValueError, "weight=0 of"),
        ({"text": "a?", "weight": math.inf}, ValueError, "weight=inf of"),
        ({"text": "a?", "weight": math.nan}, ValueError, "weight=nan of"),
        ({"text": "a?", "question": "b?"}, ValueError, "no key 'question': expected some of text, expected, group"),
    ],
)
def test_wrong_question_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        Question.from_dict(data)


@pytest.mark.parametrize("as_json", [False, True])
def test_every_form_of_a_cell_is_read(as_json):
    cell = ["a?", {"text": "b?", "parents": [0]}, {"text": "c?", "group": "quality"}]
    read = read_questions(json.dumps(cell) if as_json else cell, group="style")
    assert read == (
        Question("a?", group="style"),
        Question("b?", "yes", "style", (0,)),
        Question("c?", group="quality"),
    )
    assert read_questions(read) == read


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (None, ValueError, "no questions"),
        ([], ValueError, "no questions"),
        ("[]", ValueError, "no questions"),
        ("Is there a cat?", ValueError, "'Is there a cat\\?' is no JSON list"),
        ('"Is there a cat?"', TypeError, "Questions are a str"),
        ({"text": "a?"}, TypeError, "Questions are a dict"),
        ([3], TypeError, "A question is a int"),
        ([{"text": "a?", "parents": [1]}], ValueError, r"Question 0 \('a\?'\) has the parent 1"),
        ([{"text": "a?", "parents": [0]}], ValueError, "in a circle: \\[0, 0\\]"),
        ([{"text": "a?", "parents": [1]}, {"text": "b?", "parents": [0]}], ValueError, "in a circle"),
    ],
)
def test_wrong_cell_is_refused(cell, error, message):
    with pytest.raises(error, match=message):
        read_questions(cell)


# Aggregators


def test_expected_no_earns_what_is_left():
    pair = [Question("a"), Question("b", "no"), Question("c", "no")]
    assert earned(pair, [0.25, 0.25, None]) == [0.25, 0.75, None]


def test_weighted_mean_by_hand():
    three = [Question("a", weight=3), Question("b", "no"), Question("c", weight=5)]
    assert weighted_mean(three, [0.5, 0.25, None]) == pytest.approx((3 * 0.5 + 1 * 0.75) / 4)
    assert weighted_mean(three, [None, None, None]) is None


def test_geometric_mean_is_the_library_s():
    # A weight of n is the same as n questions.
    three = [Question("a", weight=2), Question("b", "no", weight=3), Question("c", weight=7)]
    expected = statistics.geometric_mean([0.5] * 2 + [0.9] * 3)
    assert geometric_mean(three, [0.5, 0.1, None]) == pytest.approx(expected, rel=1e-12)
    assert geometric_mean(three, [0.5, 1.0, None]) == 0.0
    assert geometric_mean(three, [None] * 3) is None


def test_dependency_by_hand():
    # 0 holds; 1 does not and zeroes 2, which zeroes 3; 4 has one parent that holds and one that does not.
    five = questions((), (0,), (1,), (2,), (0, 1))
    assert dependency_mean(five, [0.8, 0.4, 1.0, 0.9, 1.0]) == pytest.approx((0.8 + 0.4) / 5)
    assert dependency_mean(five, [0.8, 0.5, 1.0, 0.9, 1.0]) == pytest.approx((0.8 + 0.5 + 1.0 + 0.9 + 1.0) / 5)
    assert dependency_mean(five, [0.2, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(0.2 / 5)


def test_dependency_on_a_parent_that_should_be_answered_no():
    pair = [Question("Are there people?", expected="no"), Question("Is the street empty?", parents=(0,))]
    assert dependency_mean(pair, [0.1, 1.0]) == pytest.approx((0.9 + 1.0) / 2)
    assert dependency_mean(pair, [0.9, 1.0]) == pytest.approx(0.1 / 2)


def test_failed_parent_fails_its_children():
    assert dependency_mean(questions((), (0,), (1,), ()), [None, 1.0, 1.0, 0.4]) == pytest.approx(0.4)
    # A parent that does not hold is enough, whatever the failed one would have been.
    assert dependency_mean(questions((), (), (0, 1)), [None, 0.2, 1.0]) == pytest.approx((0.2 + 0) / 2)
    assert dependency_mean(questions((), (0,)), [None, 1.0]) is None


def test_dependency_does_not_depend_on_the_order_of_the_questions():
    parents, answers = [(), (0,), (1,), (0, 2), ()], [0.9, 0.3, 0.8, None, 0.7]
    expected = dependency_mean(questions(*parents), answers)
    assert expected == pytest.approx((0.9 + 0.3 + 0 + 0 + 0.7) / 5)
    for order in itertools.permutations(range(5)):
        place = {old: new for new, old in enumerate(order)}
        moved = [Question(f"q{old}", parents=tuple(place[p] for p in parents[old])) for old in order]
        assert dependency_mean(moved, [answers[old] for old in order]) == pytest.approx(expected)


def test_without_parents_dependencies_change_nothing():
    four = [Question("a", weight=2), Question("b", "no"), Question("c"), Question("d")]
    answers = [0.1, 0.9, None, 0.6]
    assert dependency_mean(four, answers) == weighted_mean(four, answers)


def test_exam_points_count_right_answers():
    four = [Question("a"), Question("b"), Question("c", "no"), Question("d", "no", weight=2)]
    assert exam_points(four, [0.51, 0.49, 0.3, 0.8]) == pytest.approx(2 / 5)
    assert exam_points(four, [None, 0.49, 0.3, None]) == pytest.approx(1 / 2)
    assert exam_points(four, [None] * 4) is None


def test_dv_score_by_hand():
    four = [Question("a"), Question("b", "no"), Question("c", group="quality"), Question("d", group="quality")]
    assert group_means(four, [0.2, 0.4, 0.9, None]) == {"semantic": pytest.approx(0.4), "quality": pytest.approx(0.9)}
    assert dv_score(four, [0.2, 0.4, 0.9, 0.7]) == pytest.approx(math.sqrt(0.4 * 0.8))
    assert dv_score(four, [0.2, 0.4, None, None]) is None


@pytest.mark.parametrize("groups", [("semantic",), ("quality",), ("semantic", "quality", "style")])
def test_dv_score_needs_its_two_groups(groups):
    with pytest.raises(ValueError, match="expected both 'quality' and 'semantic'"):
        dv_score([Question("a", group=group) for group in groups], [0.5] * len(groups))


@pytest.mark.parametrize("aggregate", [weighted_mean, geometric_mean, dependency_mean, exam_points, dv_score])
def test_answers_must_fit_the_questions(aggregate):
    with pytest.raises(ValueError, match="zip"):
        aggregate([Question("a"), Question("b", group="quality")], [0.5])


# Rewards


def test_all_questions_of_all_images_go_out_in_one_call():
    judge = Judge({((255, 0, 0), "a?"): 0.5, ((255, 0, 0), "b?"): 0.25, ((0, 0, 255), "c?"): 1.0})
    reward = QuestionReward(judge)
    assert score(reward, [RED, BLUE], questions=[["a?", "b?"], ["c?"]]) == [0.375, 1.0]
    assert judge.asked == [[((255, 0, 0), "a?"), ((255, 0, 0), "b?"), ((0, 0, 255), "c?")]]


def test_aggregate_and_column_are_used():
    judge = Judge({((255, 0, 0), "a?"): 0.6, ((255, 0, 0), "b?"): 0.4})
    assert score(QuestionReward(judge, exam_points, column="exam"), [RED], exam=[["a?", "b?"]]) == [0.5]


@pytest.mark.parametrize(("max_failed", "expected"), [(0.0, None), (0.24, None), (0.25, 0.9), (1.0, 0.9)])
def test_share_of_failed_questions_decides_whether_there_is_a_score(max_failed, expected):
    judge = Judge({((255, 0, 0), "x?"): None}, default=0.9)
    (found,) = score(QuestionReward(judge, max_failed=max_failed), [RED], questions=[["a?", "b?", "c?", "x?"]])
    assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("wrong", [math.nan, 1.5, -0.1, "yes"])
def test_answer_that_is_no_probability_is_none(wrong):
    reward = QuestionReward(Judge({((0, 0, 255), "a?"): wrong}, default=0.5))
    assert score(reward, [RED, BLUE], questions=[["a?"], ["a?"]]) == [0.5, None]


def test_failing_judge_gives_none_and_stops_the_run_after_three_batches():
    class Broken:
        async def ask(self, pairs):
            raise ConnectionError("key sk-12345 was refused")

    reward = QuestionReward(Broken(), name="exam")
    for _ in range(2):
        assert score(reward, [RED], questions=[["a?"]]) == [None]
    with pytest.raises(DeadRewardError, match="exam scored no image in 3 batches") as caught:
        score(reward, [RED], questions=[["a?"]])
    assert "ConnectionError" in str(caught.value) and "sk-12345" not in str(caught.value)


def test_judge_that_loses_answers_gives_none():
    class Short:
        last_error = ""

        async def ask(self, pairs):
            return [0.5]

    with pytest.raises(DeadRewardError, match="1 answers to 2 questions"):
        score(QuestionReward(Short(), max_dead_batches=1), [RED], questions=[["a?", "b?"]])


def test_last_error_of_the_judge_is_reported():
    judge = Judge({})
    judge.last_error = "no such model"
    with pytest.raises(DeadRewardError, match="no such model"):
        score(QuestionReward(judge, max_dead_batches=1), [RED], questions=[["a?"]])


def test_metrics_are_means_of_the_groups():
    answers = {((255, 0, 0), "a?"): 0.2, ((255, 0, 0), "b?"): 0.6, ((0, 0, 255), "a?"): 0.8, ((0, 0, 255), "b?"): None}
    logged = {}
    reward = DVReward(Judge(answers), max_failed=0.5, name="dv")
    cell = [{"text": "a?"}, {"text": "b?", "group": "quality"}]
    found = score(reward, [RED, BLUE], logged.__setitem__, questions=[cell, cell])
    assert found == [pytest.approx(math.sqrt(0.2 * 0.6)), None]
    assert logged == {
        "dv/unanswered": 0.25,
        "dv/semantic": pytest.approx(0.5),
        "dv/quality": pytest.approx(0.6),
        "dv/failed": 0.5,
    }


def test_dv_reward_reads_two_columns():
    judge = Judge({((255, 0, 0), "a?"): 0.5, ((255, 0, 0), "b?"): 0.5, ((255, 0, 0), "c?"): 0.32})
    quality = [{"text": "b?"}, {"text": "c?", "parents": [0], "expected": "no"}]
    reward = DVReward(judge)
    row = {"semantic_questions": ["a?"], "quality_questions": json.dumps(quality)}
    assert [q.parents for q in reward.questions_of(row)] == [(), (), (1,)]
    assert [q.group for q in reward.questions_of(row)] == ["semantic", "quality", "quality"]
    columns = {name: [cell] for name, cell in row.items()}
    assert score(reward, [RED], **columns) == [pytest.approx(math.sqrt(0.5 * (0.5 + 0.68) / 2))]


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (
            QuestionReward,
            {"topic": ["x", "y"]},
            r"QuestionReward, row 0 .*reads the column 'questions'.*it has: prompt, topic",
        ),
        (QuestionReward, {"questions": [["a?"], []]}, r"row 1 of a batch \('a cat'\): There are no questions"),
        (QuestionReward, {"questions": [["a?"], [{"text": "b?", "parents": [4]}]]}, "row 1 .* has the parent 4"),
        (DVReward, {"questions": [["a?"], ["a?"]]}, r"DVReward, row 0 .*groups \['semantic'\]"),
        (DVReward, {"semantic_questions": [["a?"]] * 2}, "reads the column 'quality_questions'"),
    ],
)
def test_rows_that_cannot_be_asked_about_are_named(reward, columns, message):
    judge = Judge({}, default=0.5)
    with pytest.raises(ValueError, match=message):
        score(reward(judge), [RED, BLUE], **columns)
    assert judge.asked == []


def test_dataset_is_checked_before_training():
    reward = QuestionReward(Judge({}), dependency_mean)
    reward.check([{"prompt": "x", "questions": ["a?"]}])
    with pytest.raises(ValueError, match="row 1: Questions are each other's parents"):
        reward.check([{"questions": ["a?"]}, {"questions": [{"text": "b?", "parents": [0]}]}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda pairs: pairs,), TypeError, "asker is a function, expected one with a method `ask`"),
        ((Judge({}), "mean"), TypeError, "aggregate='mean'"),
        ((Judge({}), weighted_mean, "questions", 1.5), ValueError, "max_failed=1.5"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        QuestionReward(*arguments)


def test_images_must_fit_the_prompts():
    with pytest.raises(ValueError, match="Got 1 images for 2 prompts"):
        asyncio.run(QuestionReward(Judge({}))(["a", "b"], images=[RED], questions=[["a?"]] * 2))


def test_each_images_answers_are_logged_for_galleries():
    judge = Judge({((255, 0, 0), "a?"): 0.9, ((255, 0, 0), "b?"): 0.2, ((0, 0, 255), "a?"): 0.1})
    logged = {}
    rows = [["a?", {"text": "b?", "expected": "no"}], ["a?", "b?"]]
    score(QuestionReward(judge, max_failed=0.5), [RED, BLUE], questions=rows, log_extra=logged.__setitem__)
    assert logged == {"QuestionReward answers": ["✓ 0.90 a?\n✓ 0.80 b?", "✗ 0.10 a?\n– no answer b?"]}
