"""Scores of one image from the answers about it, as the benchmarks define them. The first score is the reward."""

import math
from collections.abc import Sequence

from ..rewards.common import Scores
from ..rewards.questions.question import (
    Question,
    dependency_mean,
    earned,
    exam_points,
    geometric_mean,
    group_means,
    weighted_mean,
)


def accuracy(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give the share of answered questions that were answered as expected: TIIF-Bench, and UniGRPO's exam points."""
    return {"accuracy": exam_points(questions, answers)}


def all_correct(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give 1 if every question was answered as expected, 0 if one was not; None if that hangs on a missing answer."""
    right = [e if e is None else e >= 0.5 for e in earned(questions, answers)]
    return {"correct": 0.0 if False in right else None if None in right else 1.0}


def dependency_score(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give DPG-Bench's share of questions answered yes, where one counts as no if one of its parents does."""
    firm = [answer if answer is None else float(answer >= 0.5) for answer in answers]
    return {"dpg": dependency_mean(questions, firm)}


def soft_tifa(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give GenEval 2's geometric mean of the right answers' probabilities (prompts), and the arithmetic (atoms)."""
    return {
        "soft_tifa_gm": geometric_mean(questions, answers),
        "soft_tifa_am": weighted_mean(questions, answers),
    }


def edit_quality(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give GEdit-Bench's sqrt(min(following, preservation) * quality), of probabilities, and these three."""
    means = group_means(questions, answers)
    following, preservation, quality = (means.get(name) for name in ("following", "preservation", "quality"))
    overall = None
    if following is not None and preservation is not None and quality is not None:
        overall = math.sqrt(min(following, preservation) * quality)
    return {"edit": overall, **means}


def edit_mean(questions: Sequence[Question], answers: Scores) -> dict[str, float | None]:
    """Give ImgEdit-Bench's mean of following, preservation and quality, of probabilities, and these three."""
    means = group_means(questions, answers)
    known = [mean for mean in means.values() if mean is not None]
    return {"edit": sum(known) / len(known) if len(known) == len(means) else None, **means}
