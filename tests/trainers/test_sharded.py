"""A model that FSDP2 spreads over two processes is trained as one process trains it."""

import pytest
import torch

from tests.helpers.processes import in_processes
from tests.helpers.sharding import CASES, gathers, norms_of, precisions, saved_weights, update, updates
from tests.helpers.tiny_unified import FixedTexts, build_trainer, tiny_config


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, in_processes(all_of_them, folder)


def all_of_them(folder, rank):
    return {
        "updates": updates(folder, rank, CASES),
        "gathers": gathers(folder, rank),
        "bf16": precisions(folder, rank),
    }


def assert_same_run(one, two):
    """Weights to 1e-4 of the distance that they moved, of each expert; what was logged of a step too."""
    before, after, found = one["before"], one["after"], two["after"]
    assert before.keys() == after.keys() == found.keys()
    for of_image in (False, True):
        names = [name for name in before if ("moe_gen" in name or "vae" in name) == of_image]
        if not names:
            continue
        moved, off = (
            torch.cat([(a[n] - b[n]).flatten() for n in names]) for a, b in ((after, before), (found, after))
        )
        assert off.norm() <= 1e-4 * moved.norm()
    compared = (
        "reward",
        "loss",
        "grad_norm",
        "flow/velocity_mse",
        "flow/ratio_mean",
        "images/pixel_std",
        "eval_reward",
    )
    for alone, together in zip(one["log"], two["log"], strict=True):
        for name in compared:
            if name in alone:
                assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_a_spread_model_is_trained_as_one_process_trains_it(sharded, tmp_path, case):
    folder, ranks = sharded
    one = update(tmp_path, case, 4)
    for rank in ranks:
        two = rank["updates"][case]
        assert_same_run(one, two)
        for name, weight in two["after"].items():  # goes on from a checkpoint as if nothing had been
            assert torch.equal(two["resumed"][name], weight), name
    saved, expected = saved_weights(folder / case / "saved"), saved_weights(tmp_path / "saved")
    assert saved.keys() == expected.keys()
    for name, weight in saved.items():
        assert weight.dtype == expected[name].dtype
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    names = [{file.name for file in (place / "saved").iterdir()} for place in (folder / case, tmp_path)]
    assert names[0] == names[1]


def test_processes_hold_all_weights_in_a_rollout_or_go_on_together(sharded):
    """Thinkings have 3 tokens in one process and 12 in the other, which ask for weights 4 times as often."""
    first, second = (rank["gathers"] for rank in sharded[1])
    for name in ("held", "travelling"):
        (count, lengths), (other, other_lengths) = first[name][0], second[name][0]
        assert count == other
        assert {*lengths} == {3}
        assert {*other_lengths} == {12}
    held, travelling = (first[name][0][0] for name in ("held", "travelling"))
    assert held <= 1 < travelling  # `generate` lets go of the weights that belong to no layer


def test_states_stay_float32_where_weights_are_gathered_in_bf16(sharded, tmp_path):
    """Start-up and trust checks pass, too, which raise."""
    alone = build_trainer(tmp_path, bf16=True, per_device_train_batch_size=4, trainer_class=FixedTexts)
    alone.train()
    for rank in sharded[1]:
        found = rank["bf16"]
        assert found["gathered"] == {torch.bfloat16}
        assert found["kept"] == {torch.float32}
        assert found["rounded"] and not any(found["rounded"])  # log-probs
        assert found["norms"] == pytest.approx(norms_of(alone), rel=0.05)


def test_gradients_are_reduced_after_each_micro_batch(sharded):
    """By itself accelerate lets whole ones stay until the last."""
    for rank in sharded[1]:
        assert rank["bf16"]["accumulation"]["sync_each_batch"] is True


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "means FSDP version 1: set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported .*Set reference_on_cpu=True"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "fsdp_activation_checkpointing .*gradient_checkpointing=True"),
        ({}, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 is not supported with FSDP, which"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism_config is not supported .*Leave it out"),
        ({}, {"num_rounds": 2}, "num_rounds=2 is not supported with FSDP.*plain data parallelism"),
        (
            {},
            {"gather_for_rollout": False},
            "without image_batch_size .*Set image_batch_size",
        ),
    ],
)
def test_what_fsdp2_can_t_do_is_refused_at_once(tmp_path, monkeypatch, environment, settings, message):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)
