"""The demo without a judge: the rule has no part in its training, and its page says what the rule found."""

import inspect

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr

from trl_unigrpo.experiments.demo.demo import choose_task, train_demo_model
from trl_unigrpo.experiments.demo.paint import UNIGRPO, UNINFT, Beside, PaintTask
from trl_unigrpo.experiments.demo.read_back import ReadBackTask
from trl_unigrpo.rewards import ReadBackReward
from trl_unigrpo.shapeworld import verifier
from trl_unigrpo.shapeworld.agreement import rank_correlation
from trl_unigrpo.shapeworld.base import load_base
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


def forbidden(*args, **kwargs):
    raise AssertionError("the rule was asked")


class Small(ReadBackTask):
    def settings(self, rollouts):
        return {**super().settings(rollouts), "num_generations": 4, "per_device_train_batch_size": 8}


def test_the_rule_is_asked_nothing_while_training(tmp_path, monkeypatch):
    """Not by a reward, not by an evaluation, not by a watcher: every function of the rule fails."""
    for _, function in inspect.getmembers(verifier, inspect.isfunction):
        if function.__module__ == verifier.__name__:
            monkeypatch.setattr(function, "__code__", forbidden.__code__)
    with pytest.raises(AssertionError, match="the rule was asked"):
        verifier.shapeworld_reward(["a red circle"], [""], [])
    model, tokenizer = load_base(seeing=True)
    task = Small()
    assert isinstance(task.reward, ReadBackReward)
    trainer, _ = train_demo_model(task, model, tokenizer, tmp_path, 1, 0, Console(quiet=True))
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 1 and all(reward < 0 for reward in logged)
    assert trainer.reward_func_names == ["ReadBackReward"]


@pytest.fixture(scope="module")
def measured():
    model, tokenizer = load_base(seeing=True)
    return ReadBackTask().measure(model, tokenizer, 14)


def test_page_and_numbers(measured, tmp_path):
    task = ReadBackTask()
    summary = task.summary(measured, measured)
    assert summary["agreement_before"] == summary["agreement_after"] == measured.agreement._asdict()
    assert 0.5 < measured.agreement.mean < 1  # of the shipped base: docs/readback.md
    summary |= {"steps": 1, "train_seconds": 1.0, "threads": 1, "seed": 0, "versions": {}}
    args = UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for gain, verdict in ((0.1, "Trained without any judge, verified by the rule:"), (-0.1, "It got worse:")):
        summary |= {"gain": gain, "ci95_gain": [gain - 0.02, gain + 0.02]}
        task.write_report(tmp_path / "report.html", measured, measured, [{"reward": -1.0}], summary, args)
        page = " ".join((tmp_path / "report.html").read_text().split())
        assert f"<b>{verdict}</b> on 14 prompts" in page
        assert f"correlate by {measured.agreement.mean:.2f} before training" in page


def test_page_of_the_rule_says_nothing_of_reading(measured, tmp_path):
    task = PaintTask()
    summary = task.summary(measured, measured)
    summary |= {"gain": 0.1, "ci95_gain": [0.08, 0.12], "steps": 1, "train_seconds": 1.0, "threads": 1, "seed": 0}
    args = UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    told = summary | {"versions": {}}
    task.write_report(tmp_path / "report.html", measured, measured, [{"reward": 0.5}], told, args)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "<b>It works:</b> on 14 prompts that it never saw, the reward moved by +0.100" in page
    assert "correlate" not in page


def test_two_methods_stand_side_by_side(measured, tmp_path):
    task = PaintTask()
    summary = task.summary(measured, measured) | {"steps": 45, "threads": 1, "seed": 0, "versions": {}}
    task.beside = Beside("UniGRPO", summary | {"gain": 0.2, "train_seconds": 240.0, "steps": 140}, measured)
    args = UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    told = summary | {"gain": 0.1, "train_seconds": 60.0}
    task.write_report(tmp_path / "report.html", measured, measured, [{"reward": 0.5}], told, args)
    page = " ".join((tmp_path / "report.html").read_text().split())
    for name, seconds, rollouts, gain in (("UniGRPO", 240, 140, "+0.200"), ("UniNFT", 60, 45, "+0.100")):
        row = f'<td>{name}</td><td class="n">{seconds}</td><td class="n">{rollouts}</td>'
        assert row in page and f"<td>{gain} (" in page[page.index(row) :]
    assert page.count('alt="UniGRPO: ') == page.count('alt="UniNFT: ') == page.count('alt="before: ') > 0


def test_ranks_are_correlated_as_spearman_does():
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = random.integers(0, 5, 16).astype(float), random.normal(size=16)
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_settings_are_those_that_were_measured():
    chosen = {"max_steps": 90, "image_objective": "nft", "num_inference_steps": 6, "matching_samples": 3}
    chosen |= {"flow_regularizer": "none", "learning_rate": 6e-4, "image_learning_rate": 4e-4}
    settings = ReadBackTask().settings(ReadBackTask().rollouts)
    assert {name: settings[name] for name in chosen} == chosen  # docs/readback.md has what comes of them


def test_tasks_by_name():
    assert type(choose_task("paint", "readback")) is ReadBackTask
    assert type(choose_task("paint", "rule")) is PaintTask
    with pytest.raises(ValueError, match="reward='readback' with task='edit': expected 'rule', or 'readback' with"):
        choose_task("edit", "readback")
    methods = [choose_task("paint", "rule", method).method for method in ("fast", "paper", "both")]
    assert methods == [UNINFT, UNIGRPO, UNINFT]
    with pytest.raises(ValueError, match="method='paper' with task='edit' and reward='rule': expected 'fast', or"):
        choose_task("edit", method="paper")
    with pytest.raises(ValueError, match="method='slow'"):
        choose_task("paint", method="slow")
