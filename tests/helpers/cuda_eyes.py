"""See without a GPU where a program waits for one: the device "meta" stands for it, tensors of the CPU are real."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import trl_unigrpo


GPU = "meta"
OURS = Path(trl_unigrpo.__file__).parent
THEIRS = ("/transformers/", "/trl/", "/peft/", "/accelerate/", "/diffusers/")

aten = torch.ops.aten
UNIQUE = (aten.unique_dim.default, aten._unique2.default, aten.unique_dim_consecutive.default)


class CudaEyes(TorchDispatchMode):
    """
    Count the moments when the host waits for the device: a copy between them, `.item()`, and what needs a number of
    the device to know its own shape. An operation of tensors of both devices, which CUDA would refuse, is noted too.

    What is read from the device is not there, and is made up: numbers are 0, flags True.

    Args:
        known: tensors that copies of their shape from the device are equal to.
        flag: chooses the value of a flag that is read at a place (file and line).
    """

    def __init__(self, known: Sequence[Tensor] = (), flag: Callable[[str], bool] = lambda place: True):
        super().__init__()
        self.known, self.flag = {tuple(x.shape): x for x in known}, flag
        self.waits: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self._builders = _Builders(self)

    def __enter__(self) -> "CudaEyes":
        self._builders.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._builders.__exit__(*error)

    @property
    def ours(self) -> Counter:
        """Waits in this package's lines, or in what they call of torch."""
        return Counter({place: count for place, count in self.waits.items() if place.split(" ")[1].startswith("ours")})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there, target = [x for x in tensors if x.device.type == GPU], kwargs.get("device")
        moves = target is not None and torch.device(target).type != (GPU if there else "cpu")
        if func is aten._to_copy.default and moves:
            self.wait("download" if there else "upload")
            return self._downloaded(args[0], kwargs) if there else func(*args, **{**kwargs, "non_blocking": False})
        if not there:
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            if args[0].device != args[1].device:
                self.wait("download" if args[1].device.type == GPU else "upload")
                return args[0]
        elif func is aten._local_scalar_dense.default:
            place = self.wait("item")
            return self.flag(place) if args[0].dtype == torch.bool else args[0].new_zeros((), device="cpu").item()
        elif func is aten.equal.default:
            return self.flag(self.wait("equal"))
        elif func is aten.nonzero.default:
            self.wait("nonzero")
            return args[0].new_empty(0, args[0].ndim, dtype=torch.long)
        elif func in UNIQUE:
            self.wait("unique")
            number = torch.empty(0 if func is aten._unique2.default else len(args[0]), dtype=torch.long, device=GPU)
            return args[0].clone(), number, number
        elif func is aten.index.Tensor or func is aten.index_put.default:
            return self._indexed(func, args, kwargs)
        elif any(x.device.type == "cpu" and x.ndim > 0 for x in tensors):
            self.mixed[f"{func} {place_of_call()}"] += 1
        return func(*args, **kwargs)

    def wait(self, kind: str) -> str:
        """Note a wait of the line that called."""
        place = place_of_call()
        self.waits[f"{kind} {place}"] += 1
        return place

    def _downloaded(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype") or x.dtype
        known = self.known.get(tuple(x.shape))
        if known is not None:
            return known.to(dtype)
        return torch.ones(x.shape, dtype=dtype) if x.dtype == torch.bool else torch.zeros(x.shape, dtype=dtype)

    def _indexed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Index with numbers of the CPU, which CUDA copies, or with flags, which it counts."""
        x, indices, *others = args
        found = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                self.wait("nonzero")
                numbers = torch.zeros(index.numel(), dtype=torch.long, device=GPU)
                found += [numbers] * index.ndim
            elif index is not None and index.device.type == "cpu":
                self.wait("upload")
                found.append(index.to(GPU))
            else:
                found.append(index)
        return func(x, found, *others, **kwargs)


class _Builders(TorchFunctionMode):
    """Notes the tensors that are made on the device of numbers, which no operation shows."""

    def __init__(self, eyes: CudaEyes):
        self.eyes = eyes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and made.device.type == GPU:
            if not isinstance(args[-1], Tensor):
                self.eyes.wait("upload")
        return made


def place_of_call() -> str:
    """Say which line of the package called, or else of a library of Hugging Face."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(OURS)):
            return f"ours/{name[len(str(OURS)) + 1 :]}:{frame.f_lineno}"
        if any(part in name for part in THEIRS):
            return f"{name.split('site-packages/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def moved_to_gpu(value: Any) -> Any:
    """Move the tensors of plain containers."""
    return tree_map_only(Tensor, lambda x: x.detach().to(GPU), value)
