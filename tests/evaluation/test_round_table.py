"""Rounds against each other and against images painted alone, by numbers worked out by hand."""

import json

import pytest
from rich.console import Console

from trl_unigrpo.evaluation.round_table import Course, round_report, round_tables


COURSES = [
    Course([0.5, 1.0, 1.0], kept=True, changes=[None, 0.3, None]),  # mended, and then rightly kept
    Course([1.0, 0.5, 0.75], changes=[None, 0.2, 0.01]),  # spoilt, and a copy that scores more
    Course([0.5, 0.5], kept=True, changes=[None, None]),  # falsely kept
    Course([1.0, 1.0], kept=True, changes=[None, None]),
]
ALONE = [[0.5, 0.75, 0.25], [1.0, 0.5, 0.0], [0.5, 0.5, 0.5], [1.0, 0.0, 0.5]]


def means(report, *names):
    return [report[name]["mean"] for name in names]


def test_what_each_round_does():
    report = round_report(COURSES, ALONE)
    assert [row["reward"]["mean"] for row in report["rounds"]] == [None, 0.75, 0.75, 0.8125]
    one, two, three = report["rounds"][1:]
    assert {name: one[name] for name in ("kept", "gain", "false_stop")} == dict.fromkeys(
        ("kept", "gain", "false_stop")
    )
    assert (two["kept"], two["gain"], two["damage"], two["unchanged"]) == (0.5, 0.5, 0.5, 0.0)
    assert (two["false_stop"], two["missed_stop"]) == (0.5, 0.5)  # of two imperfect and of two perfect ones
    assert (three["kept"], three["gain"], three["damage"], three["unchanged"]) == (0.5, 1.0, 0.0, 1.0)
    assert (three["false_stop"], three["missed_stop"]) == (0.0, 0.0)
    assert report["images"] == (2 + 3 + 1 + 1) / 4


def test_what_rounds_are_worth_at_equal_compute():
    report = round_report(COURSES, ALONE, {"rounds": 3.0, "alone": 2.0})
    assert means(report, "last", "best_of_rounds", "single", "best_of_alone") == [0.8125, 0.875, 0.5, 0.8125]
    assert means(report, "last_minus_single", "best_minus_best_of_alone") == [0.3125, 0.0625]
    low, high = report["best_minus_best_of_alone"]["ci95"]
    assert low < 0 < high and report["alone"] == 3  # here nothing speaks for rounds
    json.dumps(report, allow_nan=False)


def test_intervals_are_over_prompts_that_differ():
    alike = [Course(course.rewards, cluster=place // 2) for place, course in enumerate(COURSES)]
    assert round_report(alike, ALONE)["last"]["clusters"] == 2
    assert round_report(COURSES, ALONE)["last"]["clusters"] == 4


def test_an_edit_begins_with_its_source():
    courses = [Course([0.5], before=0.2, changes=[0.001]), Course([0.1], before=0.3, changes=[0.2])]
    zero, one = round_report(courses, [[0.5], [0.1]])["rounds"]
    assert zero["reward"]["mean"] == pytest.approx(0.25)
    assert (one["gain"], one["damage"], one["unchanged"], one["kept"], one["false_stop"]) == (
        0.5,
        0.5,
        0.5,
        None,
        None,
    )


def test_what_has_no_score_is_in_no_number():
    courses = [Course([0.5, None]), Course([None, 1.0]), Course([0.5, 1.0])]
    report = round_report(courses, [[0.5, None], [0.5, 0.5], [0.5, 0.5]])
    assert [row["reward"]["clusters"] for row in report["rounds"]] == [0, 2, 2]
    assert report["rounds"][2]["gain"] == 1.0 and report["rounds"][2]["damage"] == 0.0
    assert report["last_minus_single"]["clusters"] == 2 and report["best_minus_best_of_alone"]["clusters"] == 1


def test_a_scale_of_its_own():
    courses = [Course([8.0, 8.0], kept=True), Course([10.0, 10.0], kept=True)]
    (row,) = round_report(courses, [[8.0], [10.0]], perfect=10.0)["rounds"][2:]
    assert (row["false_stop"], row["missed_stop"]) == (1.0, 0.0)


def test_tables_hold_the_numbers():
    console = Console(width=140, record=True)
    for table in round_tables(round_report(COURSES, ALONE, {"rounds": 3.0, "alone": 2.0})):
        console.print(table)
    text = console.export_text()
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    assert set(lines) == {"1", "2", "3", "in", "alone", "difference"}  # no round 0 without sources
    assert "0.812" in lines["3"] and "100.0%" in lines["3"] and "1.75" in lines["in"] and "2.00" in lines["alone"]
