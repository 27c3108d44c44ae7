"""The logs, lines and files of a run."""

import math
import types

import datasets
import numpy as np
import pytest
import trl.trainer.grpo_trainer as trl_grpo
from peft import LoraConfig
from PIL import Image

from tests.helpers.tiny_unified import IMAGE_SIZE, beside, prompts_dataset, redness, tiny_bagel
from trl_unigrpo.monitoring.metrics import LOGGED_METRICS
from trl_unigrpo.rewards import thinking_reward


def test_every_documented_metric_is_logged_and_every_logged_one_documented(make_trainer):
    @thinking_reward
    def words(completions, **_):
        return [float(len(text)) for text in completions]

    trainer = make_trainer(
        images_per_thinking=2,
        reward_funcs=[redness, words],
        process_reward_weight=0.5,
        gallery_steps=50,
        eval_dataset=prompts_dataset(copies=1),
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=1,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    generated, updated, evaluated = (
        next(entry for entry in trainer.state.log_history if entry["step"] == step and key in entry)
        for step, key in ((1, "loss"), (2, "loss"), (2, "eval_reward"))
    )
    # The tests of readers' alarms, of scouts, of overlap and of diverse advantages see these.
    elsewhere = {"read_back/letters", "understanding/caption_log_prob", "scouts/agreement", "time/scout"}
    documented = set(LOGGED_METRICS) - elsewhere - {"time/reward_ahead", "images/isolation"}
    for name in documented:
        assert name in generated, name
        assert math.isfinite(generated[name]), name
    ours = {
        key
        for key in {*generated, *updated}
        if key.split("/")[0] in {name.split("/")[0] for name in LOGGED_METRICS} and "/" in key
    }
    assert ours == documented
    assert {"eval_reward", "eval_images/pixel_std", "eval_reward/frac_none", "eval_time/paint"} <= set(evaluated)


def test_metrics_mean_what_they_say(make_trainer, train):
    seen_images = []

    def reward(images, **_):
        seen_images.extend(images)
        return [float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=reward, max_steps=2, image_learning_rate=0.3, optim="sgd")
    seen = train(trainer)
    first, second = trainer.state.log_history[:2]
    spread = np.mean([np.asarray(image, dtype=np.float64).std() for image in seen_images])
    assert first["images/pixel_std"] == pytest.approx(spread, rel=1e-4)

    model = tiny_bagel()
    model.load_state_dict(seen.weights[1], strict=False)
    squares, log_ratios = [], []
    for batch in trainer._buffered_inputs:
        found = beside(trainer, batch["trajectories"])
        states, now = found["steps"].states, model.predict_velocities(found["steps"]).detach()
        squares.append((now - found["reference"]).square().mean().item())
        for k, (t, t_next) in enumerate(zip(states.t, states.t_next, strict=True)):
            c = 1.0 if t == 1 else 1.32
            std = 0.8 if t == 1 else (0.64 * t / (1 - t) * (t - t_next)).sqrt().item()
            old, shift = found["old"][k], 0.32 * (t - t_next) / (1 - t) if t < 1 else 0.32
            noise = (states.x_next[k] - (1 - shift) * states.x[k] - c * (t_next - t) * old) / std
            log_ratios.append((noise * c * (t_next - t) * (now[k] - old)).mean().item())
    assert second["flow/velocity_mse"] == pytest.approx(np.mean(squares), rel=1e-3)
    assert second["flow/ratio_mean"] == pytest.approx(np.exp(log_ratios).mean(), abs=2e-6)
    per_batch = np.array(log_ratios).reshape(2, -1)
    assert second["flow/log_ratio_std"] == pytest.approx(per_batch.std(1).mean(), rel=1e-2)
    assert second["flow/clip_frac"] == pytest.approx(
        np.mean(np.abs(np.expm1(log_ratios)) > trainer._setup.objective.clip_range(now))
    )


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_tables_show_each_image_beside_its_prompt(make_trainer, monkeypatch, backend):
    tables = []
    stub = types.SimpleNamespace(
        run=object(),
        Image=lambda image: image,
        Table=lambda dataframe: dataframe,
        log=lambda entry: tables.append(entry["completions"]),
    )
    monkeypatch.setattr(trl_grpo, backend, stub, raising=False)
    shown = []

    def reward(prompts, images, **_):
        shown.extend(zip(prompts, images, strict=True))
        return [float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=reward, log_completions=True, max_steps=1)
    trainer.args.report_to = [backend]
    trainer.train()
    assert len(tables[0]) == 8
    for (prompt, image), (_, row) in zip(shown, tables[0].iterrows(), strict=True):
        assert row["prompt"] == prompt
        assert row["image"] == [image]


def test_images_lie_in_parquet_as_datasets_reads_them(make_trainer, tmp_path):
    kept = {}

    def reward(prompts, completions, images, **_):
        kept.update(prompts=prompts, completions=completions, images=images)
        return [float(i) for i in range(len(images))]

    make_trainer(reward_funcs=reward, log_completions=True, max_steps=1).train()
    file = tmp_path / "completions" / "images_00001.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows["prompt"][:] == kept["prompts"]
    assert rows["completion"][:] == kept["completions"]
    assert rows["reward"][:] == [float(i) for i in range(8)]
    assert len(rows["advantage"]) == 8
    for row, image in zip(rows, kept["images"], strict=True):
        assert isinstance(row["image"], Image.Image)
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image))


@pytest.mark.parametrize("conversational", [False, True])
def test_parquet_of_evaluation_and_training_stay_aligned(make_trainer, tmp_path, conversational):
    prompts = ["a red cat", "a small tree"]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    trainer = make_trainer(
        train_dataset=prompts_dataset(prompts, copies=4),
        eval_dataset=prompts_dataset(prompts, copies=1),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        log_completions=True,
    )
    trainer.train()
    file = tmp_path / "completions" / "images_00002.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 8


def test_images_can_be_left_out(make_trainer, tmp_path):
    make_trainer(log_completions=True, log_completions_images=False, log_multimodal=False, max_steps=1).train()
    names = {file.name for file in (tmp_path / "completions").iterdir()}
    assert names == {"completions_00001.parquet"}


def test_model_card_paints(make_trainer, tmp_path):
    trainer = make_trainer(peft_config=LoraConfig(r=2), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "from trl_unigrpo.evaluation import generate" in card
    assert "image.save(" in card
    assert "text-generation" not in card
    assert "2603.23500" in card
    assert "UniGRPO" in card
    assert card.startswith("---")
    assert card.count("## Quick start") == 1
    assert "## Training procedure" in card


def test_image_size_of_the_images_is_the_configured_one(make_trainer):
    sizes = set()

    def reward(images, **_):
        sizes.update(image.size for image in images)
        return [0.0] * len(images)

    make_trainer(reward_funcs=reward, image_size=2 * IMAGE_SIZE, max_steps=1).train()
    assert sizes == {(2 * IMAGE_SIZE, 2 * IMAGE_SIZE)}
