"""The page of the baselines: its examples run, and its tables state the defaults."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from trl_unigrpo import ReFLConfig, UnifiedSFTConfig, UniGRPOConfig


PAGE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
CONFIGS = {"trainers/sft_trainer.py": UnifiedSFTConfig, "trainers/refl_trainer.py": ReFLConfig}


@pytest.mark.parametrize("heading", ["SFT", "ReFL"])
def test_example_runs(heading, tmp_path, monkeypatch):
    code = PAGE.split(f"\n## {heading}\n")[1].split("```python\n")[1].split("```")[0]
    for name, value in (("max_steps", 1), ("per_device_train_batch_size", 4)):
        code, found = re.subn(rf"{name}=\d+", f"{name}={value}", code)
        assert found == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("30_000", "8"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 1
    assert any("loss" in entry or "train_loss" in entry for entry in trainer.state.log_history)
    assert Path(trainer.args.output_dir).is_dir()


def test_settings_of_the_baselines_are_settings(tmp_path):
    rows = re.findall(r"^\| (.+) \| `(.+)` \|$", PAGE.split("## Objectives on lines")[0], re.MULTILINE)
    configs = {name: UniGRPOConfig(output_dir=str(tmp_path), **eval(f"dict({settings})")) for name, settings in rows}
    assert len(configs) == 7
    trained = {name: (config.text_weight > 0, config.flow_weight > 0) for name, config in configs.items()}
    assert trained["TextGRPO"] == (True, False) and trained["UniFPO"] == (True, True)
    assert all(found == (False, True) for name, found in trained.items() if name not in ("TextGRPO", "UniFPO"))


def test_example_of_a_reward_has_a_gradient():
    names = {}
    exec(PAGE.split("### The reward")[1].split("```python\n")[1].split("```")[0], names)
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    names["reward"](pixels, ["a", "b"], category=["x", "y"]).sum().backward()
    assert pixels.grad.flatten(1).any(1).all()


@pytest.mark.parametrize("file", CONFIGS)
def test_table_states_every_new_field_and_its_default(hooks, file):
    config = CONFIGS[file]
    assert f"{{{{ parameters trl_unigrpo/{file} {config.__name__} }}}}" in PAGE
    table = hooks.parameter_tables(ROOT / "trl_unigrpo" / file, config.__name__)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    stated = {name.strip("`"): default.strip("`") for name, _, default, _ in rows}
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    bases = filter(dataclasses.is_dataclass, config.__mro__[1:])
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    assert {name for name in fields if name not in inherited} <= set(stated)
    for name, default in stated.items():
        assert type(fields[name])(eval(default)) == fields[name], name
