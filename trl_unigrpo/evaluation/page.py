"""Pages of results: what a folder holds, and two folders side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..reporting.pages import (
    data_uri,
    jpeg,
    render_page,
    write_page,
)
from .benchmark import evenly_spread
from .compare import Pair
from .results import Line, source_files
from .runner import read_image
from .summary import shown


MAX_IMAGES = 240
"""The most images on a page."""
SIDE = 176
"""Pixels of an image's longer side."""
MAX_ANSWERS = 12
"""Answers shown below an image; the wrong ones first."""


def write_index(folder: Path, summary: Mapping[str, Any], lines: Sequence[Line]) -> None:
    """Write `index.html`: scores, and each prompt's images with thinkings and answers."""
    groups: dict[int, list[Line]] = {}
    for line in sorted(lines, key=lambda line: (line["index"], line["sample"])):
        groups.setdefault(line["index"], []).append(line)
    most = max((len(group) + len(source_files(folder, place)) for place, group in groups.items()), default=1)
    chosen = evenly_spread(list(groups.values()), max(1, MAX_IMAGES // most))
    tasks: dict[str, list[list[dict[str, Any]]]] = {}
    for group in chosen:
        tasks.setdefault(group[0]["tag"], []).append([card(folder, line) for line in group])
    html = render_page(
        "eval_index.html.jinja",
        summary=summary,
        shown=shown,
        bounds=bounds,
        tasks=tasks,
        settings=json.dumps(summary["settings"], indent=2, ensure_ascii=False),
        left_out=len(groups) - len(chosen),
    )
    write_page(folder / "index.html", html)


def write_comparison(folder: Path, report: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """Write `compare.html`: the differences, and pairs of images, those that differ most first."""
    chosen = evenly_spread(sorted(pairs, key=lambda pair: pair.difference), MAX_IMAGES // 2)
    ordered = sorted(chosen, key=lambda pair: -abs(pair.difference))
    a, b = Path(report["a"]), Path(report["b"])
    html = render_page(
        "eval_compare.html.jinja",
        report=report,
        shown=shown,
        bounds=bounds,
        pairs=[
            (pair.difference, card(a, pair.a, _from(folder, a)), card(b, pair.b, _from(folder, b))) for pair in ordered
        ],
        left_out=len(pairs) - len(chosen),
    )
    write_page(folder / "compare.html", html)


def card(folder: Path, line: Line, prefix: str = "") -> dict[str, Any]:
    """Collect what a page shows of one image; `prefix` leads from the page to the folder."""
    file = folder / line["image"]
    image = read_image(file) if file.is_file() else None
    questions = sorted(line["questions"], key=lambda question: (question["earned"] is None, question["earned"] or 0))
    return {
        **line,
        "embedded": None if image is None else data_uri(jpeg(image, SIDE)),
        "sources": [data_uri(jpeg(read_image(source), SIDE)) for source in source_files(folder, line["index"])],
        "tiny": image is not None and max(image.size) <= SIDE // 2,
        "file": prefix + line["image"],
        "shown_questions": questions[:MAX_ANSWERS],
        "more_questions": max(0, len(questions) - MAX_ANSWERS),
    }


def bounds(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _from(folder: Path, other: Path) -> str:
    """Give the URL from a page in one folder to another folder; "" where there is none, as between Windows' drives."""
    try:
        return quote(Path(os.path.relpath(other, folder)).as_posix()) + "/"
    except ValueError:
        return ""
