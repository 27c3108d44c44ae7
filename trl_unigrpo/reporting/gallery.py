"""The gallery of a run: `<output_dir>/gallery.html`, and the files that it is made of."""

import logging
import time
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..monitoring.events import Generation, RoundNote, Series, Watcher
from ..monitoring.image_statistics import diversity
from .description import describe_run
from .pages import jpeg, prompt_text, shrunk, write_page
from .run_files import (
    Records,
    Shown,
    ShownRound,
    ShownSample,
    read_run,
)
from .run_page import run_page
from .trackers import grid, log_image
from .worker import Worker


logger = logging.getLogger(__name__)

SAMPLES = 48  # images of a generation that are kept, in whole groups but at least one
PROMPTS = 16  # prompts of an evaluation whose images are kept
SIDE, QUALITY = 256, 80  # of the images, as JPEG
SHARE = 0.01  # of the time that may go into pages, between the last and the next

Fetched = tuple[Mapping[int, Image.Image], Mapping[int, Series]]
"""Of the places that are kept: the last image, and where there is more, all of them; as small as they are written."""


class Gallery(Watcher, ExportableState):
    """
    A watcher that keeps what a run painted and logged, and a page of it. The first process writes; nothing of it can
    stop a run.

    Every `gallery_steps` optimizer steps the page gets the generation of the time, at the end the last one, and each
    evaluation. It shows groups sorted by reward, the evaluation's prompts over time, curves and alarms.

    Images are encoded, and the page is written, in a thread of their own.
    """

    def __init__(self) -> None:
        self._records: Records | None = None
        self._worker = Worker("The gallery")
        self.last_shown: int | None = None
        self._evaluated: list[tuple[Generation, Fetched]] = []  # the batches of the evaluation in progress
        self._callbacks: Sequence[TrainerCallback] = ()
        self._page_cost, self._page_time = 0.0, 0.0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"last_shown": self.last_shown}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # In all processes: which generations are shown is decided in each alike, and so that a resumed run shows those
        # that it would have shown.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.last_shown = saved["attributes"]["last_shown"] if state.global_step else None
        if not self._writes(args, state):
            return
        records = self._open(args)
        info = describe_run(model, args, state)
        self._worker.do(lambda: records.info(info))
        start = state.global_step
        self._worker.do(lambda: records.add("start", start))

    def on_generation(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        generation: Generation,
        metrics: MutableMapping[str, list[float]],
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        if getattr(args, "gallery_steps", 0) > 0 and generation.group_size > 1:
            metrics.setdefault("images/diversity", []).append(diversity(generation.statistics, generation.group_size))
        if getattr(args, "gallery_steps", 0) == 0:
            return
        self._callbacks = callbacks
        # What is shown is decided in every process alike: its images come from all of them.
        if generation.mode == "eval":
            self._evaluated.append(self._few_images(generation))
        elif self._due(args, state):
            fetched = _fetch(generation, choose_places(generation))
            if self._writes(args, state):
                self._show(args, state, generation, fetched, "")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        batches, self._evaluated = self._evaluated, []
        if batches and self._writes(args, state):
            self._show(args, state, *merge(batches), dataset_name(metrics or {}))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and self._writes(args, state):
            records, step, values = self._open(args), state.global_step, dict(logs)
            self._worker.do(lambda: records.add("metrics", step, values=values))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._finish(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writes(args, state):
            records, step = self._open(args), state.global_step
            if step >= state.max_steps:
                self._worker.do(lambda: records.add("end", step))
            self._finish(args, state)
            records.close()

    def _few_images(self, batch: Generation) -> tuple[Generation, Fetched]:
        """Leave out the images that will not be shown: those of a long evaluation would fill the memory."""
        before = sum(len(earlier.prompts) // earlier.group_size for earlier, _ in self._evaluated)
        fetched = _fetch(batch, choose_places(batch)[: max(0, PROMPTS - before)])
        return replace(batch, images=[], statistics=[], series=[]), fetched

    def wait(self) -> None:
        """Return when all that was shown so far is on disk."""
        self._worker.wait()

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        """Have all of it on disk."""
        if self._writes(args, state) and self._records is not None:
            self._worker.do(lambda: self._write_page(args, at_once=True))
            self._worker.wait()

    def _writes(self, args: TrainingArguments, state: TrainerState) -> bool:
        return state.is_world_process_zero and getattr(args, "gallery_steps", 0) > 0

    def _open(self, args: TrainingArguments) -> Records:
        if self._records is None:
            self._records = Records(args.output_dir, uuid.uuid4().hex[:12])
        return self._records

    def _due(self, args: Any, state: TrainerState) -> bool:
        """
        Say whether the generation before this step is shown: the first in each `gallery_steps`, and the run's last.
        """
        step, last = state.global_step, self.last_shown
        of_generation = max(1, args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps)
        due = last is None or step // args.gallery_steps > last // args.gallery_steps
        if due or step + of_generation >= state.max_steps:
            self.last_shown = step
            return True
        return False

    def _show(
        self,
        args: TrainingArguments,
        state: TrainerState,
        generation: Generation,
        fetched: Fetched,
        dataset: str,
    ) -> None:
        records, step = self._open(args), state.global_step

        def work() -> None:
            shown, files = choose(generation, step, dataset, fetched)
            records.show(shown, files)
            self._write_page(args)

        self._worker.do(work)
        columns = generation.group_size if generation.group_size > 1 else 8
        try:
            log_image(
                f"gallery/{generation.mode}",
                lambda: grid(list(fetched[0].values()), columns),
                step,
                args.report_to or (),
                self._callbacks,
            )
        except Exception:
            logger.exception("The gallery's images did not reach a tracker. Training goes on.")

    def _write_page(self, args: TrainingArguments, at_once: bool = False) -> None:
        started = time.perf_counter()
        if not at_once and started - self._page_time < self._page_cost / SHARE:
            return
        output = Path(args.output_dir)
        write_page(output / "gallery.html", run_page(read_run(output)))
        self._page_time = time.perf_counter()
        self._page_cost = self._page_time - started


def choose_places(generation: Generation) -> list[int]:
    """Choose what is kept: the first groups of a training's batch, the first prompts of an evaluation."""
    size, total = generation.group_size, len(generation.prompts)
    if generation.mode == "eval":
        return list(range(0, total, size))[:PROMPTS]
    return list(range(min(total, max(1, SAMPLES // size) * size)))


def _fetch(generation: Generation, places: Sequence[int]) -> Fetched:
    small = partial(shrunk, max_side=SIDE)  # as they are written: in full, a batch would be gigabytes
    return generation.fetch(places, small), generation.fetch_series(places, small)


def choose(
    generation: Generation, step: int, dataset: str = "", fetched: Fetched | None = None
) -> tuple[Shown, dict[str, bytes]]:
    """
    Choose what the gallery keeps of a generation, and its images: file in the folder `gallery` -> JPEG.

    Args:
        fetched: images of those that are kept; by default this process has them all.
    """
    kept = choose_places(generation)
    images, series = _fetch(generation, kept) if fetched is None else fetched
    place = "-".join(filter(None, [generation.mode, _file_name(dataset), f"{step:06d}"]))
    files, size = _Files(place), generation.group_size
    names = {i: files.add(i, images[i]) for i in kept}
    sources = {
        i: [files.add(i - i % size, image, f"-source{n}") for n, image in enumerate(one.sources, start=1)]
        for i, one in series.items()
    }
    several = any(len(notes) > 1 for notes in generation.rounds)
    rounds = {i: _rounds(generation.rounds[i], i, one, files) for i, one in series.items() if several}
    # Of an evaluation all numbers are kept, as two of them are compared prompt by prompt.
    chosen = range(len(generation.prompts)) if generation.mode == "eval" else kept
    samples = [
        ShownSample(
            index=i,
            prompt=prompt_text(generation.prompts[i]),
            thinking=generation.thinking[i],
            reward=_finite(generation.reward[i]),
            advantage=_finite(generation.advantages[i]) or 0.0,
            rewards={name: _finite(values[i]) for name, values in generation.rewards.items()},
            extra={name: values[i] for name, values in generation.extra.items() if i in names},
            image=names.get(i),
            sources=sources.get(i, ()),
            rounds=rounds.get(i, ()),
        )
        for i in chosen
    ]
    side = max(images[kept[0]].size)
    total = len(generation.prompts)
    return Shown(step, generation.mode, dataset, size, total, side, samples), files.jpegs


class _Files:
    """The images of a generation as JPEG, each encoded once: name -> file."""

    def __init__(self, place: str):
        self.place = place
        self.jpegs: dict[str, bytes] = {}

    def add(self, index: int, image: Image.Image, part: str = "") -> str:
        """Add an image of a sample, if it is not there yet, and return its name."""
        name = f"images/{self.place}-{index:04d}{part}.jpg"
        if name not in self.jpegs:
            self.jpegs[name] = jpeg(image, SIDE, QUALITY)
        return name


def _rounds(notes: Sequence[RoundNote], index: int, series: Series, files: _Files) -> list[ShownRound]:
    """Add the images of a sample's rounds to the files."""
    last = max((m for m, image in enumerate(series.painted) if image is not None), default=0)
    rounds = []
    for m, (note, image, begun) in enumerate(zip(notes, series.painted, series.begun, strict=True)):
        # The last one is the sample's own. One image that all of a group go on from is kept once.
        file = None if image is None else files.add(index, image, "" if m == last else f"-round{m + 1}")
        before = None if note.origin is None or begun is None else files.add(note.origin, begun, f"-begun{m + 1}")
        rounds.append(
            ShownRound(
                note.text,
                note.reward,
                _finite(note.advantage) or 0.0,
                note.kept,
                file,
                note.origin,
                before,
                note.asked,
            )
        )
    return rounds


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _file_name(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in text)[:40]


def merge(
    parts: Sequence[tuple[Generation, Fetched]],
) -> tuple[Generation, Fetched]:
    """Join the batches of an evaluation, and the images of those that are kept."""
    batches, images, series, before = [batch for batch, _ in parts], {}, {}, 0
    for batch, (kept, of_rounds) in parts:
        images.update({before + place: image for place, image in kept.items()})
        series.update({before + place: one for place, one in of_rounds.items()})
        before += len(batch.prompts)
    names = {name for batch in batches for name in batch.extra}
    merged = Generation(
        mode=batches[0].mode,
        group_size=batches[0].group_size,
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        thinking=[text for batch in batches for text in batch.thinking],
        images=[],
        statistics=[],
        rewards={name: [x for batch in batches for x in batch.rewards[name]] for name in batches[0].rewards},
        weights=batches[0].weights,
        advantages=[x for batch in batches for x in batch.advantages],
        extra={
            name: [x for batch in batches for x in batch.extra.get(name, [None] * len(batch.prompts))]
            for name in sorted(names)
        },
        rounds=[notes for batch in batches for notes in batch.rounds],
    )
    return merged, (images, series)


def dataset_name(metrics: dict[str, Any]) -> str:
    """
    Find the name of the evaluation's dataset where there are several, as `evaluate` puts it into its metrics; else "".
    """
    prefix = next((name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")), "eval")
    return prefix.removeprefix("eval").strip("_")
