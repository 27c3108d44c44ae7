"""The common part of benchmarks of edits."""

from pathlib import PurePosixPath
from typing import Any

from ...rewards.edits.edit_reward import QUALITY, edit_questions
from ...rewards.questions.question import Question


def edit_and_quality_questions(instruction: Any) -> tuple[Question, ...]:
    """Ask whether an instruction was followed, whether the rest was preserved, and whether the image has flaws."""
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"the instruction is {instruction!r}, expected a text that is not empty")
    return (*edit_questions(instruction), Question(QUALITY, group="quality"))


def as_file_name(key: Any) -> str:
    """Check that a key can name a file, as official scorers expect; ValueError if it can't."""
    if not isinstance(key, str) or not key or PurePosixPath(key).name != key or "\\" in key:
        raise ValueError(f"the key is {key!r}, expected the name of a file")
    return key
