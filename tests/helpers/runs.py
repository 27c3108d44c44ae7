"""Runs of the trainers, and what is compared of them."""

import torch
from transformers import PrinterCallback

from tests.helpers.tiny_unified import moved, weights
from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.monitoring.alarm import read_alarms
from trl_unigrpo.monitoring.alarms import Alarms
from trl_unigrpo.shapeworld import demo_settings, shapeworld_dataset
from trl_unigrpo.shapeworld.base import load_base


NOT_REPEATED = ("time/", "step_time", "train_", "total_flos")

DIVERGING = {
    "optim": "sgd",
    "image_learning_rate": 1.5e-3,  # a third of it is stable
    "max_grad_norm": 1e9,
    "text_weight": 0.0,
    "thinking": False,
    "flow_regularizer_weight": 0.128,  # of the steps of 25: eight times as much at the six of the tiny model
    "max_steps": 25,
    "save_strategy": "steps",
    "save_steps": 1000,
}


def run(make_trainer, folder, resume=None, **arguments):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", **arguments}
    trainer = make_trainer(output_dir=folder, **settings)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_equal_runs(whole, resumed, since):
    assert not moved(weights(whole.model), weights(resumed.model))
    states = [trainer.optimizer.state_dict() for trainer in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for key, state in states[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][key][name]))
    logs = [
        {
            entry["step"]: {k: v for k, v in entry.items() if not k.startswith(NOT_REPEATED)}
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > since
        }
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == whole.args.max_steps - since


def assert_same_update(before, after, other):
    changed = moved(before, after)
    assert changed == moved(before, other)
    assert changed
    for name in changed:
        step, other_step = after[name] - before[name], other[name] - before[name]
        torch.testing.assert_close(step, other_step, rtol=1e-3, atol=1e-3 * step.abs().max().item() + 1e-7, msg=name)


def alarms_of(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Alarms))


def given(folder):
    """Alarm -> its first line."""
    lines = {}
    for line in read_alarms(folder):
        lines.setdefault(line["alarm"], line)
    return lines


def shapeworld_trainer(folder, reward_funcs, steps, **settings):
    """Eight prompts of eight images per generation; no thinking, so that it takes a third of a second."""
    model, tokenizer = load_base()
    chosen = {
        **demo_settings(1),
        "max_steps": steps,
        "num_generations": 8,
        "per_device_train_batch_size": 64,
        "text_weight": 0.0,
        "thinking": False,
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=UniGRPOConfig(output_dir=str(folder), **chosen),
        train_dataset=shapeworld_dataset("train", seed=0),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
