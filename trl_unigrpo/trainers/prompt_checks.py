"""The form of prompts, checked for a whole dataset before anything expensive, and for each row of a stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

from datasets import Dataset

from ..messages import user_text


FORM = "a text, or a conversation as in [{'role': 'user', 'content': 'a red cat'}]"
DROP = "Leave such rows out: dataset.filter(lambda row: row['prompt'] and row['prompt'].strip())."
CAST = "Make texts of them: dataset.cast_column('prompt', datasets.Value('string'))."


def check_prompts(dataset: Any, name: str, captions: bool = False) -> None:
    """
    Raise ValueError for the first prompt of a dataset that is none, with its row.

    Rows that are made when they are asked for, of a stream or by a transform, are left to [`CheckedRows`].

    Args:
        dataset: a `datasets` dataset, or a dict of them.
        name: what to call it in the message.
        captions: whether rows may be without words, [], as those that show an image are.
    """
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_prompts(part, f"{name}[{key!r}]", captions)
        return
    for row, prompt in enumerate(_prompts(dataset)):
        if captions and prompt == []:
            continue
        if (fault := prompt_fault(prompt)) is not None:
            raise ValueError(f"{name}: the prompt of row {row} is {fault}")


class CheckedRows:
    """
    A collator that lets no row pass whose prompt is none.

    Args:
        collator: what makes a batch of the rows.
        shown: column of an image that may stand without words, []; None where prompts are words alone.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any], shown: str | None = None):
        self.collator, self.shown = collator, shown

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Make a batch of rows; raises ValueError with the row whose prompt is none."""
        for row in rows:
            if self.shown and row.get("prompt") == [] and row.get(self.shown) is not None:
                continue
            if (fault := prompt_fault(row.get("prompt"))) is not None:
                raise ValueError(f"In the row {shortened(dict(row))} the prompt is {fault}")
        return self.collator(rows)


def prompt_fault(prompt: Any) -> str | None:
    """Say what is wrong with a prompt, and what to do; None if it can be trained on."""
    if prompt is None or prompt != prompt:  # pandas has NaN in an empty cell
        return f"{prompt!r}, expected {FORM}. {DROP}"
    if isinstance(prompt, str):
        return None if prompt.strip() else f"{prompt!r}, a blank text. {DROP}"
    if isinstance(prompt, Number):
        return f"{prompt!r}, a number, expected a text. {CAST}"
    if not isinstance(prompt, Sequence) or not prompt or not all(_is_message(message) for message in prompt):
        return f"{shortened(prompt)}, expected {FORM}."
    for message in prompt:
        content = message["content"]
        others = [part for part in content if not _is_text(part)] if not isinstance(content, str) else []
        if others:
            return (
                f"a conversation with {shortened(others[0])} in a message, expected parts as in "
                "{'type': 'text', 'text': 'a red cat'}. An image to edit belongs into a column 'source_image'."
            )
    if not any(message["role"] == "user" for message in prompt) or not user_text(prompt).strip():
        return f"{shortened(prompt)}, a conversation without words of the user, expected {FORM}."
    return None


def _prompts(dataset: Any) -> Iterator[Any]:
    """Yield the prompts of a dataset whose rows are there already."""
    if isinstance(dataset, Dataset):
        if dataset.format["type"] != "custom":
            for batch in dataset.select_columns(["prompt"]).with_format(None).iter(batch_size=10_000):
                yield from batch["prompt"]
    elif isinstance(dataset, Sequence):
        yield from (row.get("prompt") for row in dataset)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), (str, list, tuple))
    )


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def shortened(value: Any, most: int = 120) -> str:
    """Write a value in a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."
