"""Runs in processes that are killed, and what a run leaves behind, as far as that is repeatable."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerCallback

from tests.helpers.runs import NOT_REPEATED
from tests.helpers.tiny_unified import build_trainer, prompts_dataset
from trl_unigrpo.monitoring.alarm import read_alarms
from trl_unigrpo.reporting.run_files import read_run


STEPS = 6
WORLD = {
    "max_steps": STEPS,
    "num_iterations": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "log_completions": True,
    "gallery_steps": 3,
    "lr_scheduler_type": "linear",
    "ema_decay": 0.8,
}
WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


class Blow(TrainerCallback):
    """Kills its process at one of its writes or of the trainer's events, all counted as they come; or counts alone."""

    def __init__(self, fatal: int | None = None):
        self.count, self.fatal = 0, fatal
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened or event in WRITES:
            self._strike()

    def _strike(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args, state, control, **kwargs):
        self._strike()

    on_optimizer_step = on_step_end = on_log = on_save = on_evaluate = on_substep_end


def session(rank: int, processes: int, port: int, folder: str, fatal: int | None) -> None:
    """Train in one of some processes, from the newest checkpoint if there is one; count the blows that could fall."""
    output = os.open(f"{folder}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    if processes > 1:
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    blow = Blow(fatal)
    trainer = build_trainer(
        folder,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=4 // processes,
        eval_dataset=prompts_dataset(copies=1),
        callbacks=[blow],
        **WORLD,
    )
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    if processes > 1:
        torch.distributed.destroy_process_group()
    Path(f"{folder}.{rank}.count").write_text(str(blow.count))


def context():
    """Processes forked from one that has imported all of it."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([__name__])
    return found


def start(processes: int, folder: Path, fatal: Mapping[int, int] | None = None) -> list:
    """Start a session, in which processes may have a fatal blow: its number among the blows that could fall."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        arguments = (rank, processes, port, str(folder), (fatal or {}).get(rank))
        started.append(context().Process(target=session, args=arguments))
        started[-1].start()
    return started


def left_by(folder: Path) -> dict:
    """All that a run has left that does not tell of time."""
    last = folder / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    run = read_run(folder)
    images = {name for shown in run.shown for sample in shown.samples for name in sample.files}
    return {
        "checkpoints": sorted(path.name for path in folder.iterdir() if path.is_dir()),
        "files": sorted(path.name for path in last.iterdir()),
        **{file.name: _plain(torch.load(file, weights_only=False)) for file in last.glob("*.pt")},
        "weights": (last / "model.safetensors").read_bytes(),
        "log": [_timeless(row) for row in state.pop("log_history")],
        "state": {name: value for name, value in state.items() if name not in ("total_flos", "best_model_checkpoint")},
        "metrics": [_timeless(row) for row in run.metrics],
        "shown": run.shown,
        "finished": run.finished,
        "problems": run.problems,
        "images": {name: (folder / "gallery" / name).read_bytes() for name in images},
        "alarms": read_alarms(folder),
        "completions": {
            file.name: pd.read_parquet(file).to_dict("list") for file in (folder / "completions").glob("completions_*")
        },
    }


def _timeless(row: dict) -> dict:
    times = (*NOT_REPEATED, "runtime", "samples_", "steps_")
    return {name: value for name, value in row.items() if not name.removeprefix("eval_").startswith(times)}


def _plain(value):
    """Tensors as lists, so that `==` compares them; no times."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if not str(key).startswith("time/")}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
