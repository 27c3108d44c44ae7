"""Moving averages of the weights that are trained: of these alone, never of the model around them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .reference import trained_weights, weights_in_place


class WeightAverage:
    """
    An exponential moving average of trained weights: average <- decay * average + (1 - decay) * weights.

    It starts as the weights are now, and is held in float32: in half precision small steps would round to nothing.

    Args:
        model: whose trained weights are averaged.
        belongs: says of a weight's name whether it is one of them.
    """

    def __init__(self, model: nn.Module, belongs: Callable[[str], bool] = lambda name: True):
        self._model = model
        self.weights = {
            name: weight.float().clone() for name, weight in trained_weights(model).items() if belongs(name)
        }

    def update(self, decay: float) -> None:
        """Take the weights in, as they are now."""
        own = trained_weights(self._model)
        averages, latest = list(self.weights.values()), [own[name].float() for name in self.weights]
        get_ema_multi_avg_fn(decay)(averages, latest, None)

    def in_place(self) -> AbstractContextManager[None]:
        """Put the average in the place of the weights, which come back afterwards."""
        return weights_in_place(self._model, self.weights)

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the `weights` of an average of the same model."""
        copy_weights(self.weights, weights)


def copy_weights(into: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """
    Copy weights by name.

    Raises:
        ValueError: if they are not those of the same model.
    """
    if into.keys() != weights.keys() or any(into[name].shape != weights[name].shape for name in into):
        other: Any = sorted(into.keys() ^ weights.keys()) or ["the shapes"]
        raise ValueError(
            f"The averaged weights in the checkpoint are not those of this model: {other[0]} differs. Resume with the "
            "model and the adapters that the run began with."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            into[name].copy_(weight)
