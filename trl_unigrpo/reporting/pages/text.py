"""Texts of prompts, models and judges as a page may show them, whatever is in them."""

import json
import re
from typing import Any

from markupsafe import Markup, escape

from ...messages import user_text


FOLD = 240  # characters that are seen before a text is folded
LIMIT = 4000  # characters of a text that a page holds at most

# C0 and C1 controls but tab and newline, half characters that no file could be written with, and noncharacters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# What turns the direction of all that follows it, up to the end of the page.
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")


def readable(text: Any) -> str:
    """Turn a value into text of valid Unicode, as `str` does, with control characters as visible signs (␀, ␛, ...)."""
    text = str(text).replace("\r\n", "\n")
    text = _DIRECTION.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
    return _CONTROL.sub(lambda found: _sign(ord(found[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"


def shown_text(text: Any, fold: int = FOLD, limit: int = LIMIT) -> Markup:
    """
    Turn a text into HTML: escaped, its direction its own, long ones folded.

    Args:
        text: any; what is no string is shown as JSON.
        fold: characters that are seen before the reader opens the rest.
        limit: characters that the page holds at most; it says how many it leaves out.
    """
    text = readable(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str))
    left_out = len(text) - limit
    whole = escape(text[:limit])
    if left_out > 0:
        whole += Markup('<span class="soft"> … {:,} more characters</span>').format(left_out)
    if len(text) <= fold:
        return Markup('<span class="text" dir="auto">{}</span>').format(whole)
    return Markup(
        '<details class="long"><summary><span class="text" dir="auto">{}…</span></summary>'
        '<div class="text" dir="auto">{}</div></details>'
    ).format(text[:fold], whole)


def thinking_and_answer(text: str) -> tuple[str, str]:
    """Split a text into its thinking, up to `</think>`, and the answer behind it; without one it is all answer."""
    thinking, _, answer = text.rpartition("</think>")
    return thinking.replace("<think>", "", 1).strip(), answer.strip()


def prompt_text(prompt: Any) -> str:
    """Return what a dataset's prompt asks for (see [`user_text`]), or its JSON where it has no message of the user."""
    try:
        return user_text(prompt)
    except (AttributeError, KeyError, TypeError, ValueError):
        return json.dumps(prompt, ensure_ascii=False, default=str)
