import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["matching", "ratio", "schedule", "transition"])
def test_examples_run(name):
    result = doctest.testmod(import_module(f"trl_unigrpo.flow.{name}"))
    assert result.attempted > 0 and result.failed == 0
