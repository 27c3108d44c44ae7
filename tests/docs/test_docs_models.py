"""The page about a model of one's own: its code runs from top to bottom, and is as short as it says."""

from tests.helpers.models_page import code_blocks, toy_module
from tests.helpers.paths import ROOT
from trl_unigrpo.models.contract import OUTSIDE_FORWARD, PACKED_METHODS, REQUIRED_METHODS
from trl_unigrpo.testing import CHECKS


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = dict(vars(toy_module()))
    for block in code_blocks()[2:]:
        exec(block, names)
    out = capsys.readouterr().out
    assert f"{len(CHECKS)} promises kept" in out
    assert "(8, 8)" in out
    assert {path.name for path in tmp_path.iterdir()} >= {"toy-all-weights", "toy-adapters"}
    for check in CHECKS[:2]:
        names["test_contract"](check)


def test_the_model_is_about_forty_lines():
    model = code_blocks()[0].split("class ToyConfig")[1].split("AutoConfig.register")[0]
    assert sum(bool(line.strip()) for line in model.splitlines()) <= 40


def test_the_page_names_every_method():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in REQUIRED_METHODS if f"| `{name}(" not in page] == []
    assert [name for name in (*OUTSIDE_FORWARD, *PACKED_METHODS) if name not in page] == []
