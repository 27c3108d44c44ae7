"""The documentation's tables come from docstrings; a hook that silently finds nothing would leave empty pages."""

import dataclasses
import re

import pytest
from trl import GRPOConfig

from tests.helpers.paths import ROOT
from trl_unigrpo import UniGRPOConfig
from trl_unigrpo.trainers.averages_config import AveragesConfig
from trl_unigrpo.trainers.rounds_config import RoundsConfig
from trl_unigrpo.trainers.scouts_config import ScoutsConfig
from trl_unigrpo.trainers.sharding_config import ShardingConfig
from trl_unigrpo.trainers.sizes_config import SizesConfig
from trl_unigrpo.trainers.thinkings_config import ThinkingsConfig


def test_config_table_names_every_documented_field(hooks):
    table = hooks.parameter_tables(ROOT / "trl_unigrpo" / "trainers" / "unigrpo_config.py", "UniGRPOConfig")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    fields = {field.name for field in dataclasses.fields(UniGRPOConfig)}
    assert len(rows) > 20
    assert {row.split("`")[1] for row in rows} <= fields
    assert all(row.endswith(" |") and len(row.split(" | ")) >= 4 for row in rows)


@pytest.mark.parametrize(
    "config",
    [UniGRPOConfig, SizesConfig, RoundsConfig, AveragesConfig, ScoutsConfig, ThinkingsConfig, ShardingConfig],
)
def test_config_docstring_names_every_new_field(config):
    own = set(config.__annotations__) - {field.name for field in dataclasses.fields(GRPOConfig)}
    documented = config.__doc__
    assert [name for name in sorted(own) if not name.startswith("_") and f"{name} (`" not in documented] == []


def test_class_without_parameters_is_an_error(hooks, tmp_path):
    (tmp_path / "x.py").write_text('class A:\n    """Nothing."""\n')
    with pytest.raises(ValueError, match="no 'Parameters:' section"):
        hooks.parameter_tables(tmp_path / "x.py", "A")


def test_names_that_pages_refer_to_stand_on_a_page():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    shown = {name for text in pages for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    referred = {name for text in pages for name in re.findall(r"\]\[(trl_unigrpo[\w.]+)\]", text)}
    assert referred  # or the form of references has changed
    assert [name for name in referred if not {name, name.rpartition(".")[0]} & shown] == []


def test_example_on_the_flow_page_runs():
    page = (ROOT / "docs" / "flow.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["velocity"].grad.abs().sum() > 0
