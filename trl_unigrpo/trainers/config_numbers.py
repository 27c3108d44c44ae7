"""Numbers in a configuration: taken from the texts that YAML makes of some, and refused by name if they are none."""

import types
from dataclasses import fields
from numbers import Real
from typing import Any, Union, get_args, get_origin, get_type_hints


MEANINGS = {"image_size": ": the side of a square, in pixels"}
"""Words that say of an option more than its type."""


def read_numbers(config: Any) -> None:
    """
    Make numbers of the texts in a configuration's fields for numbers: YAML reads 1e-4, without a point, as a text.

    Raises:
        ValueError: for what is no number, or no integer where one is needed.
    """
    for name, (kind, several) in _number_fields(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        if several:
            items = value if isinstance(value, (list, tuple)) else [value]
            setattr(config, name, [_number(name, item, kind) for item in items])
        else:
            setattr(config, name, _number(name, value, kind))


def _number_fields(cls: Any) -> dict[str, tuple[type, bool]]:
    """The fields of a configuration that hold numbers: their type, and whether they hold a list of them."""
    hints, found = get_type_hints(cls), dict[str, tuple[type, bool]]()
    for field in fields(cls):
        options = [hints[field.name]]
        if get_origin(options[0]) in (Union, types.UnionType):
            options = [option for option in get_args(options[0]) if option is not type(None)]
        several = len(options) == 1 and get_origin(options[0]) is list
        kinds = set(get_args(options[0])) if several else set(options)
        if kinds and kinds <= {int, float}:
            found[field.name] = (float if float in kinds else int, several)
    return found


def _number(name: str, value: Any, kind: type) -> Any:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if kind is int and isinstance(number, float):
        number = int(number) if number.is_integer() else None
    if not isinstance(number, Real):
        expected = "an integer" if kind is int else "a number"
        raise ValueError(f"{name}={value!r}: expected {expected}{MEANINGS.get(name, '')}.")
    return number
