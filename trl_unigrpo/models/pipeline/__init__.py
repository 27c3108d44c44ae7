"""A causal language model that thinks and a flow-matching pipeline of diffusers that paints, as one unified model."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration import PROMPT_WRITER_SYSTEM_PROMPT as THINK_SYSTEM_PROMPT
from .configuration import PipelineUnifiedConfig
from .modeling import PipelineForUnifiedGeneration


AutoConfig.register("unified_pipeline", PipelineUnifiedConfig, exist_ok=True)
AutoModelForCausalLM.register(PipelineUnifiedConfig, PipelineForUnifiedGeneration, exist_ok=True)

__all__ = ["THINK_SYSTEM_PROMPT", "PipelineForUnifiedGeneration", "PipelineUnifiedConfig"]
