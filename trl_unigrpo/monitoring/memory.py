"""What callbacks know, out of the JSON of a checkpoint."""

from dataclasses import fields
from typing import Any, TypeVar


T = TypeVar("T")


def revive(kind: type[T], memory: Any) -> T:
    """A dataclass as it is, or from what `dataclasses.asdict` made of it; what it no longer has is left out."""
    if isinstance(memory, kind):
        return memory
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in memory.items() if name in names})
