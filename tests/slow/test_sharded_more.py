"""A model that FSDP2 spreads: all settings, forms of checkpoints, other numbers of processes, pipelines."""

import pytest
import torch

from tests.helpers.pipeline_updates import FAST, SLOW, assert_same_run, update
from tests.helpers.processes import in_processes
from tests.helpers.sharding import (
    ENVIRONMENT,
    MORE_CASES,
    go_on,
    saved_weights,
    spread_pipelines,
    updates,
    whole_weights,
)
from tests.helpers.sharding import update as bagel_update
from tests.trainers.test_sharded import assert_same_run as assert_same_bagel


pytestmark = pytest.mark.slow

ENVIRONMENTS = {
    "sharded state dicts": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
    "weights of the first process": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "weights stay gathered": {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    "no policy": {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
}
PIPELINES = [
    case for case in FAST | SLOW if case != "shared weights" and (FAST | SLOW)[case].get("train_dead_images", True)
]


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    return folder, in_processes(updates, folder, MORE_CASES)


@pytest.mark.parametrize("case", MORE_CASES)
def test_a_spread_model_is_trained_as_one_process_trains_it_in_all_settings(more, tmp_path, case):
    _, ranks = more
    one = bagel_update(tmp_path, case, 4)
    for rank in ranks:
        assert_same_bagel(one, rank[case])
        for name, weight in rank[case]["after"].items():
            assert torch.equal(rank[case]["resumed"][name], weight), name


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_settings_of_fsdp2_change_no_weight(tmp_path, name):
    cases = ["full", "lora"]
    ranks = in_processes(updates, tmp_path, cases, [*ENVIRONMENTS[name].items()])
    for case in cases:
        one = bagel_update(tmp_path / "one" / case, case, 4)
        for rank in ranks:
            assert_same_bagel(one, rank[case])
            assert all(torch.equal(rank[case]["resumed"][key], weight) for key, weight in rank[case]["after"].items())
        saved, expected = saved_weights(tmp_path / case / "saved"), saved_weights(tmp_path / "one" / case / "saved")
        assert saved.keys() == expected.keys()
        for key, weight in saved.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_checkpoint_of_two_processes_goes_on_in_four(tmp_path, form):
    environment = [*{**ENVIRONMENT, "FSDP_STATE_DICT_TYPE": form}.items()]
    two = in_processes(updates, tmp_path / "two", ["full"], environment)[0]["full"]
    checkpoint = tmp_path / "two" / "full" / "run" / "checkpoint-2"
    four = in_processes(go_on, tmp_path / "four", checkpoint, environment, count=4)[0]
    moved, off = (
        torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
        for a, b in ((two["after"], two["before"]), (four, two["after"]))
    )
    assert off <= 1e-4 * moved


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return in_processes(spread_pipelines, tmp_path_factory.mktemp("pipelines"), PIPELINES)


@pytest.mark.parametrize("case", PIPELINES)
def test_a_spread_pipeline_is_trained_as_one_process_trains_it(pipelines, tmp_path, case):
    one = update(tmp_path, case, 4, whole_weights)
    for rank in pipelines:
        assert_same_run(one, rank[case])
