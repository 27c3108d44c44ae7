"""Packages whose public names are imported when first used."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, home_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        home_of: public name -> the module that defines it, below the package, or from its parent ("..flow.guidance").
    """

    def getattribute(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(
            import_module(home_of[name] if home_of[name].startswith(".") else f".{home_of[name]}", package), name
        )

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return getattribute, directory
