"""The page says what the folder holds: verdicts, groups, the same prompts over time, alarms; and stays small."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.helpers.run_folders import HOSTILE, generation, write_run
from trl_unigrpo.reporting.gallery import choose
from trl_unigrpo.reporting.pages import readable
from trl_unigrpo.reporting.run_files import Records, Run, read_run
from trl_unigrpo.reporting.run_page import (
    comparison_page,
    run_page,
    spread,
    unique_names,
    write_report,
)
from trl_unigrpo.reporting.run_summary import change, training_change
from trl_unigrpo.statistics import mean_interval


class Page(HTMLParser):
    """Tags and texts as a browser reads them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_hostile_texts_stay_texts(tmp_path):
    page = Page(run_page(read_run(write_run(tmp_path))))
    assert "script" not in page.tags
    assert page.tags.count("style") == page.tags.count("h1") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for text in HOSTILE:
        assert readable(text)[:150] in page.text
    assert "org/<b>model</b>" in page.text


def test_groups_are_sorted_by_reward(tmp_path):
    records = Records(tmp_path, "a")
    records.show(*choose(generation(["p", "q"], rewards=[0.1, 0.4, math.nan, 0.3, 0.9, 0.7, 0.8, 1.0]), 0))
    text = Page(run_page(read_run(tmp_path))).text.partition("best first")[2]
    assert re.findall(r"#(\d)", text) == ["1", "3", "0", "2", "7", "4", "6", "5"]
    assert text.index("none") > text.index("0.100")


def test_the_same_prompts_over_time(tmp_path):
    write_run(tmp_path, steps=(0, 10, 20), prompts=["first prompt", "second prompt"])
    html = run_page(read_run(tmp_path))
    table = html[html.index("The same prompts") :].split("</table>")[0]
    rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    assert re.findall(r"<th>(.*?)</th>", rows[0]) == ["prompt", "step 0", "step 10", "step 20"]
    for row, prompt, first in zip(rows[1:], ("first prompt", "second prompt"), (0.2, 0.21), strict=True):
        assert prompt in row and row.count("<img") == 3
        scores = [float(score) for score in re.findall(r'class="score">([\d.]+)', row)]
        assert scores == pytest.approx([first, first + 0.1, first + 0.2])


@pytest.mark.parametrize("gain, verdict, says", [(0.1, "better", "It works"), (-0.05, "worse", "It got worse")])
def test_the_verdict_is_the_paired_one_of_the_fixed_prompts(tmp_path, gain, verdict, says):
    run = read_run(write_run(tmp_path, gain=gain))
    found = change(run)
    assert found.fixed and found.verdict == verdict
    assert found.gain.mean == pytest.approx(2 * gain)
    assert says in Page(run_page(run)).text


def test_the_interval_is_over_prompts(tmp_path):
    """Against the same formula on hand-paired rewards; samples of a prompt are alike, so they count once."""
    random = np.random.default_rng(0)
    before, after = random.random(12), random.random(12)
    records = Records(tmp_path, "a")
    prompts = [f"p{i}" for i in range(6)]
    for step, values in ((0, before), (4, after[::-1])):
        order = prompts if step == 0 else prompts[::-1]
        records.show(*choose(generation(order, 2, "eval", rewards=values), step))
    swapped = after.reshape(6, 2)[:, ::-1].ravel()  # reversed as a whole, so reversed within each prompt
    expected = mean_interval(swapped - before, [i // 2 for i in range(12)])
    found = change(read_run(tmp_path))
    assert found.gain == pytest.approx(expected) and found.gain.n == 6


def test_the_verdict_without_evaluations_compares_the_ends_of_the_curve():
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    flat, rising = training_change(noise), training_change(noise + np.linspace(0, 1, 200))
    assert flat.verdict == "unclear" and rising.verdict == "better" and not rising.fixed
    assert rising.before == pytest.approx((noise + np.linspace(0, 1, 200))[:20].mean())
    assert training_change([0.0, 1.0, 2.0]).verdict == "too short"
    assert training_change([0.0]) is None


def test_the_interval_of_the_curve_covers_as_often_as_it_says():
    """Two ends of 50 independent logs each: 95 % of the intervals hold the true difference."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = training_change([*random.normal(0, 1, 50), *np.zeros(400), *random.normal(0.5, 1, 50)]).gain
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_alarms_lead_the_page_and_mark_their_images(tmp_path):
    write_run(tmp_path, steps=(0, 50))
    assert "No alarm was raised" in Page(run_page(read_run(tmp_path))).text
    alarm = {"step": 50, "mode": "train", "alarm": "images <dark>", "message": "half are black"}
    alarm |= {"indices": [3], "values": {}, "stopped": False}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    text = Page(run_page(read_run(tmp_path))).text
    assert "images <dark> at step 50: half are black" in " ".join(text.split())
    assert text.count("⚠ images <dark>") == 1
    assert text.index("half are black") < text.index("Curves") and "No alarm" not in text
    (tmp_path / "alarms.jsonl").write_text(json.dumps({**alarm, "mode": "eval", "stopped": True, "alarm": "x"}) + "\n")
    text = Page(run_page(read_run(tmp_path))).text
    assert "x at step 50 (evaluation), where it stopped the run: half" in " ".join(text.split())
    assert text.count("⚠ x") == 1 and text.index("⚠ x") < text.index("Groups of one prompt")


def test_a_folder_of_logs_alone_claims_nothing_of_alarms(tmp_path):
    history = [{"step": i, "reward": i / 10} for i in range(1, 11)]
    (tmp_path / "trainer_state.json").write_text(
        json.dumps({"log_history": history, "max_steps": 10, "global_step": 10})
    )
    text = Page(run_page(read_run(tmp_path))).text
    assert "Nobody watched it" in text and "No alarm was" not in text and "Finished" in text


def test_a_run_whose_alarms_were_off_is_not_called_quiet(tmp_path):
    text = Page(run_page(read_run(write_run(tmp_path, alarms="off")))).text
    assert "Nobody watched it" in text and "No alarm was" not in text


def test_missing_images_and_paths_that_lead_out(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = write_run(tmp_path / "run", steps=(0, 1), evaluated=False, prompts=["a", "b"])
    next((folder / "gallery" / "images").glob("*0003.jpg")).unlink()
    file = folder / "gallery" / "records.jsonl"
    file.write_text(file.read_text().replace("images/train-000000-0001.jpg", "../../secret.jpg"))
    html = run_page(read_run(folder))
    assert html.count("image's file is missing") == 2 and html.count("<img") == 14
    assert "c2VjcmV0" not in html  # "secret" in base64


@pytest.mark.parametrize("side", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_the_page_of_a_long_run_is_small(tmp_path, side):
    """100 steps with a generation at each tenth, and their evaluations: 24 images each, and texts of 4,000 signs."""
    prompts = [f"{i} " + "word " * 800 for i in range(24)]
    write_run(tmp_path, steps=range(0, 101, 10), prompts=prompts, side=side, group_size=12)
    html = run_page(read_run(tmp_path))
    assert len(html.encode()) < 5_000_000
    assert re.findall(r"<b>Step (\d+)", html)[0] == "100" and html.count("<img") > 60


def test_generations_thin_out_from_the_ends():
    assert list(spread(0)) == [] and list(spread(1)) == [0]
    assert list(spread(9))[:5] == [8, 0, 4, 2, 6]
    for number in range(2, 40):
        assert sorted(spread(number)) == list(range(number))


def test_runs_side_by_side(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, steps=(0, 20), prompts=["same", f"only {name}"], gain=gain, model=name))
        for name, gain in (("a", 0.1), ("b", 0.3))
    ]
    html = comparison_page(runs)
    rows = re.findall(r"<tr>.*?</tr>", html.split("</table>")[0], re.DOTALL)
    assert [re.findall(r">([^<]*)</td>", row)[0].strip() for row in rows[1:]] == ["a", "b"]
    assert "+0.100" in rows[1] and "+0.300" in rows[2]
    table = html[html.index("The same prompts") :].split("</table>")[0]
    assert table.count("<img") == 2 and "only" not in table
    chart = html[html.index("<svg") :].split("</svg>")[0]
    assert "var(--c0)" in chart and "var(--c1)" in chart


def test_names_of_runs_are_unique(tmp_path):
    runs = [Run(tmp_path / place) for place in ("x/run", "y/run", "x/run", "z/other")]
    assert unique_names(runs) == ["x/run (1)", "y/run", "x/run (3)", "z/other"]


def test_the_report_goes_where_it_should(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(tmp_path / "one", steps=(0, 1)), write_run(tmp_path / "two", steps=(0, 1))
    assert write_report([one]) == one / "gallery.html"
    assert write_report([one, two]).resolve() == tmp_path / "comparison.html"
    assert write_report([one], "new/page.html").is_file()
