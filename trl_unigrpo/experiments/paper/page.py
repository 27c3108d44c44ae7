"""The page: tables, figures and sentences around the numbers of results.json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from . import tables
from .figures import write_figures
from .markdown import cpu_time, escape
from .order import ORDER


HEADING = re.compile(r"^## (\S+)$", re.MULTILINE)


def write_paper_page(output: Path, page: Path | None = None) -> Path:
    """
    Write the page and its figures from `<output>/results.json`, and return the page's file.

    The remarks written by hand stand on it only where every system of the grid was run, as they speak of all.

    Args:
        output: the folder of the runs, after `collect`; images of the traces are cut from its strips.
        page: a Markdown file, `<output>/paper.md` without it; its figures go into the folder of its name beside it.

    Raises:
        FileNotFoundError: without results.json.
    """
    source = output / "results.json"
    if not source.is_file():
        raise FileNotFoundError(f"{source} is missing. `trl-unigrpo paper` writes it when a run has finished.")
    results = json.loads(source.read_text(encoding="utf-8"))
    page = output / "paper.md" if page is None else page
    figures = write_figures(results, output, page.with_suffix(""))
    whole = set(ORDER) <= set(results["systems"])
    commentary = {name: remark * whole for name, remark in read_commentary().items()}  # they speak of the full grid
    text = render(results, figures, page.stem, commentary, [file.name for file in page.parent.glob("*.md")])
    page.write_text(text, encoding="utf-8")
    return page


def render(
    results: Mapping[str, Any],
    figures: Mapping[str, Any],
    folder: str,
    commentary: Mapping[str, str],
    beside: Collection[str] = (),
) -> str:
    """
    Render the page as Markdown.

    Args:
        folder: of the figures, relative to it.
        beside: the files that lie beside it, to which it links.
    """
    environment = Environment(
        loader=PackageLoader("trl_unigrpo.reporting"),
        autoescape=False,  # Markdown: what comes from outside goes through `escape`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["escape"] = escape
    text = environment.get_template("paper.md.jinja").render(
        r=results,
        figures=dict.fromkeys(FIGURES) | dict(figures),
        folder=folder,
        commentary=commentary,
        link=lambda text, file: f"[{text}]({file})" if file in beside else text,
        cpu_time=cpu_time,
        missing=tables.seed_lines(results),
        left_out=len(set(ORDER) - set(results["systems"])),
        unequal=tables.unequal_rollouts(results),
        **{name: getattr(tables, name) for name in TABLES},
    )
    return re.sub(r"\n{3,}", "\n\n", text)


FIGURES = ("hacking", "table", "curves", "guidance", "regularizer", "traces")
TABLES = (
    "above_unigrpo",
    "category_table",
    "changes_table",
    "claims_table",
    "details_table",
    "guidance_table",
    "joint_table",
    "rate_table",
    "regularizer_table",
    "search_table",
    "table1",
    "trace_table",
    "trace_titles",
    "verdict_table",
)


def read_commentary(text: str | None = None) -> dict[str, str]:
    """
    Read the hand-written remarks, section -> Markdown.

    Args:
        text: of a commentary; the package's own without it.

    Raises:
        ValueError: for a remark that holds a number: numbers come from results.json.
    """
    if text is None:
        text = (files(__package__) / "commentary.md").read_text(encoding="utf-8")
    _, *parts = HEADING.split(text)
    sections = {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
    for name, body in sections.items():
        digit = re.search(r"\S*\d\S*", body)
        if digit:
            raise ValueError(
                f"commentary.md, section {name!r}, holds the number {digit[0]!r}. Numbers of the page come from "
                "results.json: say it without, or make the page compute it."
            )
    return sections
