"""Prompts with the heads that are most active at each of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lorsa_lens.analysis.reading import read
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention

ActiveHead = tuple[int, int, float, int]
"""Layer, head, activation, and the position it fetched most from."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and, for each token, the heads that write most there, strongest first."""

    tokens: Sequence[str]
    active: Sequence[Sequence[ActiveHead]]


@torch.no_grad()
def read_prompts(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    tokens: Int[Tensor, "batch pos"],
    *,
    vocabulary: Vocabulary | None = None,
    n_heads: int = 3,
) -> list[Prompt]:
    """Find the heads with the largest `|z| ||w_O||` at each token, over all layers.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: by layer.
        tokens: the prompts, without padding.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_heads: heads per token.
    """
    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    records = record_attention(model, tokens, lorsas)
    n_prompts, n_pos = tokens.shape
    found: list[list[list[tuple[float, ActiveHead]]]] = [
        [[] for _ in range(n_pos)] for _ in range(n_prompts)
    ]
    for layer, lorsa in lorsas.items():
        pattern, values, code = read(lorsa, records[layer].seen_by(lorsa))
        sizes = code.values.abs() * writing_norms(lorsa.W_O)[code.indices]
        top = sizes.topk(min(n_heads, sizes.shape[-1]), dim=-1)
        for row, query, slot in torch.nonzero(top.values > 0).tolist():
            at = top.indices[row, query, slot]
            head = int(code.indices[row, query, at])
            moved = pattern[row, head // lorsa.cfg.group_size, query] * values[row, :, head]
            z, source = code.values[row, query, at].item(), int(moved.abs().argmax())
            size = top.values[row, query, slot].item()
            found[row][query].append((size, (layer, head, z, source)))
    return [
        Prompt(
            strings.read(tokens[row]),
            [[head for _, head in sorted(here, reverse=True)[:n_heads]] for here in positions],
        )
        for row, positions in enumerate(found)
    ]
