"""Thinkings sampled by vLLM, through TRL's own integration.

TRL serves a whole model, and sends all of its weights. Here vLLM serves the part of a unified model that thinks, and
is sent that part's weights; images are painted, and everything is trained, in the trainer's own processes.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from ..models.adapters import merged_weights
from ..models.contract import UnifiedModelMixin
from ..models.patching import attributes
from ..models.registry import unified_model
from ..models.sharding import whole
from .trl_bridge import VLLMGeneration, is_vllm_available, thinking_by


BANNED = -100.0
"""Added to the logit of a token that is never sampled; vLLM takes nothing below."""


def check_served(base: UnifiedModelMixin, shows_images: bool, mode: str) -> None:
    """
    Raise an error if vLLM can't think for a model, before it is started.

    Args:
        shows_images: whether prompts have source images.
        mode: "server" or "colocate".
    """
    if not is_vllm_available():
        raise ImportError("use_vllm=True: vLLM is not installed. pip install 'trl[vllm]', or leave it out.")
    thinker = base.served_thinker()
    if shows_images and base.image_placeholder is not None:
        raise ValueError(
            f"use_vllm=True with source images: {type(base).__name__} sees them while it thinks, and vLLM gets none. "
            "Leave one of the two out."
        )
    if mode == "colocate" and not thinker.name_or_path:
        raise ValueError(
            "use_vllm=True with vllm_mode='colocate': vLLM loads what thinks from a folder or hub id, and this model "
            "came from none. Save it, and load it by from_pretrained; or use a server."
        )
    rounded = [name for name, p in thinker.named_parameters() if not p.is_floating_point()]
    if rounded:
        raise ValueError(
            f"use_vllm=True with quantised weights ({rounded[0]!r} and others): adapters can't be merged into them "
            "without rounding, so vLLM would sample from another model than the one that is trained. Load the model "
            "without quantization_config, or leave use_vllm out."
        )


class ThinkingEngine(VLLMGeneration):
    """TRL's engine, for the part of a unified model that thinks."""

    generation_kwargs: dict[str, Any]

    def _init_vllm(self) -> None:
        with attributes(self, model=unified_model(self.model).served_thinker()):
            super()._init_vllm()

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        base = unified_model(self.model)
        for name, weight in merged_weights(base.served_thinker(), base.is_image_parameter):
            weight = weight.to(self.accelerator.device)  # parameters may be offloaded
            yield self._fix_param_name_to_vllm(name), whole(weight)

    def sample_as_trained(self, never: Collection[int], ends: Collection[int]) -> None:
        """
        Sample no token of `never`, and end at those of `ends`, as `generate` does.

        What a user's `generation_kwargs` say stays.
        """
        given = dict(self.generation_kwargs)
        never = {*never, *(given.pop("suppress_tokens", None) or ())}
        own: dict[str, Any] = {"stop_token_ids": list(ends)}
        self.generation_kwargs = {**own, **given, "logit_bias": dict.fromkeys(sorted(never), BANNED)}


class EngineRun(GRPOTrainer):
    """A run whose thinkings vLLM may sample."""

    def __init__(self, *args: Any, **kwargs: Any):
        with thinking_by(ThinkingEngine):
            super().__init__(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL sends the weights once a step, but averages may be evaluated, between thinkings of the trained ones.
        self._last_loaded_step = -1
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._last_loaded_step = -1
