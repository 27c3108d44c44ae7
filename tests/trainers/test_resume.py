"""A run that stops and goes on ends bit for bit where it would have ended."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_unified import prompts_dataset, tiny_bagel


@pytest.mark.parametrize(
    ("adapted", "settings"),
    [
        (False, {}),
        (True, {}),
        (False, {"image_objective": "fpo"}),
        (False, {"guidance_scale": 2.0}),
        (True, {"image_objective": "nft", "image_old_policy_decay": 0.5, "ema_decay": 0.8}),
    ],
    ids=["full", "lora", "lines", "guidance", "averages"],
)
def test_resume_is_exact(make_trainer, tmp_path, adapted, settings):
    """Between two generations, and between the passes over the second; after both comes a third."""

    def run_on(folder, stop=None):
        resume = None if stop is None else tmp_path / "whole" / f"checkpoint-{stop}"
        config = LoraConfig(r=2) if adapted else None
        return run(make_trainer, tmp_path / folder, resume, max_steps=5, peft_config=config, **settings)

    whole = run_on("whole")
    for stop in (2, 3):
        assert_equal_runs(whole, run_on(f"resumed-{stop}", stop), stop)


def test_resume_inside_a_generation_of_several_updates(make_trainer, tmp_path):
    arguments = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 5}
    whole = run(make_trainer, tmp_path / "whole", **arguments)
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3", **arguments)
    assert_equal_runs(whole, resumed, 3)


@pytest.mark.parametrize("stop", [2, 3], ids=["between-epochs", "in-the-second-epoch"])
def test_later_epochs_have_the_order_that_they_would_have_had(make_trainer, tmp_path, stop):
    rows = prompts_dataset(["a cat", "a dog", "a tree", "the mat"], copies=1)  # an epoch is two generations
    arguments = {"train_dataset": rows, "num_iterations": 1, "max_steps": 5}
    whole = run(make_trainer, tmp_path / "whole", **arguments)
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{stop}", **arguments)
    assert_equal_runs(whole, resumed, stop)


def test_resume_with_weights_that_never_had_a_gradient(make_trainer, tmp_path):
    def model():
        spare = tiny_bagel()
        spare.register_parameter("spare_text", torch.nn.Parameter(torch.ones(3)))
        spare.register_parameter("spare_moe_gen", torch.nn.Parameter(torch.ones(3)))
        return spare

    whole = run(make_trainer, tmp_path / "whole", model=model(), max_steps=4)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run(make_trainer, tmp_path / "resumed", checkpoint, model=model(), max_steps=4)
    assert_equal_runs(whole, resumed, 3)
    trained = sum(len(group["params"]) for group in whole.optimizer.param_groups)
    assert trained == len(whole.optimizer.state_dict()["state"]) + 2


def test_both_learning_rates_survive(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "whole", max_steps=4)
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3", max_steps=4)
    log = next(entry for entry in resumed.state.log_history if entry["step"] == 4)
    assert log["learning_rate/text"] == pytest.approx(1e-3 * 0.25)
    assert log["learning_rate/image"] == pytest.approx(3e-3 * 0.25)


@pytest.mark.parametrize("how", ["file-missing", "other-batches"])
def test_checkpoint_without_fitting_rollouts_goes_on_with_a_fresh_generation(make_trainer, tmp_path, how):
    run(make_trainer, tmp_path / "whole", max_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    arguments = {}
    if how == "file-missing":
        (checkpoint / "rollouts_0.pt").unlink()
    else:
        arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.warns(UserWarning, match=r"checkpoint-3 has no rollouts of a run with these batch sizes"):
        resumed = run(make_trainer, tmp_path / "resumed", checkpoint, **arguments)
    assert resumed.state.global_step == 6
    # The cycle of generations stays in step with the data: 0, 2 and 4 begin one each.
    assert resumed._step == 6 * resumed.args.gradient_accumulation_steps
    assert resumed.generation == 3
    logs = {entry["step"]: entry for entry in resumed.state.log_history if "loss" in entry}
    assert logs[4]["flow/log_ratio_std"] == 0  # sampled anew, so that it is its own old policy
    assert logs[5]["flow/log_ratio_std"] == 0
    assert logs[6]["flow/log_ratio_std"] > 0


def test_rollouts_are_read_as_data_only(make_trainer, tmp_path):
    run(make_trainer, tmp_path / "whole", max_steps=1)

    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    checkpoint = tmp_path / "whole" / "checkpoint-1"
    torch.save({"step": 2, "geometry": [1], "buffer": Payload()}, checkpoint / "rollouts_0.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported|WeightsUnpickler"):
        run(make_trainer, tmp_path / "resumed", checkpoint)
