"""ShapeWorld's reward behind a server: the same scores, the same training."""

import asyncio

import numpy as np
import torch

from tests.helpers.paths import ROOT
from tests.helpers.serving import serving
from trl_unigrpo.rewards import RemoteReward
from trl_unigrpo.shapeworld import load_base, shapeworld_dataset, shapeworld_reward
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


def test_shapeworld_scores_through_the_wire_are_the_local_ones():
    prompts = shapeworld_dataset("validation", 35)["prompt"]
    images = render_images(np.random.default_rng(0).integers(0, 12, (35, 9)))
    local = shapeworld_reward(prompts, [""] * 35, images)
    assert len(set(local)) > 5
    with serving(shapeworld_reward) as address:
        reward = RemoteReward(address)
        there = asyncio.run(reward(prompts=prompts, completions=[""] * 35, images=images))
    assert there == local
    assert reward.__name__ == "shapeworld_reward"


def train(reward, output_dir):
    torch.manual_seed(0)
    model, _ = load_base()
    args = UniGRPOConfig(
        output_dir=str(output_dir),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=48,
        image_size=48,
        num_inference_steps=6,
        gradient_checkpointing=False,
        learning_rate=3e-4,
        image_learning_rate=1e-4,
    )
    trainer = UniGRPOTrainer(model, reward, args, train_dataset=shapeworld_dataset("train", 8))
    trainer.train()
    return trainer


def test_training_with_a_served_reward_is_training_with_the_local_one(tmp_path):
    local = train(shapeworld_reward, tmp_path / "local")
    with serving(shapeworld_reward) as address:
        served = train(RemoteReward(address, batch_size=3), tmp_path / "served")
    for name in ("reward", "reward_std", "rewards/shapeworld_reward/mean", "rewards/shapeworld_reward/std"):
        assert served.state.log_history[0][name] == local.state.log_history[0][name]
    assert local.state.log_history[0]["reward_std"] > 0
    assert served.state.log_history[0]["shapeworld_reward/failed"] == 0
    theirs = served.model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in local.model.state_dict().items())
    base = load_base()[0].state_dict()
    assert any(not torch.equal(weight, base[name]) for name, weight in theirs.items())


def test_example_on_the_page_of_served_rewards_runs(capsys):
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    code = page.split("## Rewards over HTTP\n")[1].split("```python\n")[1].split("```")[0]
    with serving(shapeworld_reward) as address:
        exec(code.replace("http://127.0.0.1:8000", address), {})
    assert capsys.readouterr().out == code.split("# ")[1]
