"""Updates of models that compute their velocities one by one, by one process or by several."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from tests.helpers.tiny_cosmos3 import tiny_cosmos3
from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import tokenizer
from tests.helpers.tiny_unified import SPECIAL, WORDS, FixedTexts, build_trainer, prompts_dataset, redness, weights
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer


def equal_for_some(prompts, completions, images, **_):
    """One reward for all of a group, for two of the four prompts: in a generation one process may have these alone."""
    found = redness(prompts, completions, images)
    return [0.7 if "cat" in prompt else red for prompt, red in zip(prompts, found, strict=True)]


def toy():
    return toy_painter(len(SPECIAL) + len(WORDS) + 3)


def with_unused_weights():
    """The last block's text, which no image depends on, has weights in this family."""
    return tiny_model("qwen_image")


# The update is the gradient itself: Adam would blow the last digits of a tiny one up, and so does a token that the
# clip range has just left in. Two passes over a generation and one over the next, of two micro-batches each.
SETTINGS = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "image_learning_rate": 0.5,
    "epsilon": 0.9,
    "epsilon_high": 9.0,
    "max_steps": 3,
}
# Means over the tokens, or spreads over the images, of each micro-batch, which has other rows in another process.
OF_MICRO_BATCHES = ("entropy", "kl", "flow/log_ratio_std", "clip_ratio/high_max")
TIMES = ("time/", "step_time", "train_")
FAST = {
    "full": {},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "context": {"model": toy, "flow_context_grad": "full"},
}
SLOW = {
    "full, checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "image alone": {"text_weight": 0.0},
    "text alone": {"flow_weight": 0.0},
    "image alone, lora": {"lora": True, "text_weight": 0.0},
    "accumulation": {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 1},
    "dead images": {"reward_funcs": equal_for_some, "train_dead_images": False},
    "unused weights": {"model": with_unused_weights, "image_size": 32},
    "shared weights": {"model": tiny_cosmos3, "lora": True, "image_size": 32},
    "guidance": {"guidance_scale": 3.0},
    "text kl": {"beta": 0.1},
    "lines": {"image_objective": "awm"},
}


def update(folder, case, per_device_train_batch_size, weights=weights):
    """Weights before and after a run, and its log; `weights` copies those of a model."""
    settings = {"model": tiny_model, **SETTINGS, **(FAST | SLOW)[case]}
    lora, make = settings.pop("lora", False), settings.pop("model")
    trainer = build_trainer(
        folder,
        model=make(),
        trainer_class=FixedTexts,
        per_device_train_batch_size=per_device_train_batch_size,
        processing_class=None if make is toy else tokenizer(),
        peft_config=LoraConfig(r=2) if lora else None,
        **settings,
    )
    before = weights(trainer.model)
    trainer.train()
    return before, weights(trainer.model), trainer.state.log_history[:-1]


def other_update(folder, kind, size):
    """The same of the other trainers."""
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    model = tiny_model()
    if kind == "sft":
        args = UnifiedSFTConfig(str(folder), **settings)
        images = [Image.new("RGB", (8, 8), (60 * i, 200, 20)) for i in range(4)]
        rows = prompts_dataset(copies=4, completion=["a b c", "d", "", "e f"], image=images)
        trainer = UnifiedSFTTrainer(model, args, rows, processing_class=tokenizer())
    else:
        args = ReFLConfig(str(folder), image_size=8, max_completion_length=4, temperature=1e-4, **settings)
        trainer = ReFLTrainer(
            model,
            lambda images, texts, **_: images[:, 0].mean((1, 2)),
            args,
            prompts_dataset(),
            processing_class=tokenizer(),
        )
    before = weights(trainer.model)
    trainer.train()
    return (
        before,
        weights(trainer.model),
        [{"loss": log["loss"]} for log in trainer.state.log_history if "loss" in log],
    )


def other_updates(folder, rank, kinds):
    return {kind: other_update(folder / kind, kind, 2)[1:] for kind in kinds}


def updates(folder, rank, cases):
    """Make the updates of some cases in one of two processes."""
    return {case: update(folder / case, case, 2)[1:] for case in cases}


def assert_same_run(one, two):
    """Weights to 1e-4 of the distance that they moved, of each expert, and all that was logged."""
    before, after, log = one
    found, its_log = two
    for of_image in (False, True):
        names = [name for name in before if ("paint" in name) == of_image]
        if not names:
            continue
        moved, off = ([a[name] - b[name] for name in names] for a, b in ((after, before), (found, after)))
        moved, off = (torch.cat([x.flatten() for x in parts]).norm().item() for parts in (moved, off))
        assert off <= 1e-4 * moved, f"{off:.2g} off, moved by {moved:.2g}"
    for alone, together in zip(log, its_log, strict=True):
        assert alone.keys() == together.keys()
        for name in (name for name in alone if not name.startswith((*TIMES, *OF_MICRO_BATCHES))):
            of_pixels = 1e-3 if name.startswith("images/") else 1e-6  # a share of pixels beyond a threshold
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=of_pixels), name
