"""The alarms keep to their share of a step's CPU time."""

import importlib.util
from pathlib import Path


def test_alarms_of_24_pictures_take_less_than_an_eighth_of_a_second():
    file = Path(__file__).parents[2] / "benchmarks" / "monitoring.py"
    spec = importlib.util.spec_from_file_location("monitoring_benchmark", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.LIMIT == 0.125
    assert script.measure(number=24, size=512, repeats=3)["all"] < script.LIMIT
