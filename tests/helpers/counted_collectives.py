"""One of two processes that count what torch's FSDP2 gathers and reduces, with units as accelerate makes them.

python counted_collectives.py RANK FILE    # the first prints, as JSON, numbers received by call
"""

import json
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode


LAYERS, WIDTH, WORDS = 3, 4, 8


class Received(TorchDispatchMode):
    """Counts the numbers that collectives put out, gathered or reduced, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {"gathered": [], "reduced": []}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, kind in (("_allgather_base_", "gathered"), ("_reduce_scatter_base_", "reduced")):
            if name in str(function):
                self.found[kind].append(max(tensor.numel() for tensor in args[:2]))
        return function(*args, **(kwargs or {}))


def units() -> nn.Module:
    """A table, layers, what is in none of them, and a head."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    table, rest, head = (
        nn.Embedding(WORDS, WIDTH),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.Linear(WIDTH, WORDS, bias=False),
    )
    model = nn.Sequential(table, *layers, rest, head)
    for part in (*layers, table):
        fully_shard(part)
    fully_shard(head, reshard_after_forward=False)
    return fully_shard(model)


def main(rank: int, file: str) -> None:
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", f"file://{file}", timedelta(seconds=60), rank=rank, world_size=2)
    model, ids, seen = units(), torch.tensor([[1, 2]]), {}

    def update() -> None:
        model(ids).sum().backward()

    def without_sync() -> None:
        model.set_requires_gradient_sync(False)
        update()

    for name, call in {"forward": lambda: model(ids), "another": lambda: model(ids)}.items():
        with torch.no_grad(), Received() as received:
            call()
        seen[name] = received.found
    model[-1].reshard()
    model.reshard()
    for name, call in {"update": update, "another update": update, "without sync": without_sync}.items():
        with Received() as received:
            call()
        seen[name] = received.found
    if rank == 0:
        print(json.dumps(seen))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
