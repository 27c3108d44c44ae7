"""Every kind of page in a real browser: no network, no errors, nothing too wide for a phone, images that decode."""

import json

import pytest

from tests.helpers.looking import DESKTOP, PHONE
from tests.helpers.run_folders import HOSTILE, write_run
from trl_unigrpo.reporting.pages import readable, write_page
from trl_unigrpo.reporting.run_files import read_run
from trl_unigrpo.reporting.run_page import comparison_page, run_page, write_report


pytestmark = pytest.mark.browser


@pytest.mark.parametrize(
    "body, problem",
    [
        ("<script>throw new Error('x')</script>", "console: x"),
        ("<script></script>", "1 scripts"),
        ("<img src='https://example.org/a.png'>", "request: https://example.org/a.png"),
        ("<img src='data:image/jpeg;base64,AAAA'>", "image 0 does not decode"),
        ("<div style='width: 500px'>wide</div>", "pixels too wide"),
        ("<details><summary>s</summary><pre>" + "long " * 200 + "</pre></details>", "pixels too wide"),
        ("<p style='font-size: 8px'>tiny</p>", "too small to read"),
    ],
)
def test_a_bad_page_is_found_out(look, tmp_path, body, problem):
    """The tests below would pass if nothing was seen."""
    file = tmp_path / "bad.html"
    file.write_text(f"<!doctype html><meta name=viewport content='width=device-width'><body>{body}")
    assert any(problem in found for found in look(file, PHONE).problems())


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of runs with hostile texts, alarms, an unreadable line and a missing image."""
    root = tmp_path_factory.mktemp("pages")
    run = write_run(root / "run", side=200)
    alarm = {"step": 100, "name": HOSTILE[0], "message": HOSTILE[5], "indices": list(range(100))}
    (run / "alarms.jsonl").write_text(json.dumps(alarm) + "\n{}\n")
    next((run / "gallery" / "images").glob("train*")).unlink()
    other = write_run(root / ("other" * 20), side=48, gain=-0.1, model=HOSTILE[2])
    files = {"run": root / "run.html", "comparison": root / "comparison.html"}
    write_page(files["run"], run_page(read_run(run)))
    write_page(files["comparison"], comparison_page([read_run(run), read_run(other)]))
    return files


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_pages_are_sound(look, pages, name, size, dark):
    found = look(pages[name], size, dark)
    assert found.problems() == []
    assert len(found.seen["images"]) > 5
    assert found.seen["title"] != "stolen"
    assert readable(HOSTILE[0]) in found.seen["text"]
    assert found.seen["background"] == ("rgb(16, 21, 29)" if dark else "rgb(255, 255, 255)")


def test_the_page_of_a_training(look, tmp_path):
    from tests.helpers.tiny_unified import build_trainer, prompts_dataset

    trainer = build_trainer(
        tmp_path,
        max_steps=4,
        gallery_steps=2,
        eval_dataset=prompts_dataset(copies=1),
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=1,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    for file in (tmp_path / "gallery.html", write_report([tmp_path], tmp_path / "again.html")):
        found = look(file, PHONE)
        assert found.problems() == []
        assert len(found.seen["images"]) == 2 * 8 + 2 * 4
        assert "Finished at step 4 of 4" in found.seen["text"]
        assert file.stat().st_size < 5_000_000


def test_the_demo(look, tmp_path):
    from trl_unigrpo.experiments.demo import run_demo

    run_demo(tmp_path, steps=1, num_prompts=7)
    for name, says in (("report.html", "7 prompts that it never saw"), ("gallery.html", "Finished at step 2 of 2")):
        found = look(tmp_path / name, PHONE)
        assert found.problems() == []
        assert says in " ".join(found.seen["text"].split()) and len(found.seen["images"]) >= 14
