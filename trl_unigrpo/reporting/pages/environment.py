"""Templates that extend `base.html.jinja`."""

from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...monitoring.files import replace_file
from .curves import chart
from .text import prompt_text, readable, shown_text, thinking_and_answer


def page_environment() -> Environment:
    """
    Make an environment whose templates may extend `base.html.jinja` and import `parts.html.jinja`.

    All values are escaped; a name that is not given is an error. Filters: `text` (see [`shown_text`]), `prompt`
    (see [`prompt_text`]), `readable` for attributes, `thinking_and_answer`; function `chart` (see [`chart`]).
    """
    environment = Environment(
        loader=PackageLoader("trl_unigrpo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(text=shown_text, prompt=prompt_text, readable=readable, zip=partial(zip, strict=True))
    environment.filters.update(thinking_and_answer=thinking_and_answer)
    environment.globals.update(chart=chart)
    return environment


def render_page(template: str, **values: Any) -> str:
    """Render the HTML of a template; see [`page_environment`]."""
    return page_environment().get_template(template).render(**values)


def write_page(file: Path, html: str) -> None:
    """Write a page so that who opens it never sees a half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, html)
