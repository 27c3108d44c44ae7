"""Unified models over the tiny pipelines."""

from typing import Any

import torch

from tests.helpers.tiny_pipelines import FAMILIES, TinyPipeline, qwen3, tokenizer
from tests.helpers.trajectories import trajectory
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.trajectory import Trajectory


PROMPTS = ["a red cube", "two cats on a long wooden bench", "sun", "a photo of a bird"]


def unified(tiny: TinyPipeline, **config: Any) -> PipelineForUnifiedGeneration:
    config = PipelineUnifiedConfig(painter_arguments=tiny.arguments, **config)
    return PipelineForUnifiedGeneration(qwen3(language_head=True), tokenizer(), tiny.pipeline, config)


def tiny_model(family: str = "sd3", **config: Any) -> PipelineForUnifiedGeneration:
    return unified(FAMILIES[family](), **config)


def generators(count: int = len(PROMPTS), first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + row) for row in range(count)]


def painted_from(prompts: list[str]) -> list[Trajectory]:
    """What paints from the prompts themselves, without a thinking."""
    return [trajectory([1], prompt=prompt) for prompt in prompts]
