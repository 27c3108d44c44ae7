"""A model whose weights are spread over processes by FSDP2: in place, each process holds a slice of every weight."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def norm_of_slices(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the norm of tensors together: of whole ones, and of ones whose slices all processes have."""
    norm = nn.utils.get_total_norm([own_slice(tensor) for tensor in tensors])
    spread = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if spread is None:
        return norm
    squared = norm.square()
    torch.distributed.all_reduce(squared, group=spread.device_mesh.get_group())
    return squared.sqrt()


def gathered(model: nn.Module, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the processes' slices of a model's weights, or of others like them, together, on the CPU of each process."""
    parameters, found = dict(model.named_parameters()), {}
    for name, weight in slices.items():
        like: Any = parameters[name]
        if isinstance(like, DTensor):
            weight = DTensor.from_local(
                weight, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            ).full_tensor()
            weight = weight.cpu()
        found[name] = weight
    return found


def sliced(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut what [`gathered`] put together as the model's weights are cut; of this process what it holds."""
    parameters, found = dict(model.named_parameters()), dict(weights)
    for name, weight in weights.items():
        like: Any = parameters.get(name)
        if isinstance(like, DTensor) and weight.shape == like.shape:
            cut = distribute_tensor(weight.to(like.device), like.device_mesh, like.placements)
            found[name] = cut.to_local()
    return found


@contextmanager
def weights_gathered(root: Any, reshard_after_forward: bool) -> Iterator[None]:
    """
    Hold all weights of a sharded model in each process, so that none waits for the calls of another one.

    Args:
        root: what FSDP has wrapped, prepared by [`call_through`].
        reshard_after_forward: what FSDP does with a gathered weight otherwise.
    """
    units = [module for module in root.modules() if isinstance(module, FSDPModule)]
    root.call_whole(lambda: None)  # FSDP finds its root at the first call
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward and unit is not root, recurse=False)
            unit.reshard()


@contextmanager
def whole_weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put whole weights, by name, in the place of a model's slices, for something that writes files."""
    reshard(model)
    parameters = dict(model.named_parameters())
    whole = {id(p): nn.Parameter(weights[name], p.requires_grad) for name, p in parameters.items()}
    places = [(module, key) for module in model.modules() for key, p in module._parameters.items() if p is not None]
    own = [module._parameters[key] for module, key in places]
    for (module, key), parameter in zip(places, own, strict=True):
        module._parameters[key] = whole[id(parameter)]
    try:
        yield
    finally:
        for (module, key), parameter in zip(places, own, strict=True):
            module._parameters[key] = parameter


@contextmanager
def buffers_spread(model: nn.Module) -> Iterator[None]:
    """
    Leave buffers out of the state of a model while it is cut, and give all processes those of the first afterwards.

    accelerate's cpu_ram_efficient_loading takes each entry of the state for a parameter (accelerate#3898).
    """
    saved = [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    for module, name in saved:
        module.register_buffer(name, module.get_buffer(name), persistent=False)
    try:
        yield
    finally:
        for module, name in saved:
            module.register_buffer(name, module.get_buffer(name), persistent=True)
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)


def layer_classes(model: nn.Module) -> list[str]:
    """Name the classes of a model's layers, as the model and its parts declare them, as far as there are any."""
    declared = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return sorted(declared & {type(module).__name__ for module in model.modules()})


def call_through(root: Any, base: nn.Module, names: Sequence[str]) -> None:
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
