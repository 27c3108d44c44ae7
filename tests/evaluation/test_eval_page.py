"""Pages of results: whatever texts hold is shown as text, and a page's size has a bound."""

import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from trl_unigrpo.evaluation.compare import compare
from trl_unigrpo.evaluation.page import PICTURES, write_comparison, write_index
from trl_unigrpo.evaluation.results import append_lines, image_file, open_folder, read_settings
from trl_unigrpo.evaluation.summary import summarize


EVIL = "<script>alert('{}')</script><img src=x onerror=alert(1)>\x1b[31m\u202e\"'&"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def tags_of(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


def folder_of(path, prompts, samples, size=48, seed=0):
    """Results whose every text is hostile."""
    random = np.random.default_rng(seed)
    benchmark = {"name": "prompts", "title": EVIL.format("title"), "overall": "mean", "pooled": False}
    open_folder(path, {"benchmark": benchmark, "scorer": EVIL.format("scorer"), EVIL.format(f"name {seed}"): seed})
    picture = path / "noise.png"
    Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(picture)
    lines = []
    for row in range(prompts * samples):
        place, sample = row % prompts, row // prompts
        reward = None if row == 1 else float(random.uniform())
        question = {"question": EVIL.format("question"), "expected": "yes", "answer": reward, "earned": reward}
        line = {
            "row": row,
            "key": str(place),
            "index": place,
            "sample": sample,
            "tag": EVIL.format(f"tag {place % 2}"),
        }
        line |= {
            "prompt": f"{place} {EVIL.format('prompt')}",
            "cluster": str(place),
            "image": image_file(place, sample),
        }
        line |= {"thinking": EVIL.format("thinking"), "reward": reward, "scores": {EVIL.format("score"): reward}}
        line |= {
            "questions": [question | {"group": EVIL.format("group")}] * 14,
            "error": EVIL.format("error"),
            "seconds": 1.0,
        }
        lines.append(line)
        (path / line["image"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, path / line["image"])
    append_lines(path, lines)
    return path, lines


def index_of(path, prompts, samples, **options):
    folder, lines = folder_of(path, prompts, samples, **options)
    more = {"model": EVIL.format("model"), "problems": [EVIL.format("problem")] * 25, "notes": [EVIL.format("note")]}
    write_index(folder, {**summarize(read_settings(folder), lines, EVIL.format("label")), **more}, lines)
    return (folder / "index.html").read_text(encoding="utf-8")


def harmless(page):
    kinds = {tag for tag, _ in tags_of(page)}
    assert not kinds & {"script", "iframe", "object", "base", "form", "input"}
    for tag, attributes in tags_of(page):
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/jpeg;base64,")
        if tag == "a":
            assert attributes["href"].endswith(".png") and ":" not in attributes["href"]
    assert "\x1b" not in page and "\u202e" not in page


@pytest.mark.parametrize("samples", [1, 2])
def test_hostile_texts_are_texts(tmp_path, samples):
    page = index_of(tmp_path, 4, samples)
    harmless(page)
    for name in (
        "prompt",
        "thinking",
        "question",
        "group",
        "tag 1",
        "error",
        "label",
        "model",
        "problem",
        "note",
        "score",
    ):
        assert f"alert(&#39;{name}&#39;)" in page, name
    assert page.count("data:image/jpeg") == 4 * samples and "5 more rows were left out" in page
    assert "2 more in results.jsonl" in page and "no score" in page


def test_hostile_texts_are_texts_side_by_side(tmp_path):
    folders = [folder_of(tmp_path / name, 5, 1, seed=seed)[0] for seed, name in enumerate("ab")]
    write_comparison(tmp_path / "c", *compare(*folders))
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    harmless(page)
    for name in ("prompt", "thinking", "question", "tag 0", "title", "name 1"):
        assert f"alert(&#39;{name}&#39;)" in page, name
    assert page.count("data:image/jpeg") == 2 * 4


def test_a_page_of_a_large_benchmark_stays_small(tmp_path):
    """Noise is what JPEG compresses worst."""
    page = index_of(tmp_path, PICTURES, 2, size=256)
    assert page.count("data:image/jpeg") == PICTURES and f"{PICTURES // 2} prompts are not on this page" in page
    assert len(page) < 10e6


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.slow
def test_a_browser_shows_it_without_errors(tmp_path):
    index_of(tmp_path, 4, 2)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    result = subprocess.run([*command, f"file://{tmp_path}/index.html"], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in result.stderr and result.stdout.count("<img") == 8
