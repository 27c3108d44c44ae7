"""The built-in model, small benchmarks to paint with it, and the judge's server of the rewards' tests."""

import sys
from pathlib import Path

import pytest
import torch

from trl_unigrpo.evaluation.benchmark import Benchmark, Item, Painting
from trl_unigrpo.evaluation.metrics import accuracy
from trl_unigrpo.rewards.questions.question import Question
from trl_unigrpo.shapeworld import load_base


TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "rewards"), str(TESTS / "models")]

SMALL = Painting(num_inference_steps=2, image_size=48, max_completion_length=6, batch_size=3, seed=7)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base():
    """The built-in model and its tokenizer."""
    return load_base()


@pytest.fixture
def asked():
    """Four prompts of two tasks, each with two questions, painted small."""
    items = [
        Item(
            f"line {place}",
            prompt,
            "circles" if "circle" in prompt else "squares",
            (Question(f"Is there a shape in {place}?", group="shape"), Question(f"Is {place} empty?", "no", "empty")),
        )
        for place, prompt in enumerate(["a red circle", "a blue square", "a green circle", "a pink square"])
    ]
    return Benchmark("prompts", "four prompts", tuple(items), metric=accuracy, painting=SMALL)
