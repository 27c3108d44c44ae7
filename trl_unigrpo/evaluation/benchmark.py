"""A benchmark: prompts, how their images are scored, and how scores become one number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..image_sizes import GivenSize
from ..rewards.common import Scores
from ..rewards.questions.question import Question


_T = TypeVar("_T")

Metric = Callable[[Sequence[Question], Scores], dict[str, float | None]]
"""From an image's questions and P(yes) of each, None where there is none, to its scores; the first is its reward."""


@dataclass(frozen=True)
class Item:
    """
    One prompt of a benchmark.

    Attributes:
        key: its own name within the benchmark.
        prompt: the text that is painted.
        task: the name that it is counted with.
        questions: for a judge.
        columns: the benchmark's own row, for rewards and for `metadata.jsonl`.
        cluster: items of one cluster are alike, and so no independent evidence; the prompt by default.
        source_images: what the prompt says how to edit: paths, PIL images, or undecoded images of `datasets`.
        official: where the benchmark's own scorer looks for its image, below the folder `official`.
    """

    key: str
    prompt: str
    task: str
    questions: tuple[Question, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""
    source_images: tuple[Any, ...] = ()
    official: str = ""

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        object.__setattr__(self, "cluster", self.cluster or self.prompt)


def check_prompt(prompt: Any) -> None:
    """Raise ValueError for what can't be painted: no text, an empty one, or one that is not valid Unicode."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"the prompt is {prompt!r}, expected a text that is not empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is no valid Unicode at character {error.start} (a lone surrogate)") from error


@dataclass(frozen=True)
class Painting:
    """
    Settings that a benchmark is painted with unless the user says otherwise.

    Attributes:
        samples: images of each prompt.
        image_size: the side of a square, or (height, width), in pixels.
        max_completion_length: tokens of a thinking.
    """

    samples: int = 1
    num_inference_steps: int = 50
    image_size: GivenSize = 1024
    max_completion_length: int = 512
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        name, title: for files and for people.
        items: its prompts.
        problems: rows of its file that were left out, each with its line and the reason.
        metric: of answers to questions; None for a benchmark that has no questions.
        overall: "mean" of all images, "tasks" for the mean of the tasks' means, or each task's share.
        pooled: a task's score is the share of its questions, not the mean over its images.
        soft: a question earns its probability, not 1 or 0.
        painting: defaults.
        notes: in which way the numbers differ from the official ones.
    """

    name: str
    title: str
    items: tuple[Item, ...]
    problems: tuple[str, ...] = ()
    metric: Metric | None = None
    overall: str | Mapping[str, float] = "mean"
    pooled: bool = False
    soft: bool = False
    painting: Painting = Painting()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            shown = "".join(f"\n  {problem}" for problem in self.problems[:10])
            raise ValueError(f"{self.title} has no prompt that can be painted.{shown}")


def evenly_spread(values: Sequence[_T], number: int | None) -> tuple[_T, ...]:
    """Take `number` of the values, evenly spread over their list, as over a benchmark's tasks; all of no more."""
    if number is None or number >= len(values):
        return tuple(values)
    return tuple(values[place * len(values) // number] for place in range(number))
