"""Command-line options made from a configuration: one for each field, its docstring the help."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from lorsa_lens.validation import Config, field_docs

Command = Callable[..., None]


def with_options(config: type[Config]) -> Callable[[Command], Command]:
    """Give a typer command an optional file and an option for every field of a configuration.

    The decorated function is called as `command(file, overrides, **own)`, where `overrides` holds
    the fields that were given on the command line.
    """

    def decorate(command: Command) -> Command:
        docs = field_docs(config)
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in _GIVEN
        ]

        def wrapper(**arguments: Any) -> None:
            kept = {p.name: arguments.pop(p.name) for p in own}
            file = arguments.pop("config")
            overrides = {name: value for name, value in arguments.items() if value is not None}
            command(file=file, overrides=overrides, **kept)

        parameters = [_file_parameter(), *own]
        for field in fields(config):
            kind = _option_type(field.type)
            default = "" if field.default is MISSING else f" (default {field.default})"
            option = typer.Option(help=docs[field.name] + default, show_default=False)
            parameters.append(_keyword(field.name, Annotated[kind | None, option]))
        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Within, what a user can get wrong ends the command with one message."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


_GIVEN = ("file", "overrides")


def _file_parameter() -> inspect.Parameter:
    argument = typer.Argument(help="A .yaml or .json file of fields.", exists=True, dir_okay=False)
    return _keyword("config", Annotated[Path | None, argument])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _option_type(hint: Any) -> Any:
    """What typer understands: choices become strings (the configuration checks them)."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple:
        return list[get_args(kind)[0]]  # type: ignore[misc]
    return kind
