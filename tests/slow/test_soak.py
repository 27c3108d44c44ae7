"""Two thousand steps need no more memory, files and threads than a thousand."""

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import PrinterCallback, TrainerCallback

from tests.helpers.tiny_unified import build_trainer, prompts_dataset


pytestmark = pytest.mark.slow

STEPS, EVERY = 2000, 20
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 200,
    "gallery_steps": 200,
    "num_iterations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_inference_steps": 3,
    "sde_window_range": [0, 2],
    "sde_window_size": 1,
    "eval_num_inference_steps": 2,
    "max_completion_length": 3,
    "ema_decay": 0.9,
    "alarms": "warn",  # a long way for a random model: what they say is not the point
}


class Gauge(TrainerCallback):
    """Resident memory in MiB, open files and threads, every few steps."""

    def __init__(self):
        self.steps, self.seen = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            self.seen.append((memory, len(os.listdir("/proc/self/fd")), threading.active_count()))
            self.steps.append(state.global_step)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell of itself in /proc")
def test_a_long_run_grows_in_nothing(tmp_path):
    gauge = Gauge()
    trainer = build_trainer(
        tmp_path, num_generations=2, eval_dataset=prompts_dataset(copies=1), callbacks=[gauge], **SETTINGS
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert trainer.state.global_step == STEPS
    steps, seen = np.array(gauge.steps), np.array(gauge.seen)
    half = steps > STEPS / 2
    slopes = np.polyfit(steps[half], seen[half], 1)[0] * 1000  # per thousand steps
    print(f"at the end {seen[-1]}, per thousand steps {slopes.round(3)} (MiB, files, threads)")
    memory, files, threads = slopes
    assert abs(files) < 1 and abs(threads) < 1, seen
    assert memory < 5, seen[:, 0]
