"""Attributes set for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def attributes(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object, past its class's own way of setting them, and put the old ones back."""
    own = vars(target)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name)
        own.update(before)
