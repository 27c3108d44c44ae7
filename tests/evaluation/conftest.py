"""The built-in model and small benchmarks to paint with it."""

import pytest

from trl_unigrpo.evaluation.benchmark import Benchmark, Item, Painting
from trl_unigrpo.evaluation.metrics import accuracy
from trl_unigrpo.rewards.questions.question import Question
from trl_unigrpo.shapeworld import load_base


SMALL = Painting(num_inference_steps=2, image_size=48, max_completion_length=6, batch_size=3, seed=7)


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
