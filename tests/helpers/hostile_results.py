"""Folders of results whose every text is hostile, and their pages."""

import shutil

import numpy as np
from PIL import Image

from trl_unigrpo.evaluation.page import write_index
from trl_unigrpo.evaluation.results import (
    append_lines,
    image_file,
    open_folder,
    read_settings,
)
from trl_unigrpo.evaluation.summary import summarize


EVIL = "<script>alert('{}')</script><img src=x onerror=alert(1)>\x1b[31m\u202e\"'&"


def folder_of(path, prompts, samples, size=48, seed=0):
    """Results whose every text is hostile."""
    random = np.random.default_rng(seed)
    benchmark = {"name": "prompts", "title": EVIL.format("title"), "overall": "mean", "pooled": False}
    open_folder(path, {"benchmark": benchmark, "scorer": EVIL.format("scorer"), EVIL.format(f"name {seed}"): seed})
    image = path / "noise.png"
    Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(image)
    lines = []
    for row in range(prompts * samples):
        place, sample = row % prompts, row // prompts
        reward = None if row == 1 else float(random.uniform())
        question = {"question": EVIL.format("question"), "expected": "yes", "answer": reward, "earned": reward}
        line = {
            "row": row,
            "key": str(place),
            "index": place,
            "sample": sample,
            "tag": EVIL.format(f"tag {place % 2}"),
        }
        line |= {
            "prompt": f"{place} {EVIL.format('prompt')}",
            "cluster": str(place),
            "image": image_file(place, sample),
        }
        line |= {"thinking": EVIL.format("thinking"), "reward": reward, "scores": {EVIL.format("score"): reward}}
        line |= {
            "questions": [question | {"group": EVIL.format("group")}] * 14,
            "error": EVIL.format("error"),
            "seconds": 1.0,
        }
        lines.append(line)
        (path / line["image"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, path / line["image"])
    append_lines(path, lines)
    return path, lines


def index_of(path, prompts, samples, **options):
    folder, lines = folder_of(path, prompts, samples, **options)
    more = {"model": EVIL.format("model"), "problems": [EVIL.format("problem")] * 25, "notes": [EVIL.format("note")]}
    write_index(folder, {**summarize(read_settings(folder), lines, EVIL.format("label")), **more}, lines)
    return folder / "index.html"
