"""Functions as CUDA graphs: where a pass is thousands of small kernels, launching them is what takes the time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class Recorded:
    """
    A function of tensors on a GPU whose shapes stay the same. Its first call runs it, the second records it, and from
    then on all launches are one. Where there is no GPU, or the function can't be recorded, each call runs it.

    What the function reads beside its arguments must stay where it is: weights, caches, autocast's copies.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self._function, self._calls = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Any = None

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        self._calls += 1
        if self._calls == 2 and inputs[0].device.type == "cuda":
            self._record(inputs)
        if self._graph is None:
            return self._function(*inputs)
        for place, x in zip(self._inputs, inputs, strict=True):
            place.copy_(x)
        self._graph.replay()
        return self._output.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # A recording that fails would leave its own stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._output = self._function(*self._inputs)
        except RuntimeError as error:
            logger.warning_once(f"Kernels are launched one by one, as they can't be recorded: {error}")
        else:
            self._graph = graph
