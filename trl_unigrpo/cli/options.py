"""Commands of typer whose options are dataclasses: each field says its name, type, default, range and help once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

import typer


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """
    Turn a function of options objects into one of single options, of which typer makes a command.

    Args:
        function: each of its parameters is annotated with a dataclass, whose fields are written as typer has its
            parameters: `rollouts: Annotated[int, typer.Option(min=1, help="...")] = 140`. A string behind the option,
            such as "--steps", is its former name, which is taken with a note on stderr and is in no help text.

    Returns:
        A function of the same name and docstring that takes the fields of all its dataclasses.
    """
    groups = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    parameters = {each.name: each for group in groups.values() for each in _keywords(group)}
    former = {flag: each for each in parameters.values() for flag in _former_names(each)}

    def command(**values: Any) -> None:
        for flag, parameter in former.items():
            value = values.pop(_key(flag))
            if value is not None:
                values[parameter.name] = _renamed(flag, value, parameter, values[parameter.name])
        filled = {name: {each.name: values[each.name] for each in fields(group)} for name, group in groups.items()}
        function(**{name: group(**filled[name]) for name, group in groups.items()})

    hidden = [_hidden(flag, parameter) for flag, parameter in former.items()]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = Signature([*parameters.values(), *hidden])  # type: ignore[attr-defined]
    return command


def _keywords(group: Any) -> Iterator[Parameter]:
    """Make a keyword of a signature for each field of a dataclass."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name])


def _former_names(parameter: Parameter) -> list[str]:
    return [each for each in parameter.annotation.__metadata__ if isinstance(each, str)]


def _key(flag: str) -> str:
    return f"former{flag.replace('-', '_')}"


def _hidden(flag: str, parameter: Parameter) -> Parameter:
    """Make the same option under its former name, without a default."""
    annotated: Any = Annotated  # a type checker takes what stands in brackets behind `Annotated` itself for a type
    option = parameter.annotation.__metadata__[0]
    former = typer.Option(flag, hidden=True, min=option.min, max=option.max)
    hint = annotated[parameter.annotation.__origin__ | None, former]
    return Parameter(_key(flag), Parameter.KEYWORD_ONLY, default=None, annotation=hint)


def _renamed(flag: str, value: Any, parameter: Parameter, beside: Any) -> Any:
    """Take the value that was given by a former name, with a note; refused beside another by the name of today."""
    name = f"--{parameter.name.replace('_', '-')}"
    if beside != parameter.default:
        raise typer.BadParameter(f"{flag} is the former name of {name}: pass {name} alone.")
    typer.echo(f"Note: {flag} is called {name} now; the former name will go.", err=True)
    return value


@contextmanager
def told_in_a_line(command: str, *kinds: type[Exception]) -> Iterator[None]:
    """Print an error of these kinds as one line on stderr and exit with 1, instead of a traceback."""
    try:
        yield
    except kinds as error:
        typer.echo(f"trl-unigrpo {command}: {error}", err=True)
        raise typer.Exit(1) from error
