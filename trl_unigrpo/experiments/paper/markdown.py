"""Text and numbers as Markdown that both GitHub and mkdocs render."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


NONE = "–"
SAFE = frozenset(" .,+-=()'%:;–")
"""Characters besides letters and digits that mean nothing to Markdown or HTML within a line."""
ESCAPED = frozenset("[]_*")
"""Those that a backslash makes harmless both on GitHub and in mkdocs."""


def escape(text: Any) -> str:
    """
    Turn text from a model or a run into plain text: whatever it holds, it neither marks up nor ends a table's cell.

    What Markdown or HTML could read gets a backslash where that is enough, else becomes a numeric entity.
    """
    line = " ".join(str(text).split())
    return "".join(map(_escaped, line))


def _escaped(c: str) -> str:
    if c.isalnum() or c in SAFE:
        return c
    if c in ESCAPED:
        return f"\\{c}"
    return f"&#{ord(c)};" if c.isprintable() else "\ufffd"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Write a table; the first `text_columns` columns are text, the others numbers. Cells are Markdown, one each."""
    marks = ["---" if i < text_columns else "---:" for i in range(len(header))]
    lines = ["| " + " | ".join(row) + " |" for row in (header, marks)]
    for row in rows:
        lines.append("| " + " | ".join(cell for cell, _ in zip(row, header, strict=True)) + " |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 3, significant: bool = False) -> str:
    if value is None:
        return NONE
    return f"{value:#.{digits}g}" if significant else f"{value:.{digits}f}"


def cpu_time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} CPU hours" if seconds >= 3600 else f"{seconds / 60:.0f} CPU minutes"


def rate(value: float) -> str:
    """Write a learning rate as 1.5e-4; larger numbers as they are."""
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value < 0.01 else f"{value:g}"


def interval(found: Mapping[str, Any], sign: str = "", digits: int = 3) -> str:
    """Write mean and half of the interval, which never break apart. `sign`: "+" for a difference."""
    mean = round(found["mean"], digits) + 0.0  # no "-0.000"
    return f"{mean:{sign}.{digits}f}\u00a0±\u00a0{(found['high'] - found['low']) / 2:.{digits}f}"


def p_value(p: float) -> str:
    """Write a p-value, those below 0.01 as such: of five seeds, smaller ones come up too often by chance."""
    return "&lt;\u00a00.01" if p < 0.01 else f"{p:.2g}"
