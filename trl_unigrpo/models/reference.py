"""The reference policy of an adapted model: the same weights with the adapters off, or with those named "ref" on."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters off, or to the one named "ref"; which parameters are trained is the same before and after."""
    # Adapters, and the trained copies of whole modules (`modules_to_save`).
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not layers:
        raise RuntimeError(
            "No reference model: the model has no adapters and no frozen copy. Call `keep_reference` first."
        )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = {layer: (list(layer.active_adapters), not layer.disable_adapters) for layer in layers}
    try:
        for layer in layers:
            has_reference = "ref" in layer._get_available_adapters()
            layer.enable_adapters(has_reference)
            if has_reference:
                layer.set_adapter("ref")
        yield
    finally:
        for layer, (active, enabled) in before.items():
            layer.set_adapter(active)
            layer.enable_adapters(enabled)
        # PEFT marks every weight of an adapter as trainable when it is switched on again.
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)
