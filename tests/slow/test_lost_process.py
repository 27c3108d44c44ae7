"""One of two processes is killed, or hangs: the other one ends in time, says which, and its checkpoint is whole."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from trl_unigrpo.models.bagel import BagelForUnifiedGeneration


pytestmark = pytest.mark.slow
TIMEOUT = 20  # seconds of ddp_timeout

RUN = """
import os, signal, sys, time
import torch

torch.set_num_threads(1)
from tests.helpers.tiny_unified import FixedTexts, build_trainer, redness

folder, fate, timeout = sys.argv[1:]
calls = []

def reward(prompts, completions, images, **_):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        time.sleep(8)  # a few signs of life, by which the other one hears where it is
        if fate == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "fails":
            raise KeyError("no such judge")
        time.sleep(600)
    return redness(prompts, completions, images)

trainer = build_trainer(
    folder, reward_funcs=reward, trainer_class=FixedTexts, ddp_timeout=int(timeout), per_device_train_batch_size=2,
    num_iterations=1, max_steps=8, save_strategy="steps", save_steps=1,
)
trainer.train()
"""


@pytest.mark.parametrize(
    ("fate", "sentence"),
    [
        ("killed", "Process 1, last heard of "),
        ("hangs", "Process 1 hangs in the phase 'reward' for "),
        ("fails", "Process 1 ended in the phase 'reward': KeyError: 'no such judge'"),
    ],
)
def test_the_other_one_ends_and_says_which_it_was(tmp_path, fate, sentence):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), fate, str(TIMEOUT)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / f"err{rank}").open("w"),
        )
        for rank in (0, 1)
    ]
    try:
        ended = both[0].wait(400)
        since = time.time() - max(file.stat().st_mtime for file in tmp_path.glob("checkpoint-2/*"))
    finally:
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.wait()
    said = (tmp_path / "err0").read_text(encoding="utf-8")
    assert ended != 0, said
    assert sentence in said and "in the phase 'reward'" in said, said
    assert "go on from the last with train(resume_from_checkpoint=True)" in said
    assert since < 4 * TIMEOUT
    last = tmp_path / "checkpoint-2"
    assert BagelForUnifiedGeneration.from_pretrained(last)
    for name in ("optimizer.pt", "rollouts_0.pt", "rollouts_1.pt"):
        assert torch.load(last / name, weights_only=True)
