"""Free memory, and the number of things that fit into it."""

import torch


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
