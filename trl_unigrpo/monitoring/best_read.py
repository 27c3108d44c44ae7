"""The images of a generation that their prompts are read back from best, where a reward reads back."""

from itertools import groupby

from ..rewards.readback.words import logged_reading, reading_columns
from .events import Generation


def best_read(generation: Generation, most: int) -> dict[int, str]:
    """
    Find the best image of each of the first groups: its place in the batch -> the prompt as it was read.

    Args:
        most: groups.
    """
    columns = reading_columns(generation.extra)
    values = generation.extra[columns[0]] if columns else ()
    known = [(place, read) for place, value in enumerate(values) if (read := logged_reading(value)) is not None]
    groups = groupby(known, key=lambda found: found[0] // generation.group_size)
    best = [max(group, key=lambda found: found[1].score) for _, group in groups]
    return {place: "".join(read.tokens) for place, read in best[:most]}
