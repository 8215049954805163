"""Heads that fetch operands of `a+b=` by what they are: numbers from 27 to 43, or ending in 2.

Such heads were found in Llama (arXiv 2504.20938, and arXiv 2410.21272 for neurons). For every
head, its strength at `=` that comes from one operand is laid out over that operand's value.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours.find import by_layer, prompt_length
from lorsa_lens.analysis.behaviours.null import holm
from lorsa_lens.analysis.behaviours.prompts import Prompter
from lorsa_lens.analysis.behaviours.scores import SourceMask, tally_patterns
from lorsa_lens.analysis.behaviours.value_profiles import (
    MAX_NUMBER,
    best_range,
    bin_means,
    explained_by_bins,
    kruskal_wallis,
)
from lorsa_lens.analysis.behaviours.words import Sum, find_sums, missing_for_sums, operand
from lorsa_lens.analysis.reading import read
from lorsa_lens.analysis.sources import head_name
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import table
from lorsa_lens.functional.code import to_dense
from lorsa_lens.functional.selection import writing_norms
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import AttentionRecord, record_attention

if TYPE_CHECKING:
    from pandas import DataFrame

MIN_SUMS = 100
"""Fewer sums than this say nothing about profiles over a hundred values."""

OPERANDS = ("first", "second")


def operand_profiles(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    tokens: Int[Tensor, "batch pos"] | None = None,
    *,
    vocabulary: Vocabulary | None = None,
    n_prompts: int = 512,
    n_pos: int = 16,
    seed: int = 0,
    batch_size: int = 16,
) -> "DataFrame":
    """How every rank-1 head depends on the operands of `a+b=` that it fetches.

    A head's strength from an operand is `|sum_k A[=, k] v[k]| ||w_O||` over the operand's tokens,
    0 where the head does not stay. Its variance over sums is explained by the best range of values
    (inside or outside) or by the last digit.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: one, or several for different layers.
        tokens: text with sums in it. None: prompts `a+b=` after random fillers.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_prompts: how many prompts.
        n_pos: their length, at most that of the model's context.
        seed: for prompts and null.
        batch_size: sequences at a time.

    Returns:
        One row for each head, `operand` (`first`, `second`) and property `by` (`range`,
        `last digit`). `share`: how much of the z pattern at `=` lies on the operand, by energy.
        `explained`: share of the strength's variance that the property explains; `null`: the same
        with operands exchanged between sums. `score`: `share` times `explained`. `low`, `high`:
        the range, or the last digit twice. `p_value`: of a Kruskal-Wallis test of the strength
        over tens or last digits, corrected over all heads (Holm). `attended`: the largest mean
        share of the operand in the patterns of the layer's own heads at `=`. `strength` and
        `bin_0` to `bin_9`: mean strength over all sums, and over each ten or last digit.

    Raises:
        ValueError: if the vocabulary cannot write sums, the text has too few of them, or there is
            no layer or more than one Lorsa for a layer.
    """
    chosen = dict(by_layer(model, lorsas))
    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    if tokens is None:
        check_sums(strings)
        texts = Prompter(strings, prompt_length(model, n_pos), seed).sums(n_prompts)
    else:
        texts = tokens
    sums = [one for one in find_sums(texts, strings) if max(one.values) <= MAX_NUMBER]
    if len(sums) < MIN_SUMS:
        raise ValueError(
            f"there are {len(sums)} sums a+b= with numbers up to {MAX_NUMBER}: at least "
            f"{MIN_SUMS} are needed"
        )
    masks = [operand(texts, strings, which) for which in (0, 1)]
    own_masks = {name: SourceMask(mask, mask) for name, mask in zip(OPERANDS, masks, strict=True)}
    records = record_attention(model, texts, chosen, batch_size=batch_size)
    rows: list[dict[str, Any]] = []
    for layer, lorsa in chosen.items():
        record = records[layer]
        original = Lorsa.from_attention(model, layer)
        own = tally_patterns(original, record, own_masks, batch_size=batch_size)
        fetched = _fetched(lorsa, record, sums, batch_size)
        for which, name in enumerate(OPERANDS):
            values = torch.tensor([one.values[which] for one in sums])
            shared = {"layer": layer, "operand": name}
            shared["attended"] = float(own[name].mean("share").max())
            rows += _rows(shared, fetched[which], values, seed)
    frame = table(rows)
    groups = frame.groupby(["operand", "by"], sort=False)["p_value"]
    corrected = groups.transform(lambda p: holm(torch.tensor(p.to_numpy())).numpy())
    return frame.assign(p_value=corrected)


def check_sums(vocabulary: Vocabulary) -> None:
    """Raise ValueError unless a vocabulary has the ten digits, `+` and `=` as tokens."""
    missing = missing_for_sums(vocabulary)
    if missing:
        raise ValueError(
            f"the vocabulary has no tokens for {' '.join(missing)}: sums are written with tokens "
            "for the ten digits (larger numbers may have their own), + and ="
        )


class _Fetched(NamedTuple):
    """What heads fetch from one operand."""

    strength: Float[Tensor, "sum head"]
    share: Float[Tensor, " head"]


@torch.no_grad()
def _fetched(
    lorsa: Lorsa, record: AttentionRecord, sums: list[Sum], batch_size: int
) -> list[_Fetched]:
    """Strengths from both operands, and how much of the z patterns lies on each."""
    norms = writing_norms(lorsa.W_O).double()
    parts: list[list[Tensor]] = [[], []]
    on_operand = torch.zeros(2, lorsa.cfg.n_ov_heads, dtype=torch.float64, device=norms.device)
    total = torch.zeros_like(on_operand[0])
    for start in range(0, record.x.shape[0], batch_size):
        reading = read(lorsa, record.batch(slice(start, start + batch_size)).seen_by(lorsa))
        acts = to_dense(reading.code, lorsa.cfg.n_ov_heads)
        for one in sums:
            row = one.row - start
            if not 0 <= row < len(acts):
                continue
            pattern = reading.pattern[row, :, one.equals].double()
            values = reading.values[row].double()
            grouped = rearrange(values, "key (c g) -> c g key", c=len(pattern))
            z_pattern = rearrange(grouped * pattern[:, None], "c g key -> (c g) key")
            stays = acts[row, one.equals] != 0
            energy = (acts[row, one.equals].double() * norms).square()
            size = z_pattern.abs().sum(1).clamp(min=1e-30)
            total += energy
            for which, span in enumerate(one.operands):
                fetched = z_pattern[:, span]
                parts[which].append((fetched.sum(1).abs() * norms * stays).cpu())
                on_operand[which] += energy * fetched.abs().sum(1) / size
    shares = (on_operand / total.clamp(min=1e-30)).cpu()
    return [_Fetched(torch.stack(part), share) for part, share in zip(parts, shares, strict=True)]


def _rows(
    shared: dict[str, Any], fetched: _Fetched, values: Int[Tensor, " sum"], seed: int
) -> list[dict[str, Any]]:
    """Rows of all heads of a layer for one operand."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    strength = fetched.strength
    by_range = best_range(strength, values)
    digit = values % 10
    digits = bin_means(strength, digit)
    top = digits.nan_to_num(-torch.inf).argmax(0)
    found = {
        "range": (
            by_range.explained,
            best_range(strength, values[order]).explained,
            kruskal_wallis(strength, values // 10),
            by_range.low,
            by_range.high,
            bin_means(strength, values // 10),
        ),
        "last digit": (
            explained_by_bins(strength, digit),
            explained_by_bins(strength, digit[order]),
            kruskal_wallis(strength, digit),
            top,
            top,
            digits,
        ),
    }
    rows = []
    for by, (explained, null, p_values, low, high, bins) in found.items():
        columns = {
            "score": fetched.share * explained,
            "share": fetched.share,
            "explained": explained,
            "null": null,
            "low": low,
            "high": high,
            "p_value": p_values,
            "strength": strength.mean(0),
            **{f"bin_{index}": bins[index] for index in range(10)},
        }
        lists = {name: column.tolist() for name, column in columns.items()}
        rows += [
            {
                **shared,
                "by": by,
                "head": head,
                "name": head_name(shared["layer"], head),
                **{name: column[head] for name, column in lists.items()},
            }
            for head in range(strength.shape[1])
        ]
    return rows
