"""A judge that sees the source, the edited image and the instruction."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...messages import user_text
from ..common import Asker, Scores, column
from ..judge.prompts import quoted
from ..questions.question import Question, group_means
from ..questions.question_reward import Aggregate, QuestionReward


FOLLOWING = (
    "The last picture is an edit of what stands before it. It was asked for by {instruction}. Does the last picture "
    "show all of what was asked for?"
)
PRESERVATION = (
    "The last picture is an edit of what stands before it. It was asked for by {instruction}. Apart from what was "
    "asked for, is everything in the last picture as it was before?"
)
QUALITY = "Is the last picture free of visible flaws, such as seams, blur and broken shapes?"


def edit_questions(instruction: str) -> tuple[Question, ...]:
    """Ask whether an instruction was followed, and whether the rest was preserved."""
    texts = {"following": FOLLOWING, "preservation": PRESERVATION}
    instruction = quoted(instruction)
    return tuple(Question(text.format(instruction=instruction), group=group) for group, text in texts.items())


def edit_score(questions: Sequence[Question], answers: Scores) -> float | None:
    """
    Compute sqrt(following * preservation) of what the groups earned: neither the source as it was nor another image
    scores. None if one of them has no answer.
    """
    means = group_means(questions, answers)
    if set(means) != {"following", "preservation"}:
        raise ValueError(f"Questions are in the groups {sorted(means)}, expected 'following' and 'preservation'.")
    following, preservation = means["following"], means["preservation"]
    return None if following is None or preservation is None else math.sqrt(following * preservation)


class EditReward(QuestionReward):
    """
    How well an image is edited: sqrt(P(the instruction was followed) * P(all else stayed)), by a judge that sees the
    source images and the edited one.

    The prompts are the instructions; the source images come as `source_images`, as trainers hand them over. In a
    story, with a column `turns`, each image is judged by its own turn, beside the image before. A score is a
    probability, and so tells two half good edits apart: of scores that are mostly 0 nothing is learnt.

    Args:
        asker: a judge, such as a `VLMJudge` with mode="logprobs".
        aggregate, name, max_dead_batches: see [`QuestionReward`].
    """

    def __init__(self, asker: Asker, aggregate: Aggregate = edit_score, **options: Any):
        super().__init__(asker, aggregate, **{"max_failed": 0.0, **options})

    def questions_of(self, row: Mapping[str, Any]) -> tuple[Question, ...]:
        turns = row.get("turns")
        return edit_questions(turns[row.get("round_index", -1)] if turns else user_text(row["prompt"]))

    def shown(self, image: Image.Image, row: Mapping[str, Any]) -> list[Image.Image]:
        stood = row.get("previous_images") if row.get("turns") else None
        return [*(stood[-1:] if stood else sources_of(row, self.__name__)), image]


def sources_of(row: Mapping[str, Any], reward: str) -> list[Image.Image]:
    """Get the source images of a row; ValueError, naming the reward, if there are none."""
    found: Any = column(dict(row), "source_images", reward)
    if found is None:
        raise ValueError(
            f"{reward} judges edits, and the image of the prompt {user_text(row['prompt'])!r} is painted from text "
            "alone. Add a column 'source_image', or take a reward of images, such as DVReward."
        )
    return list(found) if isinstance(found, (list, tuple)) else [found]
