"""Rewards: plain TRL reward functions on images, usable without a trainer.

Public names are imported when first used: some need packages that only an extra installs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .decompose import decompose_rows
    from .geneval_questions import questions_from_geneval
    from .llm_decomposer import LLMDecomposer
    from .question_reward import STRICT_AUDITOR, DVReward, QuestionReward
    from .questions import (
        Question,
        dependency_mean,
        dv_score,
        exam_points,
        geometric_mean,
        read_questions,
        weighted_mean,
    )
    from .thinking import thinking_reward

_HOME_OF = {
    "STRICT_AUDITOR": "question_reward",
    "DVReward": "question_reward",
    "LLMDecomposer": "llm_decomposer",
    "Question": "questions",
    "QuestionReward": "question_reward",
    "decompose_rows": "decompose",
    "dependency_mean": "questions",
    "dv_score": "questions",
    "exam_points": "questions",
    "geometric_mean": "questions",
    "questions_from_geneval": "geneval_questions",
    "read_questions": "questions",
    "thinking_reward": "thinking",
    "weighted_mean": "questions",
}

__all__ = [
    "STRICT_AUDITOR",
    "DVReward",
    "LLMDecomposer",
    "Question",
    "QuestionReward",
    "decompose_rows",
    "dependency_mean",
    "dv_score",
    "exam_points",
    "geometric_mean",
    "questions_from_geneval",
    "read_questions",
    "thinking_reward",
    "weighted_mean",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
