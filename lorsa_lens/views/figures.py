"""Figures of Lorsa heads: attention patterns, z patterns and activations over tokens.

Each takes tensors on any device, of any floating dtype, with or without gradient, and refuses what
circuitsvis would draw as an empty or misleading picture.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from lorsa_lens.views.checks import check_max_abs, head_labels, heat_map_values, token_values
from lorsa_lens.views.figure import Figure
from lorsa_lens.views.spec import Scale
from lorsa_lens.views.style import NEGATIVE, POSITIVE
from lorsa_lens.views.tokens import display_tokens

DECIMALS = 3
"""Digits kept after the point; one more for each factor of ten that the scale lies below 1."""

PROBABILITY_SLACK = 0.01
"""How far outside 0 to 1 attention may lie, as half precision makes it, before it is refused."""

MAX_LABEL = 20
"""Characters of a token on the axis of a heat map; longer tokens are cut."""


def attention_view(
    pattern: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    *,
    head_names: Sequence[str] | None = None,
) -> Figure:
    """Draw the attention patterns of chosen QK heads, one heat map each.

    Rows are queries, columns are keys; white is 0 and blue is 1 in every figure. Positions above
    the diagonal are greyed out if all of them are 0, as under a causal mask, and drawn otherwise.

    Args:
        pattern: Attention after the softmax, for example
            ``cache["blocks.5.attn.lorsa.hook_pattern"][0, [3, 17]]``.
        tokens: The tokens of the sequence, as many as there are queries and as there are keys.
        head_names: A name for each head of `pattern`; without them they are counted from 0.

    Returns:
        circuitsvis' own object: notebooks show it, `lorsa_lens.views.save` puts it on a page.

    Raises:
        ValueError: If the shape does not fit the tokens, there are more than `MAX_HEADS` heads or
            `MAX_TOKENS` tokens, or a value is not finite or not within 0 to 1.
        TypeError: If `pattern` is no floating tensor, or `tokens` is not a sequence of strings.

    Example:
        >>> pattern = torch.softmax(torch.randn(2, 4, 4), dim=-1)
        >>> figure = attention_view(pattern, ["<s>", "a", "b", "a"], head_names=["L5.3", "L5.17"])
    """
    values = heat_map_values("attention_view", "pattern", pattern, tokens)
    names = head_labels(head_names, len(values))
    low, high = values.min().item(), values.max().item()
    if low < -PROBABILITY_SLACK or high > 1 + PROBABILITY_SLACK:
        raise ValueError(
            f"pattern must be attention after the softmax, within 0 to 1; its values run from "
            f"{low:.3g} to {high:.3g} (z_pattern_view draws signed contributions)"
        )
    legend = "Colour: attention from the query (row) to the key (column)."
    scale = Scale(0.0, 1.0, NEGATIVE, POSITIVE)
    return heat_map(values.clamp(0.0, 1.0), tokens, names, scale, legend)


def z_pattern_view(
    z_pattern: Float[Tensor, "head query key"],
    tokens: Sequence[str],
    *,
    head_names: Sequence[str] | None = None,
    max_abs: float | None = None,
) -> Figure:
    """Draw the z patterns of chosen heads: what each source token adds to a head's output.

    Entry [q, k] is the signed contribution ``A[q, k] * v[k]``; a row sums to the head's dense
    output at q. One colour scale, symmetric about 0, serves all heads of the figure. Positions
    above the diagonal are greyed out if all of them are 0, as under a causal mask.

    Args:
        z_pattern: The contributions.
        tokens: The tokens of the sequence, as many as there are queries and as there are keys.
        head_names: A name for each head of `z_pattern`; without them they are counted from 0.
        max_abs: The absolute value that gets full colour, as do all beyond it; the largest in
            `z_pattern` if not given. Give it to make figures comparable.

    Returns:
        circuitsvis' own object: notebooks show it, `lorsa_lens.views.save` puts it on a page.

    Raises:
        ValueError: If the shape does not fit the tokens, there are more than `MAX_HEADS` heads or
            `MAX_TOKENS` tokens, a value is not finite, or `max_abs` is not above 0.
        TypeError: If `z_pattern` is no floating tensor, or `tokens` is not a sequence of strings.

    Example:
        >>> z_pattern = torch.randn(2, 3, 3).tril()
        >>> figure = z_pattern_view(z_pattern, ["▁a", "▁b", "▁a"], max_abs=1.0)
    """
    check_max_abs(max_abs)
    values = heat_map_values("z_pattern_view", "z_pattern", z_pattern, tokens)
    names = head_labels(head_names, len(values))
    scale, beyond = _symmetric(values, max_abs)
    legend = (
        "Colour: contribution A[q, k]·v[k] of the key (column) to the head's output at the query "
        f"(row); orange is negative, blue is positive.{beyond}"
    )
    return heat_map(values, tokens, names, scale, legend)


def token_view(
    tokens: Sequence[str],
    values: Float[Tensor, "pos"],
    *,
    name: str = "the head",
    max_abs: float | None = None,
) -> Figure:
    """Draw one head's activation over a text, as coloured tokens.

    The scale is symmetric about 0, as in `z_pattern_view`.

    Args:
        tokens: The tokens of the sequence.
        values: One value per token, for example a head's z.
        name: What the legend calls the head.
        max_abs: The absolute value that gets full colour, as do all beyond it; the largest in
            `values` if not given.

    Returns:
        circuitsvis' own object: notebooks show it, `lorsa_lens.views.save` puts it on a page.

    Raises:
        ValueError: If the lengths differ, there are more than `MAX_TEXT_TOKENS` tokens, a value is
            not finite, or `max_abs` is not above 0.
        TypeError: If `values` is no floating tensor, or `tokens` is not a sequence of strings.

    Example:
        >>> figure = token_view(["▁a", "▁b"], torch.tensor([0.5, -2.0]), name="head 5.301")
    """
    check_max_abs(max_abs)
    checked = token_values(values, tokens)
    scale, beyond = _symmetric(checked, max_abs)
    props = {"tokens": display_tokens(tokens), "values": _rounded(checked, scale)}
    legend = (
        f"Colour: activation of {name} at each token; orange is negative, blue is positive.{beyond}"
    )
    return Figure("ColoredTokens", props | _colour_props(scale), legend=legend, scale=scale)


def heat_map(
    values: Float64[Tensor, "head query key"],
    tokens: Sequence[str],
    head_names: list[str],
    scale: Scale,
    legend: str,
) -> Figure:
    """Draw checked values as one heat map per head, grey above the diagonal if all is 0 there."""
    masked = values.shape[-1] > 1 and not bool(values.triu(diagonal=1).any())
    props = {
        "attention": _rounded(values, scale),
        "tokens": [_label(token) for token in display_tokens(tokens)],
        "attentionHeadNames": head_names,
        "maskUpperTri": masked,
    }
    if masked:
        legend += " Grey: keys after the query."
    return Figure("AttentionHeads", props | _colour_props(scale), legend=legend, scale=scale)


def _label(token: str) -> str:
    return token if len(token) <= MAX_LABEL else token[: MAX_LABEL - 1] + "…"


def _colour_props(scale: Scale) -> dict[str, object]:
    return {
        "minValue": scale.low,
        "maxValue": scale.high,
        "negativeColor": scale.negative,
        "positiveColor": scale.positive,
    }


def _symmetric(values: Float64[Tensor, "..."], max_abs: float | None) -> tuple[Scale, str]:
    """Return the scale, and what the legend must add about values that lie beyond it."""
    largest = values.abs().max().item()
    limit = (largest or 1.0) if max_abs is None else float(max_abs)
    if max_abs is None:
        limit = round(limit, _decimals(limit))
    beyond = " Larger values have full colour too." if largest > limit * 1.001 else ""
    return Scale(-limit, limit, NEGATIVE, POSITIVE), beyond


def _decimals(limit: float) -> int:
    """Return how many digits to keep after the point where full colour stands for `limit`."""
    return DECIMALS + max(0, math.floor(-math.log10(limit)))


def _rounded(values: Float64[Tensor, "..."], scale: Scale) -> list[object]:
    """Return the values as nested lists of rounded numbers, without negative zeros."""
    decimals = min(_decimals(scale.high), 300)
    rounded: list[object] = (torch.round(values, decimals=decimals) + 0.0).tolist()
    return rounded
