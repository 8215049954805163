"""What is known about heads, read from a model and some text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours import describe_heads, named_heads
from lorsa_lens.analysis.contexts.gather import LayerHeads, Sizes
from lorsa_lens.analysis.contexts.kept import NO_CONTEXT, Kept
from lorsa_lens.analysis.correspondence import effective_heads, head_shares
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.vocabulary import top_logits, top_read_tokens
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.views.facts import Excerpt, HeadFacts, Weighted

HEADS_AT_A_TIME = 256
"""Heads whose weights on all tokens are held at once."""


def read_heads(
    model: nn.Module,
    lorsa: Lorsa,
    tokens: Int[Tensor, "batch pos"],
    heads: Sequence[int],
    *,
    vocabulary: Vocabulary | None = None,
    n_excerpts: int = 8,
    n_tokens: int = 8,
    batch_size: int = 16,
) -> list[HeadFacts]:
    """Read chosen heads on some text: behaviours, density, contexts, tokens, attention heads.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsa: whose heads.
        tokens: running text, without padding.
        heads: which heads, at least one.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_excerpts: contexts per head.
        n_tokens: tokens read and written, per head and direction.
        batch_size: sequences at a time.

    Raises:
        ValueError: if there are no heads, or there is no such head.
    """
    n_heads = lorsa.cfg.n_ov_heads
    wrong = [head for head in heads if not 0 <= head < n_heads]
    if wrong or not heads:
        raise ValueError(f"heads must be some of 0 to {n_heads - 1}, got {list(heads)}")
    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    layer = lorsa.cfg.layer or 0
    record = record_attention(model, tokens, [layer], batch_size=batch_size)[layer]
    gathered = LayerHeads.empty(n_heads, Sizes(n_excerpts, 1, tokens.shape[1]))
    for start in range(0, len(tokens), batch_size):
        part = record.batch(slice(start, start + batch_size))
        counted = torch.ones(part.x.shape[:2], dtype=torch.bool)
        gathered.add(lorsa, part, counted, start, seed=0)
    shares = head_shares(model, lorsa, record, batch_size=batch_size)
    effective = effective_heads(shares)
    named = named_heads(describe_heads(model, lorsa, tokens, vocabulary=strings))
    weights = dict(weighted_tokens(model, lorsa, heads, strings, n_tokens))
    n_active = gathered.n_active
    return [
        HeadFacts(
            layer=layer,
            head=head,
            behaviours=behaviours_of(named.to_dict("records"), layer, head),
            density=(n_active[head] / tokens.numel()).item(),
            max_activation=gathered.top.activation[head, 0].abs().item(),
            mean_offset=(gathered.offset[head] / gathered.size[head]).item(),
            excerpts=_excerpts(gathered.top, head, tokens, strings),
            origins=_known(dict(enumerate(shares[head].tolist()))),
            effective_heads=effective[head].item(),
            **weights[head],
        )
        for head in heads
    ]


def behaviours_of(named: Iterable[Any], layer: int, head: int) -> dict[str, float]:
    """The best score of each behaviour that a rank-1 head was named after."""
    found: dict[str, float] = {}
    for row in named:
        if row["kind"] == "ov" and (row["layer"], row["head"]) == (layer, head):
            name = row["behaviour"]
            found[name] = max(row["score"], found.get(name, 0.0))
    return found


def weighted_tokens(
    model: nn.Module, lorsa: Lorsa, heads: Sequence[int], strings: Vocabulary, n: int
) -> Iterator[tuple[int, dict[str, list[Weighted]]]]:
    """For each head the tokens that it writes and reads, by their names in `HeadFacts`."""
    for start in range(0, len(heads), HEADS_AT_A_TIME):
        some = list(heads[start : start + HEADS_AT_A_TIME])
        found: dict[int, dict[str, list[Weighted]]] = {head: {} for head in some}
        for make, column, names in _TABLES:
            frame = make(model, lorsa, some, vocabulary=strings, n=n)
            for head, direction, string, value in zip(
                *(frame[name].tolist() for name in ("head", "direction", "string", column)),
                strict=True,
            ):
                found[head].setdefault(names[direction], []).append((string, value))
        yield from found.items()


_TABLES: tuple[tuple[Callable[..., Any], str, dict[str, str]], ...] = (
    (top_logits, "logit", {"raises": "raises", "lowers": "lowers"}),
    (top_read_tokens, "value", {"largest": "reads_most", "smallest": "reads_least"}),
)


def _excerpts(kept: Kept, head: int, tokens: Tensor, strings: Vocabulary) -> list[Excerpt]:
    slots = [slot for slot, row in enumerate(kept.context[head].tolist()) if row != NO_CONTEXT]
    return [
        Excerpt(
            strings.read(tokens[int(kept.context[head, slot])]),
            int(kept.query[head, slot]),
            kept.activation[head, slot].item(),
            kept.z_pattern[head, slot].float().tolist(),
        )
        for slot in slots
    ]


def _known(shares: dict[int, float]) -> dict[int, float]:
    """The shares, or none of them where the head is never active."""
    return {head: share for head, share in shares.items() if share == share}
