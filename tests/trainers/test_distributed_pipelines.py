"""Two processes make the update of one with models that compute their velocities one by one."""

import pytest

from tests.helpers.pipeline_updates import FAST, assert_same_run, update, updates
from tests.helpers.processes import in_processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_processes(updates, tmp_path_factory.mktemp("two"), list(FAST))


@pytest.mark.parametrize("case", FAST)
def test_two_processes_make_the_update_of_one(two_processes, tmp_path, case):
    alone = update(tmp_path, case, 4)
    for rank in two_processes:
        assert_same_run(alone, rank[case])
