"""Prompts as they were read back: shaded words beside their images, and the worst words of a run."""

import json
import math
import re

import pytest

from tests.helpers.run_folders import HOSTILE, generation
from trl_unigrpo.reporting.gallery import choose
from trl_unigrpo.reporting.pages import readable
from trl_unigrpo.reporting.read_back import shaded_words, worst_words
from trl_unigrpo.reporting.run_files import Records, read_run
from trl_unigrpo.reporting.run_page import run_page
from trl_unigrpo.rewards.readback.reading import Reading


def reading(text, log_prob=-1.0):
    return Reading(re.findall(r"\s*\S+", text), [log_prob] * len(text.split()))


def page_of(folder, columns, prompts, steps=(0,), group_size=1):
    """The HTML of a run whose rewards logged these columns; a callable one is asked at each step."""
    records = Records(folder, "a")
    for step in steps:
        extra = {name: values(step) if callable(values) else values for name, values in columns.items()}
        records.show(*choose(generation(prompts, group_size, extra=extra), step))
    records.close()
    return run_page(read_run(folder))


def test_words_are_shaded_by_their_likelihood():
    html = shaded_words(Reading(["a", " c", "at", " sits"], [-9.0, math.log(0.5), math.log(0.5), math.log(0.01)]))
    assert html.startswith('<span class="text words" dir="auto">a <span ')  # the first token is not counted
    found = re.findall(r'<span style="--shade:(\d+)%" title="([\d.]+ %)">(\w+)</span>', html)
    assert [(title, word) for _, title, word in found] == [("25 %", "cat"), ("1 %", "sits")]
    cat, sits = (int(shade) for shade, _, _ in found)
    assert 10 < cat < sits <= 45
    assert [re.search(r"--shade:(\d+)", shaded_words(Reading(["a"], [x])))[1] for x in (0.0, -1e4)] == ["0", "45"]


def test_the_prompt_stands_beside_its_image_instead_of_the_numbers(tmp_path):
    values = [reading("a red cat").to_json(), None]
    html = page_of(tmp_path, {"read_back": values, "answers": ["yes", "no"]}, ["a red cat", "a dog"])
    cards = html.split("Groups of one prompt")[1].split('<div class="image">')[1:]
    assert len(re.findall("--shade", cards[0])) == 2 and "--shade" not in cards[1]
    assert "[&#34;" not in html and "yes" in cards[0] and "no" in cards[1]


def test_what_another_reward_logs_under_the_name_stays_text(tmp_path):
    html = page_of(tmp_path, {"read_back": ["a text"], "read_back_2": [reading("a cat").to_json()]}, ["a cat"])
    assert "a text" in html and html.count("--shade") == 1 + 1  # the style, and one word
    assert "read_back_2" in html


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_hostile_prompts_stay_text(text):
    html = shaded_words(reading(text))
    assert not re.search(r"<(?!/?span)", html)
    shown = re.sub("<[^>]*>", "", html)
    for sign, entity in (("<", "&lt;"), (">", "&gt;"), ('"', "&#34;"), ("'", "&#39;"), ("&", "&amp;")):
        shown = shown.replace(entity, sign)
    assert shown == readable(text)


def test_of_a_long_text_the_first_words_are_shown():
    assert "1 more words" in shaded_words(reading(" ".join(["word"] * 280) + " more" * 21))


@pytest.mark.slow  # twelve seconds; what bounds it is tested above
def test_long_prompts_leave_the_page_below_five_megabytes(tmp_path):
    prompt = " ".join(f"word{i}" for i in range(280))
    values = [reading(prompt).to_json()] * 48
    html = page_of(tmp_path, {"read_back": values}, [prompt] * 2, range(0, 130, 10), 24)
    assert html.count("--shade") > 48 * 279 and len(html.encode()) < 5_000_000


def test_worst_words_over_the_run(tmp_path):
    def values(step):
        likely = Reading(["A", " Cat", ",", " 'cat'", " mat"], [-9.0, -1.0 - step, -50.0, -3.0 - step, -0.5])
        return [likely.to_json(), reading("a dog", -8.0).to_json() if step == 0 else None]

    html = page_of(tmp_path, {"read_back": values}, ["x", "y"], steps=(0, 3, 6))
    (column,) = worst_words(read_run(tmp_path)).items()
    assert column[0] == "read_back"
    cat, mat = column[1]  # a sign is no word, "a" stands first, "dog" was read once
    assert (cat.word, cat.number, mat.word, mat.number) == ("cat", 6, "mat", 3)
    assert [cat.log_prob, cat.first, cat.last] == pytest.approx([-5.0, -2.0, -8.0])
    row = re.search(r"<tr><td>cat</td>.*?</tr>", html, re.DOTALL)[0]
    assert re.findall(r'class="n">([^<]*)<', row) == ["0.674 %", "-5.00", "-2.00", "-8.00", "6"]


def test_a_page_without_readings_has_no_such_table(tmp_path):
    assert "hardest to read back" not in page_of(tmp_path, {"answers": ["yes"]}, ["a cat"])
    assert worst_words(read_run(tmp_path)) == {}


def test_the_twelve_worst_are_shown(tmp_path):
    text = [["first", -1.0], *([f" w{i:02d}", -float(i)] for i in range(30))]
    page_of(tmp_path, {"read_back": [json.dumps(text)] * 3}, ["x", "y", "z"])
    (rows,) = worst_words(read_run(tmp_path)).values()
    assert [row.word for row in rows] == [f"w{i:02d}" for i in range(29, 17, -1)]
    assert rows[0].first is None and rows[0].last is None  # of a run of one step
