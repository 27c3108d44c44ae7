"""The reference policy: the model as it was where training starts, by other weights or without its adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .sharding import is_sharded, own_slice, reshard


def trained_weights(model: nn.Module, copied: bool = False) -> dict[str, Tensor]:
    """
    Collect the data of the weights that are trained, by name; copies of it, or itself. Of a sharded model it is what
    this process holds of them.
    """
    reshard(model)
    trained = {
        name: own_slice(parameter.data) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {name: weight.clone() for name, weight in trained.items()} if copied else trained


@contextmanager
def weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights, as [`trained_weights`] gives them, in the place of a model's own, which come back."""
    if is_sharded(model):
        with _slices_in_place(model, weights):
            yield
        return
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight.to(own[name])
        yield
    finally:
        for name, weight in own.items():
            parameters[name].data = weight


@contextmanager
def _slices_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Do as [`weights_in_place`] does with a sharded model: FSDP gathers from the memory that it has shared out."""
    reshard(model)
    parameters = dict(model.named_parameters())
    slices = {name: own_slice(parameters[name].data) for name in weights}
    own = {name: weight.clone() for name, weight in slices.items()}
    try:
        for name, weight in weights.items():
            slices[name].copy_(weight)
        yield
    finally:
        reshard(model)
        for name, weight in own.items():
            slices[name].copy_(weight)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters off; which parameters are trained is the same before and after."""
    layers = adapted_layers(model)
    if not layers:
        raise RuntimeError(
            "No reference model: the model has no adapters, and its start was not kept. Call `keep_reference` first."
        )
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = {layer: not layer.disable_adapters for layer in layers}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, enabled in before.items():
            layer.enable_adapters(enabled)
        # PEFT marks every weight of an adapter as trainable when it is switched on again.
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def adapted_layers(model: nn.Module) -> list[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """Find adapters, and the trained copies of whole modules (`modules_to_save`) or of token rows."""
    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def adapters_do_nothing_yet(model: nn.Module) -> bool:
    """
    Say whether switching adapters off gives the model back as it is now, to the bit.

    So it is where all that is switched on or trained are plain LoRA products whose second factor is 0. Of any other
    adapter, and of weights outside of adapters, this can't be told from the weights.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in adapted_layers(model):
        plain = isinstance(layer, LoraLayer) and isinstance(layer.lora_B, nn.ModuleDict)  # AdaLoRA's are no modules
        if not plain or layer.lora_embedding_A or layer.lora_magnitude_vector:
            return False
        active = [layer.lora_B[name] for name in layer.active_adapters if name in layer.lora_B]
        if any(parameter.any() for factor in active for parameter in factor.parameters()):
            return False
        trained -= {*layer.lora_A.parameters(), *layer.lora_B.parameters()}
    return not trained
