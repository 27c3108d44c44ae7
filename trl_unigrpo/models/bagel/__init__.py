"""BAGEL: one decoder with a text expert and an image expert."""

from transformers import AutoConfig, AutoModelForCausalLM

from .autoencoder import LatentCodec
from .configuration import THINK_ANSWER_SYSTEM_PROMPT, THINK_SYSTEM_PROMPT, BagelConfig
from .modeling import BagelForUnifiedGeneration
from .processing import BagelProcessor


AutoConfig.register("bagel", BagelConfig, exist_ok=True)
AutoModelForCausalLM.register(BagelConfig, BagelForUnifiedGeneration, exist_ok=True)

__all__ = [
    "THINK_ANSWER_SYSTEM_PROMPT",
    "THINK_SYSTEM_PROMPT",
    "BagelConfig",
    "BagelForUnifiedGeneration",
    "BagelProcessor",
    "LatentCodec",
]
