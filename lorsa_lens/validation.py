"""Configurations that cannot hold what cannot be: fields checked against their annotations."""

import ast
import difflib
import inspect
import itertools
import json
import math
import textwrap
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

ConfigT = TypeVar("ConfigT", bound="Config")


class ConfigError(ValueError):
    """A configuration that cannot be: the message names the field, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen dataclass whose fields are checked by their annotations at construction.

    Numbers must be finite and positive, but those named in `MAY_BE_ZERO`, which may be 0 too.

    Raises:
        ConfigError: at construction, for a value of the wrong type, a number out of range, or a
            name that is none of its choices.
    """

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Check every field by its annotation, and keep its value as plain Python data."""
        for field in fields(self):
            lowest = 0 if field.name in self.MAY_BE_ZERO else 1
            value = _checked(field.name, getattr(self, field.name), field.type, lowest)
            object.__setattr__(self, field.name, value)

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """The same configuration with some fields changed, validated anew."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """Build from plain values, as `to_dict` gives them.

        Raises:
            ConfigError: for an unknown key (near matches are listed) or a missing one, or as the
                constructor does.
        """
        known = {field.name: field for field in fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=3)
                hint = f": did you mean {' or '.join(near)}?" if near else ""
                raise ConfigError(f"unknown key {key!r} in a {cls.__name__}{hint}")
        required = {name for name, field in known.items() if field.default is MISSING}
        if missing := sorted(required - set(values)):
            raise ConfigError(f"incomplete {cls.__name__}: it lacks {', '.join(missing)}")
        # JSON knows lists only, fields are tuples.
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @classmethod
    def from_file(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """Read a `.json`, `.yaml` or `.yml` file.

        Raises:
            ConfigError: when the file cannot be read as such, or as `from_dict` does.
        """
        return cls.from_dict(read_fields(path))


def read_fields(path: str | Path) -> dict[str, Any]:
    """The fields in a `.json`, `.yaml` or `.yml` file, not checked yet.

    Raises:
        ConfigError: when the file cannot be read as such.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        values = _read_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of fields")
    return values


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def field_docs(config: type[Any]) -> dict[str, str]:
    """The docstrings below the fields of a dataclass, by name, each as one paragraph."""
    docs = {}
    for cls in reversed(config.__mro__):
        if not is_dataclass(cls):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, doc in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)):
                continue
            if isinstance(field.target, ast.Name) and isinstance(doc.value, ast.Constant):
                docs[field.target.id] = " ".join(str(doc.value.value).split())
    return docs


def _checked(name: str, value: Any, hint: Any, lowest: int) -> Any:
    """A field's value, if it fits the annotation, as plain data that JSON can hold.

    NumPy's numbers become Python's, lists tuples, and integers floats where a float is wanted.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    kind, choices = kinds[0], get_args(kinds[0])
    if get_origin(kind) is Literal:
        fits, wanted = isinstance(value, str) and value in choices, f"one of {choices}"
    elif get_origin(kind) is tuple:
        entry_kind, number = choices[0], {int: Integral, float: Real}[choices[0]]
        fits = isinstance(value, list | tuple) and all(_is_finite(e, number) for e in value)
        wanted = "a tuple of integers" if entry_kind is int else "a tuple of finite numbers"
    elif kind is int:
        fits = _is_finite(value, Integral) and value >= lowest
        wanted = "a positive integer" if lowest else "an integer from 0"
    elif kind is float:
        fits = _is_finite(value) and (value > 0 or value == lowest == 0)
        wanted = "a positive number" if lowest else "a number from 0"
    else:
        fits, wanted = isinstance(value, kind), "True or False" if kind is bool else "a string"
    if not fits:
        or_none = " or None" if NoneType in kinds else ""
        raise ConfigError(f"{name} = {value!r} must be {wanted}{or_none}")
    if get_origin(kind) is tuple:
        return tuple(entry_kind(entry) for entry in value)
    return kind(value) if kind in (int, float) else value


def _is_finite(value: Any, kind: Any = Real) -> bool:
    """Whether it is a finite number, Python's or NumPy's; true and false are none."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
