"""Runs of one and of several processes that go on from each other's checkpoints."""

import faulthandler
import os
import shutil
import socket
import warnings

import torch
import torch.multiprocessing as mp

from tests.helpers.tiny_unified import FixedTexts, build_trainer, weights


RESUMED = {
    "trainer_class": FixedTexts,
    "optim": "sgd",  # the update is the gradient itself
    "learning_rate": 0.5,
    "image_learning_rate": 0.5,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}
"""Two generations of two passes each: a checkpoint after each pass."""


def go_on(folder, checkpoint=None, per_device_train_batch_size=2):
    """Train from a checkpoint on; returns the weights, and what was warned of rollouts."""
    trainer = build_trainer(folder, per_device_train_batch_size=per_device_train_batch_size, **RESUMED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    told = [str(one.message) for one in caught if "has no rollouts" in str(one.message)]
    return {"weights": weights(trainer.model), "warned": len(told), "step": trainer.state.global_step}


def go_on_in_all_ways(folder, alone):
    """The whole run, and those that go on from its checkpoints or from one of a single process."""
    found = {"whole": go_on(folder / "whole")}
    checkpoint = folder / "whole" / "checkpoint-3"
    found["inside a generation"] = go_on(folder / "inside", checkpoint)
    torch.distributed.barrier()
    lost = folder / "lost" / "checkpoint-3"
    if torch.distributed.get_rank() == 1:
        shutil.copytree(checkpoint, lost)
        (lost / "rollouts_1.pt").unlink()
    torch.distributed.barrier()
    found["rollouts of one are lost"] = go_on(folder / "lost", lost)
    found["from one, inside"] = go_on(folder / "more", alone / "checkpoint-3")
    found["from one, between"] = go_on(folder / "between", alone / "checkpoint-2")
    return found


def distance(before, after, other):
    """Measure how far two ends are from each other, as a share of the distance moved."""
    squares = [sum((a[name] - b[name]).square().sum() for name in a) for a, b in ((after, other), (after, before))]
    return (squares[0] / squares[1]).sqrt().item()


def in_processes(count, folder, checkpoint=None):
    """Go on in some processes, which divide the batch of four rows; returns what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    mp.spawn(_process, args=(count, port, folder, checkpoint), nprocs=count)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def _process(rank, count, port, folder, checkpoint):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(600, exit=True)  # processes that wait for each other would for ever
    torch.save(go_on(folder / "run", checkpoint, 4 // count), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
