"""Rewards: plain TRL reward functions on images, usable without a trainer.

Public names are imported when first used: some need packages that only an extra installs.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .clip import ClipReward, aesthetic_score, clip_score, hps_v2, pick_score, siglip_score
    from .decompose import decompose_rows
    from .geneval import GenEvalReward
    from .geneval_questions import questions_from_geneval
    from .judge import VLMJudge
    from .llm_decomposer import LLMDecomposer
    from .local_judge import LocalVLMJudge
    from .ocr import OCRReward
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
    from .remote import RemoteReward
    from .rules import jpeg_size, sharpness, think_format, thinking_length
    from .thinking import thinking_reward

_HOME_OF = {
    "STRICT_AUDITOR": "question_reward",
    "ClipReward": "clip",
    "DVReward": "question_reward",
    "GenEvalReward": "geneval",
    "LLMDecomposer": "llm_decomposer",
    "LocalVLMJudge": "local_judge",
    "OCRReward": "ocr",
    "Question": "questions",
    "QuestionReward": "question_reward",
    "RemoteReward": "remote",
    "VLMJudge": "judge",
    "aesthetic_score": "clip",
    "clip_score": "clip",
    "decompose_rows": "decompose",
    "dependency_mean": "questions",
    "dv_score": "questions",
    "exam_points": "questions",
    "geometric_mean": "questions",
    "hps_v2": "clip",
    "jpeg_size": "rules",
    "pick_score": "clip",
    "questions_from_geneval": "geneval_questions",
    "read_questions": "questions",
    "sharpness": "rules",
    "siglip_score": "clip",
    "think_format": "rules",
    "thinking_length": "rules",
    "thinking_reward": "thinking",
    "weighted_mean": "questions",
}

__all__ = [
    "STRICT_AUDITOR",
    "ClipReward",
    "DVReward",
    "GenEvalReward",
    "LLMDecomposer",
    "LocalVLMJudge",
    "OCRReward",
    "Question",
    "QuestionReward",
    "RemoteReward",
    "VLMJudge",
    "aesthetic_score",
    "clip_score",
    "decompose_rows",
    "dependency_mean",
    "dv_score",
    "exam_points",
    "geometric_mean",
    "hps_v2",
    "jpeg_size",
    "pick_score",
    "questions_from_geneval",
    "read_questions",
    "sharpness",
    "siglip_score",
    "think_format",
    "thinking_length",
    "thinking_reward",
    "weighted_mean",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)
