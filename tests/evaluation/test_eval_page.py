"""Pages of results: whatever texts hold is shown as text, and a page's size has a bound."""

from html.parser import HTMLParser

import pytest

from tests.helpers.hostile_results import folder_of, index_of
from trl_unigrpo.evaluation.compare import compare_folders
from trl_unigrpo.evaluation.page import MAX_IMAGES, write_comparison


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
    page = index_of(tmp_path, 4, samples).read_text(encoding="utf-8")
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
    write_comparison(tmp_path / "c", *compare_folders(*folders))
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    harmless(page)
    for name in ("prompt", "thinking", "question", "tag 0", "title", "name 1"):
        assert f"alert(&#39;{name}&#39;)" in page, name
    assert page.count("data:image/jpeg") == 2 * 4


def test_a_page_of_a_large_benchmark_stays_small(tmp_path):
    """Noise is what JPEG compresses worst."""
    page = index_of(tmp_path, MAX_IMAGES, 2, size=256).read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == MAX_IMAGES and f"{MAX_IMAGES // 2} prompts are not on this page" in page
    assert len(page) < 10e6
