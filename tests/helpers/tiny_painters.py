"""Unified models over the tiny pipelines."""

from typing import Any

import torch

from tests.helpers.tiny_pipelines import FAMILIES, TinyPipeline, qwen3, tokenizer
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig


PROMPTS = ["a red cube", "two cats on a long wooden bench", "sun", "a photo of a bird"]


def unified(tiny: TinyPipeline, thinker: Any = None, **config: Any) -> PipelineForUnifiedGeneration:
    config = PipelineUnifiedConfig(painter_arguments=tiny.arguments, **config)
    return PipelineForUnifiedGeneration(thinker or qwen3(language_head=True), tokenizer(), tiny.pipeline, config)


def tiny_model(family: str = "sd3", thinker: Any = None, **config: Any) -> PipelineForUnifiedGeneration:
    return unified(FAMILIES[family](), thinker, **config)


def generators(count: int = len(PROMPTS), first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + row) for row in range(count)]
