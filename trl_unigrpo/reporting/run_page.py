"""The page of a run, or of several side by side, from what their folders hold."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .pages import data_uri, render_page, write_page
from .read_back import readings, shaded_words, worst_words
from .run_files import (
    FOLDER,
    Run,
    Shown,
    ShownSample,
    read_run,
)
from .run_summary import (
    change,
    evaluations,
    panels,
    panels_of,
    series,
)


BUDGET = 4_400_000  # bytes of images and texts in a page; with the rest it stays below 5 MB
GENERATIONS = 12
MOST_EVALUATIONS = 8  # evaluations beside each other
ROWS = 8  # prompts of an evaluation
TEXT = 4000  # bytes of a text that a page holds, see `shown_text`
ALARMS = 30


def run_page(run: Run) -> str:
    """Render the page of one run."""
    evaluated = _Budget(BUDGET * 2 // 5)
    view = _view(run, evaluated, ROWS, MOST_EVALUATIONS)
    budget = _Budget(BUDGET * 3 // 5 + evaluated.left)
    several = any(sample.rounds for shown in run.shown for sample in shown.samples)
    generations = _generations(run, budget)
    values = {"panels": panels(run), "generations": generations, "several_rounds": several, "worst": worst_words(run)}
    return render_page("run.html.jinja", view=view, **values)


def comparison_page(runs: Sequence[Run]) -> str:
    """Render several runs in one page: their numbers, curves over each other, and the last images of each."""
    names = unique_names(runs)
    budget = _Budget(BUDGET)
    views = [_view(run, budget, ROWS, 0) for run in runs]
    last = [_generations(run, _Budget(BUDGET // len(runs) // 2), most=1, groups=2) for run in runs]
    return render_page(
        "runs.html.jinja",
        names=names,
        views=views,
        panels=panels_of(runs, names),
        prompts=_side_by_side(runs, budget),
        last=last,
    )


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Name runs by their folders, with the parents' names where two have the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


class _Budget:
    def __init__(self, size: int):
        self.left = size

    def take(self, size: int) -> bool:
        """Take so many bytes if there is room for them, and say whether there was."""
        fits = size <= self.left
        self.left -= size if fits else 0
        return fits


def _view(run: Run, budget: _Budget, rows: int, columns: int) -> dict[str, Any]:
    """Collect what both pages say of a run."""
    return {
        "name": run.name,
        "info": run.info,
        "step": run.step,
        "finished": run.finished,
        **trust(run),
        "change": change(run),
        "rewards": _rewards(run),
        "latest": {name: values[-1] for name in LATEST if (values := series(run, name)[1])},
        "evaluations": [
            _evaluation(run, name, shown, budget, rows, columns) for name, shown in evaluations(run).items() if columns
        ],
    }


def trust(run: Run) -> dict[str, Any]:
    """Collect what the macro `trusted` of run_parts.html.jinja says: the alarms, and what could not be read."""
    alarms = run.alarms
    return {
        "alarms": alarms,
        "alarms_left_out": max(0, len(alarms) - ALARMS),
        "alarms_shown": alarms[-ALARMS:][::-1],
        "watched": run.info.get("alarms", "off") != "off",
        "problems": run.problems[:10],
    }


LATEST = (
    "eval_reward",
    "flow/velocity_mse",
    "flow/clip_frac",
    "images/diversity",
    "time/images_per_second",
    "step_time",
    "reward/frac_none",
)


def _rewards(run: Run) -> list[str]:
    named = run.info.get("rewards")
    if isinstance(named, list):
        return [str(name) for name in named]
    return sorted({name for shown in run.shown for sample in shown.samples for name in sample.rewards})


def _generations(
    run: Run, budget: _Budget, most: int = GENERATIONS, groups: int | None = None
) -> list[dict[str, Any]]:
    """
    Choose generations of the training, the newest first: the last, the first, and of those between as many as fit.
    """
    shown = [s for s in run.shown if s.mode == "train"]
    found: dict[int, dict[str, Any]] = {}
    for i in spread(len(shown)):
        if len(found) == most:
            break
        for few in (groups, 1):
            if budget.take(_size(run, (s for group in shown[i].groups[:few] for s in group))):
                found[i] = _generation(run, shown[i], few)
                break
    return [found[i] for i in sorted(found, reverse=True)]


def spread(number: int) -> Iterable[int]:
    """Order 0 ... number - 1: the last, the first, then again and again the middle of the widest gap."""
    taken = list(dict.fromkeys([number - 1, 0])) if number else []
    yield from taken
    while len(taken) < number:
        ends = sorted(taken)
        _, left = max((b - a, -a) for a, b in pairwise(ends))
        right = ends[ends.index(-left) + 1]
        taken.append((right - left) // 2)
        yield taken[-1]


def _size(run: Run, samples: Iterable[ShownSample]) -> int:
    """Estimate the bytes that samples take in a page."""
    size = 0
    for sample in samples:
        texts = [sample.prompt, sample.thinking, *(str(value) for value in _plain_extra(sample).values())]
        texts += [text for part in sample.rounds for text in (part.text, part.asked)]
        size += 600 * (1 + len(sample.rounds)) + sum(min(TEXT, len(text)) for text in texts)
        size += sum(map(len, _shaded(sample).values()))
        for name in sample.files:
            if (file := run.folder / FOLDER / name).is_file():
                size += math.ceil(file.stat().st_size * 4 / 3)
    return size


def _generation(run: Run, shown: Shown, groups: int | None = None) -> dict[str, Any]:
    return {
        "step": shown.step,
        "total": shown.total,
        "number": sum(map(len, shown.groups[:groups])),
        "groups": [
            {"prompt": group[0].prompt, "samples": [_sample(run, shown, sample) for sample in group]}
            for group in shown.groups[:groups]
        ],
    }


def _sample(run: Run, shown: Shown, sample: ShownSample) -> dict[str, Any]:
    alarms = [alarm for alarm in run.alarms if (alarm.step, alarm.mode) == (shown.step, shown.mode)]
    return {
        "index": sample.index,
        "prompt": sample.prompt,
        "thinking": sample.thinking,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "rewards": sample.rewards,
        "extra": _plain_extra(sample),
        "read_back": _shaded(sample),
        "image": _image(run, sample.image),
        "sources": [_image(run, name) for name in sample.sources],
        "rounds": [
            {
                "text": part.text,
                "image": _image(run, part.image),
                "reward": part.reward,
                "credit": part.advantage if shown.mode == "train" else None,
                "kept": part.kept,
                "origin": part.origin,
                "begun": _image(run, part.begun),
                "asked": part.asked,
            }
            for part in sample.rounds
        ],
        "tiny": shown.side <= 96,
        "alarms": [alarm.name for alarm in alarms if sample.index in alarm.indices],
    }


def _shaded(sample: ShownSample) -> dict[str, Markup]:
    """Show what was read back of a sample's prompt, by each reward that reads."""
    return {name: shaded_words(reading) for name, reading in readings(sample.extra).items()}


def _plain_extra(sample: ShownSample) -> dict[str, Any]:
    """Return all else that reward functions logged of it."""
    read = readings(sample.extra)
    return {name: value for name, value in sample.extra.items() if value not in (None, "") and name not in read}


def _image(run: Run, name: str | None) -> Markup | None:
    """Read an image as a URL; None where it was not kept, or its file is gone."""
    if name is None:
        return None
    folder = (run.folder / FOLDER).resolve()
    file = (folder / name).resolve()
    if not file.is_relative_to(folder):  # a page must not carry off other files
        return None
    try:
        return Markup(data_uri(file.read_bytes()))
    except OSError:
        return None


def _evaluation(
    run: Run, name: str, evaluated: Sequence[Shown], budget: _Budget, rows: int, columns: int
) -> dict[str, Any]:
    """Arrange prompts down and evaluations across; each prompt's first image."""
    kept: list[Shown] = []
    for i in spread(len(evaluated)):
        if len(kept) == columns or not budget.take(_size(run, _firsts(evaluated[i])[:rows])):
            break
        kept.append(evaluated[i])
    kept.sort(key=lambda shown: shown.step)
    prompts = [sample.prompt for sample in _firsts(kept[0])[:rows]] if kept else []
    return {
        "name": name,
        "number": len(_firsts(evaluated[-1])),
        "steps": [shown.step for shown in kept],
        "rows": [
            {
                "prompt": prompt,
                "samples": [
                    _sample(run, shown, firsts[i]) if i < len(firsts) and firsts[i].prompt == prompt else None
                    for shown, firsts in ((shown, _firsts(shown)) for shown in kept)
                ],
            }
            for i, prompt in enumerate(prompts)
        ],
    }


def _firsts(shown: Shown) -> list[ShownSample]:
    """Return the first sample of each group of an evaluation: the same prompt and noise whenever it runs."""
    return list(shown.samples[:: shown.group_size])


def _side_by_side(runs: Sequence[Run], budget: _Budget) -> list[dict[str, Any]]:
    """Arrange prompts that all runs were evaluated on: the image of each run's last evaluation."""
    last = [next((found[-1] for found in evaluations(run).values()), None) for run in runs]
    if any(shown is None for shown in last):
        return []
    firsts = [{sample.prompt: sample for sample in reversed(_firsts(shown))} for shown in last if shown is not None]
    rows: list[dict[str, Any]] = []
    for prompt in firsts[0]:
        samples = [of.get(prompt) for of in firsts]
        whole = [sample for sample in samples if sample is not None and sample.image is not None]
        if len(whole) < len(runs) or len(rows) == 2 * ROWS:
            continue
        size = sum(_size(run, [sample]) for run, sample in zip(runs, whole, strict=True))
        if budget.take(size):
            shown = [s for s in last if s is not None]
            rows.append(
                {
                    "prompt": prompt,
                    "samples": [_sample(r, s, sample) for r, s, sample in zip(runs, shown, whole, strict=True)],
                }
            )
    return rows


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """
    Write the page of a run, or of several side by side, and return its file.

    Args:
        folders: output folders of finished, running or interrupted runs.
        output: the file; by default `gallery.html` in the folder of a single run, else `comparison.html` here.

    Raises:
        NoRunError: for a folder without a run.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("No folder given: expected at least one.")
    file = runs[0].folder / "gallery.html" if len(runs) == 1 else Path("comparison.html")
    file = file if output is None else Path(output)
    write_page(file, run_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    return file
