"""A model whose weights are spread over processes by FSDP2: in place, each process holds a slice of every weight."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Say whether FSDP2 has spread the weights of a model, or of a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let go of all gathered weights, which FSDP keeps of some parts: parameters are their slices again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_slice(weight: Tensor) -> Tensor:
    """Give this process' slice of a weight, in the same memory; a weight that is not spread is its own."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """Gather a weight from all processes, each of which must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def slice_like(weight: Tensor, parameter: Tensor) -> Tensor:
    """Cut this process' slice of a whole weight, as a parameter of its shape is cut."""
    if not isinstance(parameter, DTensor) or weight.shape != parameter.shape:
        return weight
    cut = distribute_tensor(weight.to(parameter.device), parameter.device_mesh, parameter.placements)
    return own_slice(cut)


def layer_classes(model: nn.Module) -> list[str]:
    """
    Name the classes of a model's layers, each of which FSDP gathers by itself: those that the model and its parts
    declare (`_no_split_modules`), as far as there are any.
    """
    declared = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return sorted(declared & {type(module).__name__ for module in model.modules()})


def call_through(root: nn.Module, base: nn.Module, names: Sequence[str]) -> None:
    """
    Let methods that use weights, and are called outside of `forward`, gather them as `forward` does.

    Args:
        root: what FSDP has wrapped, in place.
        base: the model in it, or itself, that has the methods.
        names: of the methods.
    """
    entered = False

    def call(function: Callable[[], Any]) -> Any:
        nonlocal entered
        entered = True
        try:
            return function()
        finally:
            entered = False

    def through(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # FSDP sees no argument, and so moves none to its device.
        asked = partial(method, *args, **kwargs)
        return asked() if entered else root.call_whole(asked)

    root.call_whole = call
    register_fsdp_forward_method(root, "call_whole")
    for name in names:
        setattr(base, name, partial(through, getattr(base, name)))
