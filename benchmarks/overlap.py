"""A generation whose judge is asked while images are painted, against the same one that asks afterwards.

    python benchmarks/overlap.py

320 images, painted 16 at a time, for as long as the judge needs for all of them: 300 ms an image behind 16
connections. The trainer, the judge and the requests are real, the server is another process; the painter is a tiny
model that waits in each denoising step, as the CPU does for a GPU. The simulation is the same schedule if the trainer
and the judge cost nothing.
"""

import argparse
import heapq
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from judge import server
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.rewards import VLMJudge
from trl_unigrpo.shapeworld import BASE, demo_settings, shapeworld_dataset


RESULTS = Path(__file__).parent / "results" / "overlap.json"
STEPS = 4


class AskedAfterwards(VLMJudge):
    """A judge that is asked about whole batches."""

    per_image = False


def simulate(finished: Sequence[float], per_chunk: int, connections: int, seconds: float) -> float:
    """Give the time of the last answer, if chunks of images are finished at such times and nothing else costs any."""
    free, end = [0.0] * connections, 0.0
    for ready in finished:
        for _ in range(per_chunk):
            end = max(ready, heapq.heappop(free)) + seconds
            heapq.heappush(free, end)
    return end


def wait_in_each_step(model: Any, seconds: float) -> None:
    """Let each denoising step of a model take so long."""
    predict = model.predict_velocity

    def waiting(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        velocity = predict(*args, **kwargs)
        time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
        return velocity

    model.predict_velocity = waiting


def generation(judge: VLMJudge, images: int, per_chunk: int, step_seconds: float) -> dict[str, float]:
    """Sample an evaluation, after one to warm up: its seconds of painting, and of waiting for the judge after it."""
    rows = shapeworld_dataset("validation").select(range(images))
    settings = {
        **demo_settings(),
        "thinking": False,
        "text_weight": 0.0,
        "eval_num_inference_steps": STEPS,
        "image_batch_size": per_chunk,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": images,
        "gallery_steps": 0,
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = UniGRPOConfig(output_dir=folder, **settings)
        trainer = UniGRPOTrainer(str(BASE), judge, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.evaluate(rows.select(range(per_chunk)))
        wait_in_each_step(trainer.unified, step_seconds)
        found = trainer.evaluate()
    assert found["eval_VLMJudge/failed"] == 0
    return {
        "painting_seconds": found["eval_time/paint"],
        "waiting_seconds": found["eval_time/reward"],
        "judging_before_seconds": found.get("eval_time/reward_ahead", 0.0),
    }


def measure(images: int, per_chunk: int, connections: int, seconds: float) -> dict[str, Any]:
    judging = seconds * images / connections
    step_seconds = judging * per_chunk / images / STEPS
    found = {}
    with server(seconds, share=0.0) as url:
        for name, kind in (("without_overlap", AskedAfterwards), ("with_overlap", VLMJudge)):
            judge = kind("m", url, template="Is this number 1? {prompt}", concurrency=connections)
            found[name] = generation(judge, images, per_chunk, step_seconds)
    alone = found["without_overlap"]["painting_seconds"]
    for row in found.values():
        row["added_by_judging"] = (row["painting_seconds"] + row["waiting_seconds"]) / alone - 1
    chunks = images // per_chunk
    ends = [(i + 1) * judging / chunks for i in range(chunks)]
    simulated = simulate(ends, per_chunk, connections, seconds)
    return {
        "images": images,
        "images_at_once": per_chunk,
        "connections": connections,
        "seconds_per_image": seconds,
        "seconds_to_judge_all": judging,
        **found,
        "simulation": {
            "painting_seconds": ends[-1],
            "waiting_seconds": simulated - ends[-1],
            "added_by_judging": simulated / ends[-1] - 1,
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--per-chunk", type=int, default=16, help="images painted at once")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=0.3, help="that the endpoint takes for an image")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    quiet()
    result = {
        **measure(options.images, options.per_chunk, options.connections, options.seconds),
        "versions": {package: version(package) for package in ("torch", "trl", "openai", "httpx2")},
        "machine": platform.processor() or platform.machine(),
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "command": "python benchmarks/overlap.py",
        "date": str(date.today()),
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", "painting, s", "waiting for the judge, s", "added")
    for name in ("without_overlap", "with_overlap", "simulation"):
        row = result[name]
        table.add_row(
            name, *(f"{row[key]:.2f}" for key in ("painting_seconds", "waiting_seconds", "added_by_judging"))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
