"""Numbers in a configuration: taken from the texts that YAML makes of some, and refused by name if they are none."""

import types
from collections.abc import Collection
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args, get_origin, get_type_hints


if TYPE_CHECKING:  # one for all rounds, or a list with one for each
    IntOfRounds: TypeAlias = int | list[int]
    FloatOfRounds: TypeAlias = float | list[float]
    RangeOfRounds: TypeAlias = list[int] | list[list[int]]
else:  # what a command line reads several of
    IntOfRounds, FloatOfRounds, RangeOfRounds = int, float, list[int]


def read_numbers(config: Any, of_rounds: Collection[str] = ()) -> None:
    """
    Make numbers of the texts in a configuration's fields for numbers: YAML reads 1e-4, without a point, as a text.

    Args:
        of_rounds: fields that may have a list with one value for each round. A list of one is that value.

    Raises:
        ValueError: for what is no number, or no integer where one is needed.
    """
    for name, (kind, several) in _number_fields(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if name in of_rounds:
            if several and not any(isinstance(item, (list, tuple)) for item in items):
                items = [items[i : i + 2] for i in range(0, len(items), 2)]  # a command line has no lists of lists
            rounds = [
                [_number(name, one, kind) for one in item] if several else _number(name, item, kind) for item in items
            ]
            setattr(config, name, rounds[0] if len(rounds) == 1 else rounds)
        elif several:
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
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    return number
