"""Paint a benchmark and score it, image by image into a folder that a later run goes on with."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..flow.guidance import Guidance
from ..image_sizes import plain_size, read_size
from ..images import has_failed
from ..models.prompts import as_messages, choose_system_prompt
from ..models.registry import unified_model
from ..models.sources import read_sources, source_bytes
from ..models.tokenizer import check_messages, prepare_tokenizer
from ..rewards.questions.question import earned
from ..sampling import generate
from .benchmark import Benchmark, Item, Painting
from .results import (
    Line,
    append_lines,
    image_file,
    open_folder,
    read_lines,
    write_lines,
    write_metadata,
    write_sources,
)
from .scorers import Score, Scorer


IMAGE_POSITIONS = 8
"""Positions kept for an image and the markers around it, which take fewer."""

NOT_A_NUMBER = "the image came out of the VAE as NaN or infinity"
"""Why an image was not scored, nor will be."""


@dataclass(frozen=True)
class Options:
    """
    Settings that images are made with; see [`generate`].

    Attributes:
        painting: samples, steps, sizes and seed; a benchmark's own by default.
    """

    painting: Painting
    thinking: bool = True
    do_sample: bool = True
    temperature: float = 1.0
    timestep_shift: float = 3.0
    guidance: Guidance = field(default_factory=Guidance)
    system_prompt: str = "auto"

    def __post_init__(self) -> None:
        read_size(self.painting.image_size)
        for name, value in asdict(replace(self.painting, image_size=1)).items():
            least = 0 if name == "seed" else 1
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}.")


def with_changes(painting: Painting, **changes: Any) -> Painting:
    """Change a benchmark's defaults to what the user set; sizes in one form, as folders of results hold them."""
    changed = replace(painting, **{name: value for name, value in changes.items() if value is not None})
    return replace(changed, image_size=plain_size(read_size(changed.image_size)))


def settings_of(
    benchmark: Benchmark, options: Options, scorer: Scorer | None, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect all that a folder's results depend on, as JSON can hold it."""
    guidance = asdict(options.guidance) if options.guidance.branches else None
    painting = {**asdict(options.painting), **{k: v for k, v in asdict(options).items() if k != "painting"}}
    return {
        "benchmark": {
            "name": benchmark.name,
            "title": benchmark.title,
            "prompts": len(benchmark.items),
            "digest": items_digest(benchmark.items),
            "overall": benchmark.overall if isinstance(benchmark.overall, str) else dict(benchmark.overall),
            "pooled": benchmark.pooled,
        },
        "model": dict(model),
        "painting": {**painting, "guidance": guidance},
        "scorer": None if scorer is None else dict(scorer.settings),
    }


def without_unfit_prompts(
    benchmark: Benchmark, model: Any, tokenizer: PreTrainedTokenizerBase, options: Options
) -> Benchmark:
    """
    Move the prompts that the model has no room for, beside its longest thinking, or that hold special tokens, to the
    benchmark's problems.

    This is done before anything is painted: a batch with one of them would fail as a whole.
    """
    base = unified_model(model)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    tokenizer = prepare_tokenizer(tokenizer, base.chat_template)
    system = choose_system_prompt(base, options.system_prompt, options.thinking)
    room = (limit or math.inf) - IMAGE_POSITIONS - (options.painting.max_completion_length if options.thinking else 0)
    kept, problems = [], []
    for item in benchmark.items:
        messages = as_messages(item.prompt, system)
        try:
            check_messages([messages], tokenizer)
        except ValueError as error:
            problems.append(f"{item.key}: {error}")
            continue
        length = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if length <= room:
            kept.append(item)
        else:
            problems.append(
                f"{item.key}: the prompt takes {length} tokens; of its {limit} positions the model has {room} left "
                "beside a thinking of max_completion_length"
            )
    return replace(benchmark, items=tuple(kept), problems=(*benchmark.problems, *problems)) if problems else benchmark


def items_digest(items: Sequence[Item]) -> str:
    """Give 16 hexadecimal digits of the SHA-256 of all prompts, tasks, questions and source images."""
    rows = [
        [item.key, item.prompt, item.task, [question.to_dict() for question in item.questions]]
        + [hashlib.sha256(image).hexdigest() for image in map(source_bytes, item.source_images)]
        for item in items
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    scorer: Scorer | None,
    folder: str | Path,
    options: Options | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> list[Line]:
    """
    Paint and score what the folder does not have yet. Images without a score are scored again, not painted again.

    Row r is sample r // N of prompt r % N, of N prompts: more samples leave the first ones as they are. Whole batches
    are painted, so that a run that was stopped and goes on gives the same images as one that was not.

    Args:
        scorer: None only paints.
        folder: see [`results`].
        fingerprint: the digest by which the model's weights are known.
        on_images: called with (images done, images to do) at the start and after each batch.

    Returns:
        One line per image, in the order of rows.

    Raises:
        DifferentSettingsError: if the folder holds results of other settings.
        DeadRewardError: if the scorer fails batch after batch; what was painted is kept.
    """
    options = options or Options(benchmark.painting)
    folder = Path(folder)
    open_folder(folder, settings_of(benchmark, options, scorer, fingerprint or {}))
    items, batch = benchmark.items, options.painting.batch_size
    total = len(items) * options.painting.samples
    done = {line["row"]: line for line in read_lines(folder) if (folder / line["image"]).is_file()}
    write_lines(folder, done.values())  # without the line that a killed run left half written
    if scorer is not None:
        _score_again(folder, done, items, scorer, batch, benchmark.soft)
    on_images(len(done), total)
    for start in range(0, total, batch):
        rows = range(start, min(start + batch, total))
        missing = [row for row in rows if row not in done]
        if missing:
            lines, images = _paint(model, tokenizer, items, rows, missing, folder, options)
            try:
                lines = scored(lines, items, images, scorer, benchmark.soft)
            except BaseException:  # a dead judge, or Ctrl-C while it is waited for: the painting is not lost
                append_lines(folder, scored(lines, items, images, None, benchmark.soft))
                raise
            append_lines(folder, lines)
            done.update((line["row"], line) for line in lines)
            on_images(len(done), total)
    ordered = [done[row] for row in range(total)]
    write_lines(folder, ordered)
    return ordered


def _paint(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    rows: Sequence[int],
    missing: Sequence[int],
    folder: Path,
    options: Options,
) -> tuple[list[Line], list[Image.Image]]:
    """Paint the batch of these rows; keep the images that are missing, with their lines."""
    started, own = time.perf_counter(), [items[row % len(items)] for row in rows]
    samples = generate(
        model,
        [item.prompt for item in own],
        tokenizer,
        thinking=options.thinking,
        do_sample=options.do_sample,
        temperature=options.temperature,
        max_completion_length=options.painting.max_completion_length,
        num_inference_steps=options.painting.num_inference_steps,
        timestep_shift=options.timestep_shift,
        image_size=options.painting.image_size,
        guidance=options.guidance if options.guidance.branches else None,
        system_prompt=options.system_prompt,
        batch_size=len(rows),
        seed=options.painting.seed,
        first_row=rows[0],
        source_images=[list(item.source_images) for item in own] if any(item.source_images for item in own) else None,
    )
    seconds = (time.perf_counter() - started) / len(rows)
    kept = [samples[rows.index(row)] for row in missing]
    lines = []
    for row, sample in zip(missing, kept, strict=True):
        item, place, number = items[row % len(items)], row % len(items), row // len(items)
        line: Line = {
            "row": row,
            "key": item.key,
            "index": place,
            "sample": number,
            "tag": item.task,
            "prompt": item.prompt,
            "cluster": item.cluster,
            "seed": options.painting.seed,
            "thinking": sample.thinking,
            "image": image_file(place, number),
        }
        file = folder / line["image"]
        write_metadata(folder, place, {"prompt": item.prompt, **item.columns, "tag": item.task})
        if item.source_images:
            write_sources(folder, place, read_sources(item.source_images))
        file.parent.mkdir(exist_ok=True)
        sample.image.save(file)
        if item.official and number == 0:
            (folder / "official" / item.official).parent.mkdir(parents=True, exist_ok=True)
            sample.image.save(folder / "official" / item.official)
        lines.append(line | {"seconds": round(seconds, 3)})
    return lines, [sample.image for sample in kept]


def scored(
    lines: Sequence[Line], items: Sequence[Item], images: Sequence[Image.Image], scorer: Scorer | None, soft: bool
) -> list[Line]:
    """Add their scores to the lines; without a scorer, none."""
    own = [items[line["index"]] for line in lines]
    if scorer is None:
        return [line | {"reward": None, "scores": {}, "questions": [], "error": "not scored"} for line in lines]
    fine = [place for place, image in enumerate(images) if not has_failed(image)]
    seen, thinkings = [images[place] for place in fine], [lines[place]["thinking"] for place in fine]
    known = dict(zip(fine, scorer([own[place] for place in fine], seen, thinkings), strict=True)) if fine else {}
    found = [known.get(place, Score(None, {}, error=NOT_A_NUMBER)) for place in range(len(lines))]
    return [
        line
        | {
            "reward": score.reward,
            "scores": dict(score.scores),
            "questions": answered(item, score, soft),
            "error": score.error,
        }
        for line, item, score in zip(lines, own, found, strict=True)
    ]


def answered(item: Item, score: Score, soft: bool) -> list[dict[str, Any]]:
    """List the questions with P(yes) and what that earned, None for both where there was no answer."""
    if not score.answers:
        return []
    points = earned(item.questions, list(score.answers))
    return [
        {
            "question": question.text,
            "expected": question.expected,
            "group": question.group,
            "answer": answer,
            "earned": point if soft or point is None else float(point >= 0.5),
        }
        for question, answer, point in zip(item.questions, score.answers, points, strict=True)
    ]


def _score_again(
    folder: Path, done: dict[int, Line], items: Sequence[Item], scorer: Scorer, batch: int, soft: bool
) -> None:
    """Score the images on the disk that have no score."""
    waiting = [line for _, line in sorted(done.items()) if line["reward"] is None and line["error"] != NOT_A_NUMBER]
    for start in range(0, len(waiting), batch):
        chunk = waiting[start : start + batch]
        images = [read_image(folder / line["image"]) for line in chunk]
        lines = scored(chunk, items, images, scorer, soft)
        done.update((line["row"], line) for line in lines)
        write_lines(folder, done.values())


def read_image(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
