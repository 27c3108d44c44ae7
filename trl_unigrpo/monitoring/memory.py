"""Memories of callbacks, out of the JSON of a checkpoint."""

from dataclasses import fields
from typing import Any, TypeVar


T = TypeVar("T")


def revive(kind: type[T], memory: Any) -> T:
    """
    Make a dataclass of what `dataclasses.asdict` made of it; one that is there is kept, keys that it no longer has are
    left out.
    """
    if isinstance(memory, kind):
        return memory
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in memory.items() if name in names})
