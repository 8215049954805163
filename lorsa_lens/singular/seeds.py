"""Where a trace begins: components that make the model say what it says."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from lorsa_lens.singular.components import Component
from lorsa_lens.singular.selection import N_STEPS
from lorsa_lens.singular.stream import Stream

PROBABILITY_SHARE = 0.8
"""Share of the log-probability that seeds from the probability account for (ACC++)."""


class Seed(NamedTuple):
    """A component that writes, at `position`, towards what was asked."""

    component: Component
    position: int
    weight: float


def logit_seeds(
    stream: Stream, answer: int | Sequence[int], wrong: int | Sequence[int], *, position: int = -1
) -> list[Seed]:
    """Seeds from a difference of logits: the components that make most of it.

    Args:
        stream: the prompt.
        answer: the token whose logit counts, or several, whose mean does.
        wrong: the token, or tokens, to compare with.
        position: where; negative ones count from the end.
    """
    answers, wrongs = check_tokens(stream, "answer", answer), check_tokens(stream, "wrong", wrong)
    direction = stream.W_U[:, answers].mean(1) - stream.W_U[:, wrongs].mean(1)
    return direction_seeds(stream, direction, position=position)


def direction_seeds(
    stream: Stream,
    direction: Float[Tensor, " d_model"],
    *,
    layer: int | None = None,
    position: int = -1,
) -> list[Seed]:
    """Seeds from any direction of the stream, a probe's for example.

    Components in descending order up to that with which their sum exceeds the whole; all down to
    half of the whole in any case. None if the whole is not positive (ACC, ACC++).

    Args:
        stream: the prompt.
        direction: read from the normalized stream before the unembedding, or from the stream that
            enters `layer`.
        layer: which layer. None: the unembedding.
        position: where; negative ones count from the end.

    Raises:
        ValueError: if there is no such layer, position or direction.
    """
    n_layers = len(stream.layers)
    if direction.shape != stream.W_U[:, 0].shape:
        raise ValueError(
            f"direction has shape {tuple(direction.shape)}: give [{stream.W_U.shape[0]}]"
        )
    if layer is not None and not 0 <= layer <= n_layers:
        raise ValueError(f"layer = {layer} must be 0 to {n_layers}, where the stream ends")
    position = check_position(stream, position)
    read = direction.detach().to(stream.W_U)
    if layer is None:
        read = stream.final_norm.into(read[:, None])[:, 0] / stream.final_norm.scale[position]
    components, values = written_along(stream, read, position, n_layers if layer is None else layer)
    total = values.sum()
    if not bool(total > 0):
        return []
    ordered = values.sort(descending=True).values
    above = ordered.cumsum(0) > total
    # Where nothing is negative, the sum never exceeds the whole: every component counts then.
    cut = ordered[int(above.int().argmax())] if bool(above.any()) else ordered[-1]
    return _seeds(components, values, values >= torch.minimum(cut, total / 2), position)


def probability_seeds(
    stream: Stream,
    answer: int | Sequence[int],
    *,
    position: int = -1,
    share: float = PROBABILITY_SHARE,
) -> list[Seed]:
    """Seeds from the probability of the answer, by integrated gradients of its logarithm (ACC++).

    Args:
        stream: the prompt.
        answer: the token, or several, weighed by their probabilities.
        position: where; negative ones count from the end.
        share: components are removed, strongest first, until this share of the log-probability's
            rise above that of an empty stream is gone.

    Raises:
        ValueError: if there is no such token or position, or `share` is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0, and at most 1")
    answers = check_tokens(stream, "answer", answer)
    position = check_position(stream, position)
    norm, W_U = stream.final_norm, stream.W_U
    base = stream.b_U + norm.bias @ W_U
    clean = norm.share(stream.resid_final)[position]
    target = torch.zeros_like(base)
    target[answers] = torch.softmax((clean @ W_U + base)[answers], dim=0)

    def objective(z: Tensor) -> Tensor:
        return target @ torch.log_softmax(z @ W_U + base, dim=0)

    alphas = torch.linspace(0, 1, N_STEPS + 1, dtype=clean.dtype, device=clean.device)
    p = torch.softmax(alphas[:, None] * (clean @ W_U) + base, dim=-1)
    mean_p = (p[1:] + p[:-1]).mean(0) / 2
    gradient = W_U @ (target - mean_p)
    read = norm.into(gradient[:, None])[:, 0] / norm.scale[position]
    components, values = written_along(stream, read, position, len(stream.layers))
    rise = objective(clean) - objective(torch.zeros_like(clean))
    kept, left = torch.zeros_like(values, dtype=torch.bool), clean
    for index in torch.argsort(values, descending=True, stable=True).tolist():
        if values[index] <= 0 or objective(clean) - objective(left) >= share * rise:
            break
        written = written_by(stream, components[index], position)
        left = left - norm.share(written.expand_as(stream.resid_final))[position]
        kept[index] = True
    return _seeds(components, values, kept, position)


def written_along(
    stream: Stream, read: Float[Tensor, " d_model"], position: int, n_layers: int
) -> tuple[list[Component], Float[Tensor, " component"]]:
    """What every component below `n_layers` writes at a position, along a direction."""
    components, values = [], []
    n_sources = stream.n_pos
    for number in range(n_layers):
        layer = stream.layers[number]
        reads = einsum(layer.values, layer.W_out @ read, "s h d, h d -> h s")
        heads = reads * layer.pattern[:, position] * layer.out_factor[position]
        values.append(rearrange(heads, "h s -> (h s)"))
        n_heads = len(heads)
        pairs = [(head, source) for head in range(n_heads) for source in range(n_sources)]
        components += [Component(number, "head", *pair) for pair in pairs]
        components += [Component(number, "mlp"), Component(number, "bias")]
        values.append(torch.stack((layer.mlp_out, layer.bias_out))[:, position] @ read)
    components.append(Component(0, "embedding"))
    values.append(stream.embedding[position, None] @ read)
    return components, torch.cat(values)


def written_by(stream: Stream, component: Component, position: int) -> Float[Tensor, " d_model"]:
    """What one component writes at a position."""
    layer = stream.layers[component.layer]
    if component.kind == "head":
        assert component.head is not None
        assert component.source is not None
        return layer.head_out(component.head, component.source)[position]
    written = {
        "mlp": layer.mlp_out,
        "bias": layer.bias_out,
        "embedding": stream.embedding,
        "token": stream.token_embedding,
        "position": stream.position_embedding,
    }
    return written[component.kind][position]


def check_position(stream: Stream, position: int) -> int:
    """The position, counted from the start.

    Raises:
        ValueError: if the prompt does not have it.
    """
    if not -stream.n_pos <= position < stream.n_pos:
        raise ValueError(f"position = {position}, but the prompt has {stream.n_pos} tokens")
    return position % stream.n_pos


def check_tokens(stream: Stream, name: str, tokens: int | Sequence[int]) -> list[int]:
    """Token ids as a list.

    Raises:
        ValueError: if there are none, or the vocabulary does not have one.
    """
    ids = [tokens] if isinstance(tokens, int) else list(tokens)
    n_vocab = stream.W_U.shape[1]
    if not ids or not all(0 <= token < n_vocab for token in ids):
        raise ValueError(f"{name} = {tokens!r} must be token ids from 0 to {n_vocab - 1}")
    return ids


def _seeds(components: list[Component], values: Tensor, kept: Tensor, position: int) -> list[Seed]:
    chosen = kept.nonzero()[:, 0].tolist()
    chosen.sort(key=lambda index: -values[index].item())
    return [Seed(components[index], position, values[index].item()) for index in chosen]
