"""Rewards: plain TRL reward functions on images, usable without a trainer.

Public names are imported when first used: some need packages that only an extra installs.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from .clip.clip_reward import (
        ClipReward,
        aesthetic_score,
        clip_score,
        hps_v2,
        pick_score,
        siglip_score,
    )
    from .edits.edit_reward import EditReward, edit_questions, edit_score
    from .edits.preservation import ConsistencyReward, preserve, preserve_structure
    from .geneval.geneval_questions import questions_from_geneval
    from .geneval.geneval_reward import GenEvalReward
    from .judge.local_judge import LocalVLMJudge
    from .judge.vlm_judge import VLMJudge
    from .ocr import OCRReward
    from .questions.decompose import decompose_rows
    from .questions.llm_decomposer import LLMDecomposer
    from .questions.question import (
        Question,
        dependency_mean,
        dv_score,
        exam_points,
        geometric_mean,
        read_questions,
        weighted_mean,
    )
    from .questions.question_reward import STRICT_AUDITOR, DVReward, QuestionReward
    from .readback.endpoint_reader import EndpointReader
    from .readback.local_reader import LocalReader
    from .readback.read_back_reward import ReadBackReward
    from .remote.remote_reward import RemoteReward
    from .rules import (
        jpeg_size,
        sharpness,
        think_format,
        thinking_length,
    )
    from .thinking import thinking_reward

_HOME_OF = {
    "STRICT_AUDITOR": "questions.question_reward",
    "ClipReward": "clip.clip_reward",
    "ConsistencyReward": "edits.preservation",
    "DVReward": "questions.question_reward",
    "EditReward": "edits.edit_reward",
    "EndpointReader": "readback.endpoint_reader",
    "GenEvalReward": "geneval.geneval_reward",
    "LLMDecomposer": "questions.llm_decomposer",
    "LocalReader": "readback.local_reader",
    "LocalVLMJudge": "judge.local_judge",
    "OCRReward": "ocr",
    "Question": "questions.question",
    "QuestionReward": "questions.question_reward",
    "ReadBackReward": "readback.read_back_reward",
    "RemoteReward": "remote.remote_reward",
    "VLMJudge": "judge.vlm_judge",
    "aesthetic_score": "clip.clip_reward",
    "clip_score": "clip.clip_reward",
    "decompose_rows": "questions.decompose",
    "dependency_mean": "questions.question",
    "dv_score": "questions.question",
    "edit_questions": "edits.edit_reward",
    "edit_score": "edits.edit_reward",
    "exam_points": "questions.question",
    "geometric_mean": "questions.question",
    "hps_v2": "clip.clip_reward",
    "jpeg_size": "rules",
    "pick_score": "clip.clip_reward",
    "preserve": "edits.preservation",
    "preserve_structure": "edits.preservation",
    "questions_from_geneval": "geneval.geneval_questions",
    "read_questions": "questions.question",
    "sharpness": "rules",
    "siglip_score": "clip.clip_reward",
    "think_format": "rules",
    "thinking_length": "rules",
    "thinking_reward": "thinking",
    "weighted_mean": "questions.question",
}

__all__ = [
    "STRICT_AUDITOR",
    "ClipReward",
    "ConsistencyReward",
    "DVReward",
    "EditReward",
    "EndpointReader",
    "GenEvalReward",
    "LLMDecomposer",
    "LocalReader",
    "LocalVLMJudge",
    "OCRReward",
    "Question",
    "QuestionReward",
    "ReadBackReward",
    "RemoteReward",
    "VLMJudge",
    "aesthetic_score",
    "clip_score",
    "decompose_rows",
    "dependency_mean",
    "dv_score",
    "edit_questions",
    "edit_score",
    "exam_points",
    "geometric_mean",
    "hps_v2",
    "jpeg_size",
    "pick_score",
    "preserve",
    "preserve_structure",
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
