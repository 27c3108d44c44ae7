"""Check that the weights that are trained get a gradient where the painter paints."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


SHAKE = 0.1
"""Standard deviation of what is added to weights to see whether they matter."""


def check_gradients(weights: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> None:
    """
    Raise ValueError for weights that an output depends on, but which no gradient of it reaches.

    Some networks compute parts of themselves without a gradient when they are not in training mode, such as routed
    experts. Weights that an output doesn't depend on are no matter: most networks have some.

    Args:
        weights: those that are trained, by name.
        compute: the output, the same at each call, with gradient where that is enabled.
    """
    with torch.enable_grad():
        output = compute()
        gradients: Sequence[Tensor | None] = [None] * len(weights)
        if output.requires_grad:
            total = output.float().square().sum()
            gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    output = output.detach()
    layers: dict[str, list[Tensor]] = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        if gradient is None:
            layers.setdefault(_layer(name), []).append(weight)
    if not layers:
        return
    with torch.no_grad():
        noise = (compute() - output).norm()  # of kernels that don't repeat themselves
        lost = [layer for layer, parts in layers.items() if _change(parts, compute, output) > 10 * noise]
    if lost:
        named = "|".join(re.escape(layer).replace(r"\*", r"\d+") for layer in lost)
        raise ValueError(
            f"No gradient reaches {', '.join(lost)}, although the image depends on them: the network computes them "
            "without one when it paints, as it often is with routed experts. They can't be trained; leave them out of "
            f"the adapters, LoraConfig(exclude_modules=r'({named})'), or freeze them."
        )


def _layer(name: str) -> str:
    """Name a weight's layer, in all blocks at once."""
    layer = name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", layer)


def _change(weights: list[Tensor], compute: Callable[[], Tensor], output: Tensor) -> Tensor:
    """Measure how far the output moves with these weights."""
    before = [weight.clone() for weight in weights]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            weight.add_(SHAKE * torch.randn(weight.shape, generator=generator).to(weight))
        return (compute() - output).norm()
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
