"""What requests may ask of a playground: JSON in, JSON out, everything checked."""

import json
import math
from collections.abc import Callable
from typing import Any

from lorsa_lens.dashboard.playground import Edit, Playground
from lorsa_lens.views.tokens import display_token

Fields = dict[str, Any]
"""A JSON object."""

N_SIGNIFICANT = 5
"""Digits of a number in an answer."""


def read_fields(body: bytes) -> Fields:
    """A request's JSON object.

    Raises:
        ValueError: if it is something else.
    """
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("the request is no JSON") from error
    if not isinstance(fields, dict):
        raise ValueError("the request must be a JSON object")
    return fields


def answer_read(playground: Playground, fields: Fields) -> Fields:
    """Tokens of a `prompt`, and for each the heads that write most there."""
    prompt = playground.read(_only(fields, "prompt", str))
    return {
        "tokens": [display_token(token) for token in prompt.tokens],
        "active": [
            [[layer, head, _rounded(z), source] for layer, head, z, source in here]
            for here in prompt.active
        ],
    }


def answer_z_pattern(playground: Playground, fields: Fields) -> Fields:
    """Where the `head` of a `layer` stays on a `prompt`, and its z pattern there."""
    head = (_only(fields, "layer", int), _only(fields, "head", int))
    fetched = playground.z_pattern(_only(fields, "prompt", str), *head)
    return {
        "fetched": [
            [query, _rounded(z), [_rounded(value) for value in z_pattern]]
            for query, z, z_pattern in fetched
        ]
    }


def answer_steer(playground: Playground, fields: Fields) -> Fields:
    """The next token after a `position` of a `prompt`, before and after `edits`."""
    edits = [_edit(edit) for edit in _only(fields, "edits", list)]
    predictions = playground.steer(
        _only(fields, "prompt", str), edits, _only(fields, "position", int)
    )
    return {
        "predictions": [
            [display_token(token), *map(_rounded, numbers)] for token, *numbers in predictions
        ]
    }


ANSWERS: dict[str, Callable[[Playground, Fields], Fields]] = {
    "read": answer_read,
    "z_pattern": answer_z_pattern,
    "steer": answer_steer,
}
"""What can be asked, by the last part of the address."""


def _edit(given: object) -> Edit:
    if not isinstance(given, dict):
        raise ValueError("an edit must be an object with layer, head, kind and value")
    position = None if given.get("position") is None else _only(given, "position", int)
    return Edit(
        _only(given, "layer", int),
        _only(given, "head", int),
        _only(given, "kind", str),
        float(_only(given, "value", int | float)),
        position,
    )


def _only(fields: Fields, name: str, kind: Any) -> Any:
    """A field of exactly that type: true is no number."""
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = getattr(kind, "__name__", "number")
        raise ValueError(f"{name} must be of type {wanted}, got {type(value).__name__}")
    return value


def _rounded(value: float) -> float | None:
    """What JSON can hold of a number."""
    return float(f"{value:.{N_SIGNIFICANT}g}") if math.isfinite(value) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
