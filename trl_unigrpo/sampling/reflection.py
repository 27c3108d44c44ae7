"""Texts between two rounds: the words that ask for a look at the last image, and the answer that keeps it."""

import re
import string


TEMPLATE = (
    "Request: {prompt}\nThe image above is the last attempt at it. Think between <think> and </think>: what in the "
    "image is not as requested? Then give one instruction that mends the image{or_stop}."
)
"""The user's words to the model's own image; `{or_stop}` is where the word that keeps it is offered."""

FIELDS = ("prompt", "round", "or_stop")


def reflection(template: str, prompt: str, number: int, stop_text: str | None) -> str:
    """
    Fill a template in.

    Args:
        number: of the round that it opens, from 2.
        stop_text: the answer that keeps the image; None where none does.
    """
    or_stop = "" if stop_text is None else f", or, if nothing is wrong, only the answer: {stop_text}"
    return template.format(prompt=prompt, round=number, or_stop=or_stop)


def check_template(template: str) -> None:
    """Raise ValueError for a template with other fields than [`FIELDS`]."""
    try:
        used = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"reflection_template={template!r}: {error}. Write a brace of your own twice.") from error
    if unknown := sorted(used - set(FIELDS)):
        raise ValueError(
            f"reflection_template={template!r} has {{{unknown[0]}}}, expected only "
            f"{', '.join(f'{{{name}}}' for name in FIELDS)}. Write a brace of your own twice."
        )


def stops(text: str, stop_text: str) -> bool:
    """
    Say whether a text keeps the image: whether all of its answer is the word that does.

    One closed thinking may stand before the answer. Case, space and the punctuation around it don't count. A text that
    is not of this form is no stop.
    """
    inner = r"(?:(?!</?think>).)*"
    found = re.fullmatch(rf"(?:\s*(?:<think>)?{inner}</think>)?({inner})", text, re.DOTALL)
    return found is not None and _plain(found[1]) == _plain(stop_text)


def _plain(answer: str) -> str:
    return " ".join(answer.split()).strip(string.punctuation + string.whitespace).casefold()
