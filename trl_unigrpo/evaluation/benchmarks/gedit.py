"""GEdit-Bench (arXiv 2504.17761): images, and how to edit them, in English and Chinese."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...models.sources import source_fault
from ..benchmark import Benchmark, Item
from ..metrics import edit_quality
from .edits import as_file_name, edit_and_quality_questions
from .rows import located_rows, parse, undecoded


EDIT_TASKS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
LANGUAGES = ("en", "cn")
IMAGES = ("input_image", "input_image_raw")


def load_gedit(path: str | Path) -> Benchmark:
    """
    Read the benchmark's folder, as `datasets` saves it, or a file of it: `key`, `task_type`, `instruction`,
    `instruction_language` and `input_image`.
    """
    items, problems = parse(_rows(Path(path)), _items)
    return Benchmark(
        "gedit",
        "GEdit-Bench",
        items,
        problems,
        metric=edit_quality,
        overall="tasks",
        notes=(
            "Officially GPT-4o or Qwen2.5-VL gives two scores out of 10 for semantic consistency, whose lower one "
            "counts, and two for quality; here these are the probabilities of three yes-no questions in our words.",
            "English and Chinese instructions are tasks of their own; official tables have one overall score for each "
            "language.",
        ),
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        found = load_from_disk(str(path))
        for name, part in found.items() if hasattr(found, "items") else [("data", found)]:
            for number, row in enumerate(undecoded(part)):
                yield f"{name}, row {number}", row
    else:
        yield from located_rows(path, ".parquet", ".jsonl")


def _items(row: dict[str, Any], where: str) -> Iterable[Item]:
    task, language, key, instruction = (
        row[name] for name in ("task_type", "instruction_language", "key", "instruction")
    )
    if task not in EDIT_TASKS:
        raise ValueError(f"'task_type' is {task!r}, expected one of {', '.join(EDIT_TASKS)}")
    if language not in LANGUAGES:
        raise ValueError(f"'instruction_language' is {language!r}, expected 'en' or 'cn'")
    if (fault := source_fault(row["input_image"])) is not None:
        raise ValueError(f"'input_image' is {fault}")
    return [
        Item(
            f"{language}/{as_file_name(key)}",
            instruction,
            f"{language}/{task}",
            edit_and_quality_questions(instruction),
            {name: value for name, value in row.items() if name not in IMAGES},
            source_images=(row["input_image"],),
            official=f"fullset/{task}/{language}/{key}.png",
        )
    ]
