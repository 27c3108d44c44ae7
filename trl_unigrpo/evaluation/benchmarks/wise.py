"""WISE (arXiv 2503.07265), in its verified form: prompts that need knowledge, each judged right or wrong."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...rewards.questions.question import Question
from ..benchmark import Benchmark, Item
from ..metrics import all_correct
from .rows import located_rows, once, parse


WISE_CATEGORIES = {
    "culture": (400, 0.40),
    "time": (520, 0.12),
    "space": (640, 0.12),
    "biology": (760, 0.12),
    "physics": (880, 0.12),
    "chemistry": (1000, 0.12),
}
"""Category -> the last number of its prompts in the verified files, and its share of the overall score."""
QUESTION = (
    'Someone asked for a picture with the words "{prompt}". What they mean: "{explanation}". Does the picture show '
    "what they mean, correctly, and is it drawn well enough to be used?"
)


def load_wise(path: str | Path) -> Benchmark:
    """
    Read a verified file or the folder of all three: `prompt_id`, `Prompt`, `Explanation`.

    A prompt that two files have counts once. Two files with other words for one prompt, as the original and the
    rewritten ones of the first edition, are refused: pass one of them.
    """
    rows, repeated = once(
        located_rows(path, ".json"), lambda row: ({"prompt_id": row["prompt_id"]}, [row["Prompt"], row["Explanation"]])
    )
    items, problems = parse(rows, _items)
    return Benchmark(
        "wise",
        "WISE Verified",
        items,
        (*repeated, *problems),
        metric=all_correct,
        overall={name: share for name, (_, share) in WISE_CATEGORIES.items()},
        notes=(
            "Categories go by prompt_id as in the verified files; those of the first edition have other numbers. "
            "The judge is asked one yes-no question in our words.",
        ),
    )


def category(number: int) -> str:
    """Find the category of the prompt with this number, from 1 to 1000."""
    for name, (last, _) in WISE_CATEGORIES.items():
        if 1 <= number <= last:
            return name
    raise ValueError(f"'prompt_id' is {number}, expected a number from 1 to 1000")


def _items(row: dict[str, Any], where: str) -> Iterable[Item]:
    number, prompt, explanation = row["prompt_id"], row["Prompt"], row["Explanation"]
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"'prompt_id' is {number!r}, expected a number from 1 to 1000")
    if not isinstance(explanation, str) or not explanation.strip():
        raise ValueError(f"'Explanation' is {explanation!r}, expected a text that is not empty")
    task = category(number)
    question = Question(QUESTION.format(prompt=prompt, explanation=explanation), group=task)
    return [Item(f"{number:04}", prompt, task, (question,), row)]
