"""One set of weights for a thinker and a painter that are two views of one network.

Some painters carry their thinker inside of them: two towers in one transformer, of which transformers' class for the
language model holds one, diffusers' class both. Loaded one by one they are two copies. Which weights are the same is
found by comparing them, not by their names.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Alias(nn.Module):
    """
    A module that stands for one of another network: it calls what is there at the time, adapters included, and has
    none of its weights itself.
    """

    def __init__(self, owner: nn.Module, name: str):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # no submodule: the owner's weights are its own
        object.__setattr__(self, "name", name)

    @property
    def target(self) -> nn.Module:
        return getattr(self.owner, self.name)

    def __getattr__(self, name: str) -> Any:
        if name in ("owner", "name"):  # not there yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.target, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)


def share_weights(thinker: nn.Module, painter: nn.Module) -> frozenset[str]:
    """
    Let the thinker use the painter's modules and parameters wherever both hold the same numbers.

    Linear layers and embeddings become aliases, so that an adapter serves both; of other modules only the parameters
    are shared, as the two libraries' classes differ. Numbers that occur twice in the painter stay apart: which of
    them is meant can't be told.

    Returns:
        Names in the painter of the modules that are shared; none if the two have different embeddings.
    """
    embeddings = thinker.get_input_embeddings().weight  # type: ignore[operator]
    if not any(p.shape == embeddings.shape and torch.equal(p, embeddings) for p in painter.parameters()):
        return frozenset()
    shapes = {parameter.shape for parameter in thinker.parameters()}
    places: dict[tuple, list[tuple[str, nn.Module, str]]] = {}
    for name, module in painter.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.shape in shapes:
                places.setdefault(_fingerprint(parameter), []).append((name, module, own))
    shared = set()
    for module in list(thinker.modules()):
        for child_name, child in list(module.named_children()):
            for own, parameter in list(child.named_parameters(recurse=False)):
                found = places.get(_fingerprint(parameter), [])
                if len(found) != 1 or not torch.equal(getattr(found[0][1], found[0][2]), parameter):
                    continue
                name, twin, twins_own = found[0]
                if isinstance(child, (nn.Linear, nn.Embedding)) and type(child) is type(twin):
                    parent, _, last = name.rpartition(".")
                    setattr(module, child_name, Alias(painter.get_submodule(parent), last))
                else:
                    setattr(child, own, getattr(twin, twins_own))
                shared.add(name)
    return frozenset(shared)


def aliases(thinker: nn.Module, painter: nn.Module) -> dict[str, str]:
    """Return, for each module of the thinker that is the painter's, by name, its name in the painter."""
    names = {module: name for name, module in painter.named_modules()}
    return {name: names[module.target] for name, module in thinker.named_modules() if isinstance(module, Alias)}


def whole_state(thinker: nn.Module) -> dict[str, Tensor]:
    """Return the thinker's weights, those of its aliases included."""
    state = dict(thinker.state_dict())
    for name, module in thinker.named_modules():
        if isinstance(module, Alias):
            state |= {f"{name}.{own}": value for own, value in module.target.state_dict().items()}
    return state


def _fingerprint(parameter: Tensor) -> tuple:
    """Sum a tensor up in numbers that equal ones have in common, and different ones almost surely not."""
    numbers = parameter.detach().double().flatten()
    return tuple(parameter.shape), numbers.sum().item(), numbers[: 2**16].square().sum().item()
