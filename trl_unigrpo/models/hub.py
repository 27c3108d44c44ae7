"""Which of `from_pretrained`'s arguments say where on the hub a file lies."""

from collections.abc import Mapping
from typing import Any


HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments that go to every file of one model: the revision, and how it is reached."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key)}
