"""Pages of evaluations in a real browser: sound on a phone and on a desk, whatever their texts hold."""

import pytest

from tests.helpers.looking import DESKTOP, PHONE
from trl_unigrpo.evaluation.compare import compare_folders
from trl_unigrpo.evaluation.page import write_comparison


pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    from tests.helpers.hostile_results import folder_of, index_of

    root = tmp_path_factory.mktemp("eval")
    folders = [folder_of(root / name, 6, 1, seed=seed)[0] for seed, name in enumerate("ab")]
    write_comparison(root, *compare_folders(*folders))
    return {"one": index_of(root / "one", 6, 1), "four": index_of(root / "four", 3, 4), "both": root / "compare.html"}


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
@pytest.mark.parametrize(("name", "images"), [("one", 6), ("four", 12), ("both", 10)])
def test_pages_are_sound(look, pages, name, images, size):
    found = look(pages[name], size)
    assert found.problems() == []
    assert len(found.seen["images"]) == images
    assert "<script>alert('prompt')</script>" in found.seen["text"]
