"""Pages that are one file: styles, curves and images inside, readable without a network, a server or scripts."""

from .curves import Curve, Panel, chart
from .environment import page_environment, render_page, write_page
from .images import data_uri, jpeg, png_uri, shrunk
from .text import prompt_text, readable, shown_text, thinking_and_answer


__all__ = [
    "Curve",
    "Panel",
    "chart",
    "data_uri",
    "jpeg",
    "page_environment",
    "png_uri",
    "prompt_text",
    "readable",
    "render_page",
    "shown_text",
    "shrunk",
    "thinking_and_answer",
    "write_page",
]
