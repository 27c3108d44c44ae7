"""The pages of the trainers list the metrics that they log."""

from tests.helpers.paths import ROOT
from trl_unigrpo.monitoring.metrics import LOGGED_METRICS, REFL_METRICS


def test_trainer_page_lists_every_metric_with_its_meaning():
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    table = page.split("## Logged metrics")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): meaning for name, meaning in rows} == LOGGED_METRICS


def test_baselines_page_lists_every_metric_of_refl_with_its_meaning():
    page = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    table = page.split("### Logged metrics")[1].split("\n### ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): meaning for name, meaning in rows} == REFL_METRICS
