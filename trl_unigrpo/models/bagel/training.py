"""Answers to what trainers ask of BAGEL beside its forward: tokens, parameters of its experts, places of adapters."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .decoder import BagelLanguageModel
from .processing import check_tokenizer


LINEARS = r"self_attn\.[qkvo]_proj{suffix}|mlp{suffix}\.(gate|up|down)_proj"

# What the mixin is mixed into; a base class in the eyes of the type checker alone.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class BagelTraining(_Base):
    """Mixin of BAGEL: what trainers ask of it."""

    language_model: BagelLanguageModel

    @property
    def default_system_prompt(self) -> str | None:
        return self.config.think_system_prompt

    @property
    def image_placeholder(self) -> int:
        return self.config.image_token_id

    @property
    def suppressed_token_ids(self) -> Sequence[int]:
        config = self.config
        markers = (config.im_start_token_id, config.vision_start_token_id, config.vision_end_token_id)
        return [*markers, config.image_token_id]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer, self.config)

    def compile_layers(self, backend: str = "inductor") -> None:
        self.language_model.model.compile_layers(backend)

    def served_thinker(self) -> nn.Module:
        # vLLM's own BAGEL is its text expert, under the released names.
        return self

    def is_image_parameter(self, name: str) -> bool:
        return "moe_gen" in name or any(part in name for part in ("vae2llm", "llm2vae", "time_embedder"))

    def default_lora_targets(self, experts: str = "both") -> str:
        suffixes: dict[str, Sequence[str]] = {"text": [""], "image": ["_moe_gen"], "both": ["", "_moe_gen"]}
        if experts not in suffixes:
            raise ValueError(f"experts={experts!r}: expected one of {sorted(suffixes)}.")
        linears = "|".join(LINEARS.format(suffix=suffix) for suffix in suffixes[experts])
        return rf"(.*\.)?language_model\.model\.layers\.\d+\.({linears})"
