"""What may be drawn: shapes, sizes and values, each refused with a way out.

circuitsvis checks nothing: a wrong shape gives an empty page, a NaN a page that does not parse.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

MAX_HEADS = 16
"""Heat maps per figure. Each is a canvas with one element per query and key."""

MAX_TOKENS = 128
"""Tokens on each side of a heat map."""

MAX_CELLS = 16 * 64 * 64
"""Queries times keys of all heat maps of a figure: 16 heads of 64 tokens, or 4 of 128. More take a
browser many seconds."""

MAX_TEXT_TOKENS = 2048
"""Tokens of a coloured text."""


def heat_map_values(
    view: str, argument: str, values: Tensor, tokens: Sequence[str], *, extra_heads: int = 0
) -> Float64[Tensor, "head query key"]:
    """Check the values of a heat map and bring them to the CPU.

    Args:
        view: The name of the calling function, for the advice in messages.
        argument: What the caller names `values`.
        values: The values, to be [head, query, key].
        tokens: The tokens, to be as many as queries and as keys.
        extra_heads: Heat maps that the same figure draws beside these.

    Returns:
        The values on the CPU in double precision, without gradient.

    Raises:
        ValueError: If shape, size or a value does not fit.
        TypeError: If `values` is no floating tensor, or `tokens` is not a sequence of strings.
    """
    _check_tokens(tokens)
    _check_floating(argument, values)
    shape = tuple(values.shape)
    if values.ndim != 3:
        advice = {
            2: f"one head is {argument}[None]",
            4: f"choose one sequence of the batch, for example {argument}[0]",
        }.get(values.ndim, "choose one sequence and its heads")
        raise ValueError(f"{argument} must be [head, query, key], got shape {shape}; {advice}")
    n_heads, n_queries, n_keys = shape
    if n_queries != len(tokens) or n_keys != len(tokens):
        raise ValueError(
            f"{argument} must have one query and one key per token: there are {len(tokens)} "
            f"tokens, got shape {shape} for [head, query, key]"
        )
    if 0 in shape:
        raise ValueError(f"{argument} is empty, got shape {shape} for [head, query, key]")
    n_heads += extra_heads
    if n_heads > MAX_HEADS:
        raise ValueError(
            f"{argument} has {n_heads} heads, one figure draws at most {MAX_HEADS}; choose some, "
            f"for example heads = [0, 5]; {view}({argument}[heads], tokens, "
            "head_names=[f'head {i}' for i in heads])"
        )
    if len(tokens) > MAX_TOKENS:
        raise ValueError(
            f"there are {len(tokens)} tokens, one figure draws at most {MAX_TOKENS}; choose a "
            f"stretch, for example at = slice(0, {MAX_TOKENS}); "
            f"{view}({argument}[:, at, at], tokens[at])"
        )
    if n_heads * len(tokens) ** 2 > MAX_CELLS:
        raise ValueError(
            f"{n_heads} heads of {len(tokens)} tokens are too much for one figure; of so many "
            f"tokens it draws at most {MAX_CELLS // len(tokens) ** 2} heads: choose fewer, or a "
            "stretch of the tokens"
        )
    return _finite(argument, values)


def token_values(values: Tensor, tokens: Sequence[str]) -> Float64[Tensor, "pos"]:
    """Check the values of a coloured text and bring them to the CPU.

    Args:
        values: The values, to be [pos].
        tokens: The tokens, to be as many as the values.

    Returns:
        The values on the CPU in double precision, without gradient.

    Raises:
        ValueError: If shape, size or a value does not fit.
        TypeError: If `values` is no floating tensor, or `tokens` is not a sequence of strings.
    """
    _check_tokens(tokens)
    _check_floating("values", values)
    shape = tuple(values.shape)
    if values.ndim != 1:
        raise ValueError(
            f"values must be [pos], one head over one sequence, got shape {shape}; for example "
            "acts[0, :, head] of [batch, pos, head]"
        )
    if shape[0] != len(tokens):
        raise ValueError(f"values has {shape[0]} positions, but there are {len(tokens)} tokens")
    if not tokens:
        raise ValueError("values and tokens are empty")
    if len(tokens) > MAX_TEXT_TOKENS:
        raise ValueError(
            f"there are {len(tokens)} tokens, one figure draws at most {MAX_TEXT_TOKENS}; choose "
            f"a stretch, for example at = slice(0, {MAX_TEXT_TOKENS}); tokens[at], values[at]"
        )
    return _finite("values", values)


def head_labels(head_names: Sequence[str] | None, n_heads: int) -> list[str]:
    """Return a name for each head; without names they are counted from 0.

    Raises:
        ValueError: If there are more or fewer names than heads.
        TypeError: If `head_names` is one string.
    """
    if head_names is None:
        return [f"Head {index}" for index in range(n_heads)]
    if isinstance(head_names, str):
        raise TypeError(f"head_names must be a sequence of names, got the string {head_names!r}")
    if len(head_names) != n_heads:
        raise ValueError(
            f"head_names must name each of the {n_heads} heads, got {len(head_names)} names"
        )
    return [str(name) for name in head_names]


def check_max_abs(max_abs: float | None) -> None:
    """Refuse an end of the colour scale that is not above 0.

    Raises:
        ValueError: If `max_abs` is zero, negative, infinite or not a number.
    """
    if max_abs is not None and not (math.isfinite(max_abs) and max_abs > 0):
        raise ValueError(f"max_abs must be finite and above 0, got {max_abs}")


def _check_tokens(tokens: Sequence[str]) -> None:
    if isinstance(tokens, str):
        raise TypeError(
            "tokens is one string; pass the sequence of its tokens, "
            "for example model.to_str_tokens(text)"
        )
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise TypeError(
                f"tokens must be the strings of one sequence; tokens[{index}] is a "
                f"{type(token).__name__}"
            )


def _check_floating(argument: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{argument} must have a floating dtype, got {values.dtype}")


def _finite(argument: str, values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        first = [int(index) for index in torch.nonzero(~torch.isfinite(values))[0]]
        raise ValueError(
            f"{argument} has {bad} values that are NaN or infinite, the first at {first}; with "
            "left padding, cut the padding off first"
        )
    return values
