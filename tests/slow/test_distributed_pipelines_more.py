"""Two processes make the update of one with models that compute their velocities one by one: the rest."""

import pytest

from tests.helpers.pipeline_updates import (
    SLOW,
    assert_same_run,
    other_update,
    other_updates,
    update,
    updates,
)
from tests.helpers.processes import in_processes


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_processes(updates, tmp_path_factory.mktemp("two"), list(SLOW))


@pytest.mark.parametrize("case", SLOW)
def test_two_processes_make_the_update_of_one(two_processes, tmp_path, case):
    alone = update(tmp_path, case, 4)
    for rank in two_processes:
        assert_same_run(alone, rank[case])


def test_two_processes_fine_tune_as_one_does(tmp_path):
    kinds = ["sft", "refl"]
    ranks = in_processes(other_updates, tmp_path / "two", kinds)
    for kind in kinds:
        alone = other_update(tmp_path / "one", kind, 4)
        for rank in ranks:
            assert_same_run(alone, rank[kind])
