"""The page of the trainer lists the metrics that it logs."""

from pathlib import Path

from trl_unigrpo.monitoring.metrics import LOGGED_METRICS


def test_trainer_page_lists_every_metric_with_its_meaning():
    page = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert {name.strip("`"): meaning for name, meaning in rows} == LOGGED_METRICS
