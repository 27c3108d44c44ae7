"""Work that several processes do together, by gloo on CPUs."""

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(work, folder, *arguments, count=2, timeout=600):
    """
    Call `work(folder, rank, *arguments)` in processes of one world: what each returned. They import the module of
    `work`, which takes most of their time: let one call do much.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    started = mp.spawn(_one, args=(work, port, count, folder, arguments), nprocs=count, join=False)
    end = time.monotonic() + timeout
    try:
        while not started.join(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"The processes were not done after {timeout} s."
    finally:
        for process in started.processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank, work, port, count, folder, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.save(work(folder, rank, *arguments), folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
