"""ShapeWorld trained with a judge behind an endpoint: a server that judges by the verifier is the verifier."""

import json
import re
import runpy
import sys

import pytest
from transformers import PrinterCallback, set_seed

from tests.helpers.judge_server import ChatServer, images_of, text_of, yes
from tests.helpers.paths import ROOT
from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.shapeworld import (
    BASE,
    demo_settings,
    shapeworld_dataset,
    shapeworld_reward,
)


EXAMPLE = ROOT / "examples" / "judge_shapeworld.py"
SETTINGS = {"max_steps": 4, "num_generations": 4, "per_device_train_batch_size": 16, "num_inference_steps": 6}


def verified(body, attempt):
    """P(yes) is the verifier's score of the image that came, for the prompt that came."""
    (prompt,) = re.findall(r'"(?:[^"\\]|\\.)*"', text_of(body))
    return yes(shapeworld_reward([json.loads(prompt)], [""], images_of(body))[0])


def test_example_with_a_judge_gives_the_verifiers_rewards(tmp_path, monkeypatch):
    options = [str(part) for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    with ChatServer(verified) as server:
        command = [
            "judge_shapeworld.py",
            "--base_url",
            server.url,
            "--judge",
            "m",
            "--output_dir",
            tmp_path / "judged",
        ]
        monkeypatch.setattr(sys, "argv", [str(part) for part in (*command, *options, "--disable_tqdm", "True")])
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        set_seed(42)
        judged = runpy.run_path(str(EXAMPLE), run_name="__main__")["trainer"].state.log_history
    args = UniGRPOConfig(output_dir=str(tmp_path), disable_tqdm=True, **{**demo_settings(), **SETTINGS})
    set_seed(42)
    trainer = UniGRPOTrainer(str(BASE), shapeworld_reward, args=args, train_dataset=shapeworld_dataset("train"))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    verified_log = trainer.state.log_history
    assert len(server.requests) == 2 * 16  # two rollouts, each trained on twice
    rewards = [[row["reward"] for row in log if "reward" in row] for log in (judged, verified_log)]
    spreads = [[row["reward_std"] for row in log if "reward" in row] for log in (judged, verified_log)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6) and spreads[0] == pytest.approx(spreads[1], abs=1e-6)
    assert min(rewards[0]) > 0 and max(rewards[0]) < 1 and min(spreads[0]) > 0  # there was something to learn
    assert [row["rewards/VLMJudge/mean"] for row in judged if "reward" in row] == pytest.approx(rewards[1], abs=1e-6)
    assert all(row["VLMJudge/failed"] == 0 for row in judged if "VLMJudge/failed" in row)
    assert any("VLMJudge/failed" in row for row in judged)
