"""Turns TRL's form of docstring, `Parameters:` with groups marked by `>`, into tables.

A page writes `{{ parameters trl_unigrpo/trainers/unigrpo_config.py UniGRPOConfig }}`. The source is parsed, not
imported.
"""

import ast
import re
from pathlib import Path
from typing import Any


MARKER = re.compile(r"^\{\{ parameters (\S+) (\w+) \}\}$", re.MULTILINE)
ENTRY = re.compile(r"^(\w+) \((.+)\):$")
DEFAULT = re.compile(r", \*optional\*(?:, defaults to (`.+`))?$")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return MARKER.sub(lambda found: parameter_tables(Path(found[1]), found[2]), markdown)


def parameter_tables(file: Path, class_name: str) -> str:
    classes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    docstring = next(ast.get_docstring(node) or "" for node in classes if node.name == class_name)
    _, found, parameters = docstring.partition("\nParameters:\n")
    if not found:
        raise ValueError(f"The docstring of {class_name} in {file} has no 'Parameters:' section to make a table of.")
    lines: list[str] = []
    for line in (line.strip() for line in parameters.splitlines()):
        if line.startswith("> "):
            lines += ["", f"### {line[2:]}", "", "| name | type | default | meaning |", "|---|---|---|---|"]
        elif entry := ENTRY.match(line):
            default = DEFAULT.search(entry[2])
            kind = (entry[2][: default.start()] if default else entry[2]).replace("|", "\\|")
            given = default[1] or "`None`" if default else ""
            lines.append(f"| `{entry[1]}` | {kind} | {given} | ")
        elif line:
            lines[-1] = f"{lines[-1].removesuffix(' |')} {line} |".replace("|  ", "| ")
    return "\n".join(lines)
