"""One forward for the text and the velocities, through TRL's language head and any wrapper around the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from ..models.contract import FlowInputs, UnifiedModelMixin


@dataclass
class PackedOutput(ModelOutput):
    """TRL's text outputs and the velocities (B, K, *latent) of the same forward."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    velocity: Tensor | None = None


def return_velocity(base: UnifiedModelMixin) -> None:
    """
    Let the model, whose forward TRL has replaced by its fused head, return velocities when a call brings a flow.

    They travel in the output, not past it: a hook would break DDP, which looks for its parameters there.
    """
    forward = base.forward

    def packed_forward(*args: Any, flow: FlowInputs | None = None, **kwargs: Any) -> Any:
        if flow is None:
            return forward(*args, **kwargs)
        outputs = forward(*args, flow=flow, **kwargs)
        return PackedOutput(
            log_probs=outputs.log_probs,
            entropy=outputs.entropy,
            aux_loss=outputs.aux_loss,
            velocity=flow.velocity,
        )

    packed_forward.__wrapped__ = forward.__func__ if hasattr(forward, "__func__") else forward  # type: ignore[attr-defined]
    base.forward = packed_forward


def pack(model: Callable[..., Any], flow: FlowInputs) -> Callable[..., Any]:
    """The model as TRL calls it, with the flow added to the call and its velocities left in `flow`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, flow=flow, **kwargs)
        flow.velocity = outputs.velocity
        return outputs

    return call
