"""Free memory, the number of things that fit into it, and what to do when they did not."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


WHEN_NONE_FITS = (
    "Not even one image at once fits beside what the run holds. Start it with the environment variable "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which keeps free memory in one piece; or make images smaller "
    "(image_size), turn gradient_checkpointing on, hold frozen weights in nf4 (--load_in_4bit)."
)
"""Advice for when halving has come to its end."""


def free_memory(device: torch.device | str) -> int | None:
    """Count the bytes that new tensors can take on a CUDA device, the allocator's reserve included; None elsewhere."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def fitting(free: int | None, bytes_each: float, share: float = 0.8) -> int | None:
    """
    Count the things of a size that fit into a share of the free memory, possibly 0; None if memory is not counted.
    """
    return None if free is None else int(share * free / bytes_each)


SAMPLED = "sampled: from here on {0} at once. Set image_batch_size={0} to begin with that, or see docs/performance.md."
READ = "read: from here on {0} at once."
"""Words of a warning: the work that was done, how many images fit at once, and the remedy."""


def in_fitting_batches(
    model: Any, count: int, at_once: int, work: Callable[[slice], list[Any]], doing: str = SAMPLED
) -> list[Any]:
    """Work on images as [`fitting_batches`] does, and join what comes out."""
    return [one for some in fitting_batches(model, count, at_once, work, doing) for one in some]


def fitting_batches(
    model: Any, count: int, at_once: int, work: Callable[[slice], list[Any]], doing: str = SAMPLED
) -> Iterator[list[Any]]:
    """
    Work on images, so many at once, and yield what comes out; where the memory runs out, half as many from then on.

    Args:
        model: whose `largest_image_batch` remembers how many of this work the memory held.
        count: images.
        at_once: to begin with, where nothing is remembered.
        work: on some of them; after an error it is asked again, for fewer, and must not have changed anything.
        doing: what the warning says, with a place for the number.

    Raises:
        RuntimeError: torch's own, with a remedy, if the memory does not hold a single one.
    """
    done = 0
    at_once, ran_out = min(at_once, model.largest_image_batch or at_once), False
    while done < count:
        size = min(at_once, count - done)
        try:
            found = work(slice(done, done + size))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if size == 1:
                error.add_note(WHEN_NONE_FITS)
                raise
            at_once, ran_out = size // 2, True
        else:
            if ran_out:
                model.largest_image_batch, ran_out = at_once, False
                warnings.warn(f"The memory ran out while images were {doing.format(at_once)}")
            done += size
            yield found
            continue
        clear_device_cache(garbage_collection=True)  # not before the error, which holds the tensors, is gone
