"""Several rounds of each prompt of a benchmark, scored as its images are, beside as many images painted alone."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..images import has_failed
from ..models.registry import unified_model
from ..monitoring.files import replace_file
from ..monitoring.image_statistics import image_distance
from ..reporting.pages import data_uri, jpeg, render_page, write_page
from ..sampling import Thinking
from ..sampling.reflection import check_template
from ..sampling.rounds import check_sight
from .benchmark import Benchmark, evenly_spread
from .page import MAX_IMAGES, SIDE
from .refining import Look, Refinement, refine
from .results import Line
from .round_table import Course, round_report
from .runner import Options
from .scorers import RewardScorer, Scorer


def check_rounds_asked(model: Any, scorer: Scorer | None, options: Options, rounds: int, look: Look) -> None:
    """Raise ValueError, before anything is painted, for rounds that can't be made or compared."""
    if scorer is None:
        raise ValueError(f"rounds={rounds}: nothing scores the images, so that rounds can't be compared.")
    if not options.thinking:
        raise ValueError(f"rounds={rounds} without thinking: there is no text that could say what to mend.")
    check_sight(unified_model(model), rounds)
    check_template(look.reflection_template)


def run_rounds(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    scorer: Scorer,
    folder: Path,
    options: Options,
    rounds: int,
    look: Look,
    lines: Sequence[Line],
) -> dict[str, Any]:
    """
    Make several rounds of each prompt, with the first images of the folder; write `rounds.jsonl`, `rounds.json`,
    `rounds.html` and the images.

    Args:
        lines: of the folder, with at least as many images of each prompt as there are rounds.

    Returns:
        The report, see [`round_report`].
    """
    painting, items, started = options.painting, benchmark.items, time.perf_counter()
    found = refine(
        model,
        [item.prompt for item in items],
        tokenizer,
        rounds=rounds,
        look=look,
        thinking=Thinking(True, options.do_sample, options.temperature, painting.max_completion_length),
        num_inference_steps=painting.num_inference_steps,
        timestep_shift=options.timestep_shift,
        image_size=painting.image_size,
        guidance=options.guidance if options.guidance.branches else None,
        system_prompt=options.system_prompt,
        batch_size=painting.batch_size,
        seed=painting.seed,
        source_images=[list(item.source_images) for item in items] if any(x.source_images for x in items) else None,
    )
    seconds = (time.perf_counter() - started) / len(items)
    scores = _scores(found, benchmark, scorer, painting.batch_size)
    rows = [_save(folder, place, one, scores[place]) for place, one in enumerate(found)]
    replace_file(folder / "rounds.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    alone: dict[int, list[float | None]] = {place: [] for place in range(len(items))}
    for line in lines:
        if line["sample"] < rounds:
            alone[line["index"]].append(line["reward"])
    took = {"rounds": seconds, "alone": rounds * sum(line["seconds"] for line in lines) / len(lines)}
    courses = [
        Course(row["rewards"], row["kept"], _changes(one), cluster=item.cluster)
        for row, one, item in zip(rows, found, items, strict=True)
    ]
    perfect = float(len(scorer.rewards)) if isinstance(scorer, RewardScorer) else 1.0
    report = {
        "label": f"{benchmark.title} ({scorer.label})",
        **round_report(courses, list(alone.values()), took, perfect),
        "settings": asdict(look) | {"rounds": rounds},
    }
    replace_file(folder / "rounds.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write_page(folder, report, rows, found, [item.prompt for item in items])
    return report


def _scores(found: Sequence[Refinement], benchmark: Benchmark, scorer: Scorer, batch: int) -> list[list[float | None]]:
    """Score the image that stands after each round of each prompt, every image once."""
    new = [
        (place, number)
        for place, one in enumerate(found)
        for number, image in enumerate(one.images)
        if not (one.stopped and number == len(one.images) - 1) and not has_failed(image)
    ]
    known: dict[tuple[int, int], float | None] = {}
    for start in range(0, len(new), batch):
        chunk = new[start : start + batch]
        items, images = [benchmark.items[place] for place, _ in chunk], [found[place].images[m] for place, m in chunk]
        scores = scorer(items, images, [found[place].texts[m] for place, m in chunk])
        known |= {key: score.reward for key, score in zip(chunk, scores, strict=True)}
    rewards = [[known.get((place, m)) for m in range(len(one.images))] for place, one in enumerate(found)]
    for row, one in zip(rewards, found, strict=True):
        if one.stopped:
            row[-1] = row[-2]
    return rewards


def _changes(one: Refinement) -> list[float | None]:
    """Measure how far each new image is from the one before."""
    changes: list[float | None] = [None]
    for before, image in zip(one.images, one.images[1:], strict=False):
        changes.append(None if has_failed(before) or has_failed(image) else image_distance(image, before))
    return [*changes[:-1], None] if one.stopped else changes


def _save(folder: Path, place: int, one: Refinement, rewards: Sequence[float | None]) -> dict[str, Any]:
    """Write the images of a prompt's rounds, and return its line."""
    names = [f"images/{place:05}/rounds/{number:04}.png" for number in range(len(one.images) - one.stopped)]
    for name, image in zip(names, one.images, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return {
        "index": place,
        "prompt": one.prompt,
        "texts": one.texts,
        "rewards": list(rewards),
        "kept": one.stopped,
        "images": names,
    }


def _write_page(
    folder: Path,
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Refinement],
    prompts: Sequence[str],
) -> None:
    most = max(len(one.images) for one in found)
    shown = evenly_spread(list(zip(rows, found, prompts, strict=True)), max(1, MAX_IMAGES // most))
    courses = [(prompt, _cells(row, one.images), max(one.images[0].size) <= SIDE // 2) for row, one, prompt in shown]
    html = render_page("eval_rounds.html.jinja", report=report, courses=courses, left_out=len(rows) - len(courses))
    write_page(folder / "rounds.html", html)


def _cells(row: Mapping[str, Any], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    last = len(images) - 1
    return [
        {
            "text": text,
            "image": data_uri(jpeg(image, SIDE)),
            "reward": reward,
            "credit": None,
            "kept": row["kept"] and number == last,
        }
        for number, (text, image, reward) in enumerate(zip(row["texts"], images, row["rewards"], strict=True))
    ]
