"""Paired comparison of two folders, against scipy's tests and statsmodels' correction."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from trl_unigrpo.evaluation.command import run_comparison
from trl_unigrpo.evaluation.compare import compare_folders
from trl_unigrpo.evaluation.results import append_lines, image_file, open_folder


def folder_of(path, rewards, tasks, overall="mean", samples=1, **changes):
    """Results of rewards (samples, prompts)."""
    benchmark = {"name": "prompts", "title": "four", "overall": overall, "pooled": False}
    open_folder(path, {"benchmark": benchmark, "scorer": {"judge": "m"}, "model": {"weights": str(path)}, **changes})
    lines = []
    for sample, row in enumerate(np.reshape(rewards, (samples, -1))):
        for place, reward in enumerate(row):
            line = {"row": len(lines), "key": f"line {place}", "index": place, "sample": sample, "tag": tasks[place]}
            line |= {"prompt": f"prompt {place}", "cluster": f"prompt {place}", "thinking": "", "questions": []}
            reward = None if np.isnan(reward) else float(reward)
            line |= {"image": image_file(place, sample), "reward": reward, "scores": {"r": reward}, "error": ""}
            lines.append(line)
    append_lines(path, lines)
    return path


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    a = rng.uniform(size=40)
    tasks = ["big"] * 25 + ["small"] * 15
    return a, a + rng.normal(0.1, 0.3, 40) + 0.3 * (np.array(tasks) == "small"), tasks


def test_one_image_of_each_prompt_is_the_paired_t_test(tmp_path, numbers):
    a, b, tasks = numbers
    report, pairs = compare_folders(folder_of(tmp_path / "a", a, tasks), folder_of(tmp_path / "b", b, tasks))
    expected = ttest_rel(b, a)
    low, high = expected.confidence_interval()
    overall = report["overall"]
    assert overall["mean"] == pytest.approx((b - a).mean()) and overall["b"] == pytest.approx(b.mean())
    assert overall["ci95"] == pytest.approx([low, high], rel=1e-6)
    assert overall["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
    each = [ttest_rel(b[own], a[own]).pvalue for own in (slice(0, 25), slice(25, 40))]
    assert [task["p_value"] for task in report["tasks"].values()] == pytest.approx(each, rel=1e-6)
    corrected = multipletests(each, method="holm")[1]
    assert [task["p_holm"] for task in report["tasks"].values()] == pytest.approx(corrected, rel=1e-6)
    assert len(pairs) == 40 and report["different_settings"] == {}


def test_images_of_one_prompt_are_no_independent_evidence(tmp_path, numbers):
    a, b, tasks = numbers
    report, _ = compare_folders(
        folder_of(tmp_path / "a", np.tile(a, 4), tasks, samples=4),
        folder_of(tmp_path / "b", np.tile(b, 4), tasks, samples=4),
    )
    assert report["overall"]["p_value"] == pytest.approx(ttest_rel(b, a).pvalue, rel=1e-6)


def test_means_of_tasks_are_compared_as_they_are_scored(tmp_path, numbers):
    a, b, tasks = numbers
    report, _ = compare_folders(
        folder_of(tmp_path / "a", a, tasks, overall="tasks"), folder_of(tmp_path / "b", b, tasks, overall="tasks")
    )
    differences = [(b - a)[:25], (b - a)[25:]]
    assert report["overall"]["mean"] == pytest.approx(np.mean([d.mean() for d in differences]))
    error = np.sqrt(sum(d.var(ddof=1) / len(d) for d in differences)) / 2
    from scipy.stats import t

    assert report["overall"]["p_value"] == pytest.approx(2 * t.sf(report["overall"]["mean"] / error, 38), rel=1e-5)


def test_what_one_side_lacks_is_left_out(tmp_path, numbers):
    a, b, tasks = (part[:6] for part in numbers)
    masked = np.where(np.arange(6) == 2, np.nan, a)
    report, pairs = compare_folders(folder_of(tmp_path / "a", masked, tasks), folder_of(tmp_path / "b", b[:5], tasks))
    kept = [0, 1, 3, 4]
    assert len(pairs) == 4 and report["images_of_one_alone"] == 3
    assert report["overall"]["p_value"] == pytest.approx(ttest_rel(b[kept], a[kept]).pvalue, rel=1e-6)


def test_equal_results_are_no_difference(tmp_path, numbers):
    a, _, tasks = numbers
    report, _ = compare_folders(folder_of(tmp_path / "a", a, tasks), folder_of(tmp_path / "b", a, tasks))
    assert report["overall"] | {"a": 0, "b": 0} == {
        "a": 0, "b": 0, "mean": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0, "clusters": 40
    }  # fmt: skip


def test_what_cannot_be_compared(tmp_path, numbers):
    a, b, tasks = numbers
    first = folder_of(tmp_path / "a", a, tasks)
    other = {"name": "geneval", "title": "GenEval", "overall": "tasks", "pooled": False}
    with pytest.raises(ValueError, match="expected one benchmark"):
        compare_folders(first, folder_of(tmp_path / "b", b, tasks, benchmark=other))
    changed = folder_of(tmp_path / "c", b, tasks)
    text = (changed / "results.jsonl").read_text().replace("prompt 3", "prompt three")
    (changed / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match="'prompt 3' in one and 'prompt three' in the other"):
        compare_folders(first, changed)
    with pytest.raises(ValueError, match="at least two"):
        compare_folders(first, folder_of(tmp_path / "d", b[:1], tasks))
    with pytest.raises(ValueError, match=r"settings\.json can't be read"):
        compare_folders(first, tmp_path)


def test_the_page_shows_both_sides_and_what_else_differs(tmp_path, numbers, capsys):
    from rich.console import Console

    a, b, tasks = numbers
    tasks = ["<b>bold</b>[red]\x1b[1m" if task == "big" else task for task in tasks]
    first = folder_of(tmp_path / "a", a, tasks, painting={"seed": 1})
    second = folder_of(tmp_path / "b #2", b, tasks, painting={"seed": 2})
    for folder in (first, second):
        (folder / image_file(0, 0)).parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(folder / image_file(0, 0))
    run_comparison(str(first), str(second), tmp_path / "c", Console(width=120))
    report = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert report["different_settings"] == {"painting.seed": {"a": 1, "b": 2}}
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page and "painting.seed" in page
    assert page.count("data:image/jpeg") == 2 and page.count("image missing") == 78
    assert 'href="../a/images/00000/samples/0000.png"' in page and "b%20%232/images" in page
    output = capsys.readouterr().out
    assert (
        "<b>bold</b>[red]␛[1m" in output
        and "B - A" in output
        and re.search(r"painting\.seed is 1 in A, 2 in B", output)
    )
