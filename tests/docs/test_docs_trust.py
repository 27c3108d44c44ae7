"""The page on trust names what there is: alarms, and the tests that make each fault."""

import ast
import re

import pytest

from tests.helpers.paths import ROOT
from trl_unigrpo.monitoring.image_alarms import RULES


PAGE = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_named_test_exists(file, test):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_report_has_a_check_and_a_test():
    table = PAGE.split("## What has ruined public runs")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 25
    for report, wrong, here, tests in rows:
        assert wrong and here and NAMED and "::" in tests, report


def test_table_of_alarms_is_what_can_be_given():
    table = PAGE.split("## Alarms")[1].split('"Up" and')[0]
    listed = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([\w/]+)`", line.split(" | ")[0])
    }
    source = "".join(file.read_text() for file in (ROOT / "trl_unigrpo" / "monitoring").glob("*_alarms.py"))
    given = set(re.findall(r'Alarm\("([\w/]+)"', source)) | set(RULES) | {"update/not_finite"}
    given |= {f"update/{name}" for name in ("grad_norm/text", "grad_norm/image", "log_ratio_std", "velocity_mse")}
    assert listed == given
