"""Rewards by name: every spelling, what is refused, and what stays as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trl.rewards import think_format_reward

from trl_unigrpo import rewards as own_rewards
from trl_unigrpo.rewards import VLMJudge
from trl_unigrpo.rewards.loading import load_judged, load_reward


MODULE = """
def brightness(images, **columns):
    import neighbour
    return [neighbour.VALUE] * len(images)


class Same:
    def __call__(self, images, **columns):
        return [2.0] * len(images)


class Sized:
    def __init__(self, size):
        self.size = size

    def __call__(self, images, **columns):
        return [self.size] * len(images)


by_instance = Sized(4.0)
number = 7


def text_only(completions):
    return [0.0] * len(completions)
"""

# Clients and servers of the extra `serve`; what else it asks for comes with typer and huggingface_hub.
SERVE = ("starlette", "uvicorn", "httpx")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two modules, which sys.path does not have yet."""
    (tmp_path / "rewards_of_mine.py").write_text(MODULE)
    (tmp_path / "neighbour.py").write_text("VALUE = 3.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", os.getcwd())])
    yield tmp_path
    for name in ("rewards_of_mine", "neighbour"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("path", ["rewards_of_mine:brightness", "rewards_of_mine.brightness"])
def test_both_spellings_in_the_working_directory(here, path):
    assert load_reward(path)(images=[None, None]) == [3.0, 3.0]  # which imports its neighbour only now


def test_the_search_path_has_the_working_directory_once(here):
    before = list(sys.path)
    for path in ("rewards_of_mine:brightness", "rewards_of_mine.brightness", "trl_unigrpo.rewards:sharpness"):
        load_reward(path)
    assert sys.path == [os.getcwd(), *before]


def test_the_search_path_stays_where_it_finds_the_working_directory_already(here):
    sys.path.insert(0, "")
    before = list(sys.path)
    load_reward("rewards_of_mine:brightness")
    assert sys.path == before


def test_objects_and_classes(here):
    assert load_reward("rewards_of_mine:Same")(images=[None]) == [2.0]
    assert load_reward("rewards_of_mine.by_instance")(images=[None]) == [4.0]
    assert load_reward("rewards_of_mine:by_instance.__call__")(images=[None]) == [4.0]


def test_a_class_that_asks_a_judge_is_made_with_it(here):
    judge = VLMJudge("m", base_url="http://127.0.0.1:9")
    path = "trl_unigrpo.rewards:EditReward"
    reward = load_reward(path, judge)
    assert isinstance(reward, own_rewards.EditReward) and reward.asker is judge
    rewards = load_judged(["rewards_of_mine:brightness", path], judge)
    assert list(rewards) == ["rewards_of_mine:brightness", path] and rewards[path].asker is judge
    with pytest.raises(ValueError, match="EditReward' asks a judge: name one beside it, by --judge-model"):
        load_reward(path)
    with pytest.raises(ValueError, match="No reward among 'rewards_of_mine:brightness' asks the judge"):
        load_judged(["rewards_of_mine:brightness"], judge)


def test_the_package_s_own_rewards_and_trl_s():
    assert load_reward("think_format_reward") is think_format_reward
    for spelling in ("trl_unigrpo.rewards:sharpness", "trl_unigrpo.rewards.sharpness"):
        assert load_reward(spelling) is own_rewards.sharpness


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sharpness", "'sharpness' names no reward. Write it as module:NAME, such as my_rewards:redness"),
        ("trl_unigrpo.rewards", "'trl_unigrpo.rewards' names no reward"),
        ("rewards_of_mine:", "names no reward"),
        ("rewards_of_mine.", "names no reward"),
        (":brightness", "names no reward"),
        (".rewards_of_mine:brightness", "names no reward"),
        ("", "'' names no reward"),
        ("no_such_module:reward", "'no_such_module:reward' can't be imported .No module named.*working directory"),
        ("rewards_of_mine.blueness", "can't be imported .*has no attribute 'blueness'"),
        ("rewards_of_mine:number", "'rewards_of_mine:number' is a int, expected a function or a callable"),
        ("rewards_of_mine:Sized", "a class that can't be made without arguments .*'size'.*Make an instance"),
        ("rewards_of_mine:text_only", "can't be called as a reward .*unexpected keyword argument 'prompts'"),
        ("builtins:print", "can't be called as a reward"),
    ],
)
def test_what_is_refused(here, path, message):
    with pytest.raises(ValueError, match=message):
        load_reward(path)


@pytest.mark.slow
def test_eval_with_rewards_needs_nothing_of_the_extra_serve(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({SERVE!r})); from trl_unigrpo.cli import main; main()"
    command = ["eval", "--prompts", "prompts.txt", "--model", "shapeworld"]
    command += ["--rewards", "trl_unigrpo.rewards:sharpness", "--samples", "1"]
    command += ["--image-size", "48", "--max-completion-length", "4", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-c", blocked, *command, "--output-dir", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[2]), *sys.path))},
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "summary.json").is_file()
