"""All tables about the heads of some Lorsas, and where a run keeps what they need."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours import describe_heads, named_heads, operand_profiles
from lorsa_lens.analysis.behaviours.words import missing_for_sums
from lorsa_lens.analysis.correspondence import circuit_overlap, correspondence, span_histogram
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import save_table
from lorsa_lens.analysis.vocabulary import top_logits, top_read_tokens, top_token_pairs
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention

if TYPE_CHECKING:
    from pandas import DataFrame


def head_tables(
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    tokens: Int[Tensor, "batch pos"],
    *,
    vocabulary: Vocabulary | None = None,
    n_prompts: int = 64,
    n_named: int = 20,
    n_circuits: int = 4,
) -> dict[str, "DataFrame"]:
    """Every table about heads.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: by layer.
        tokens: running text, without padding.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_prompts: prompts for each behaviour.
        n_named: heads per layer and behaviour, the strongest, whose tokens are listed.
        n_circuits: named circuits per layer, those with the highest scores, whose token pairs are
            listed. Each costs a product of all tokens with all tokens.

    Returns:
        `prompts` and `text`: scores of all behaviours (`describe_heads`) on prompts made for them
        and on the text; `named`: the heads that have a behaviour on either; `correspondence` with
        attention heads, and `spans`, its histogram by layer; `circuits`: query-key circuits beside
        attention heads; `logits` and `reads`: tokens that named heads write and read; `pairs`:
        tokens at distance 1 that named circuits join; `operands`: operand profiles, where the
        vocabulary can write sums.
    """
    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    chosen = list(lorsas.values())
    scores = {
        "prompts": describe_heads(model, chosen, vocabulary=strings, n_prompts=n_prompts),
        "text": describe_heads(model, chosen, tokens, vocabulary=strings),
    }
    named = _joined(named_heads(frame).assign(found_on=name) for name, frame in scores.items())
    heads = _strongest(named, n_named)
    tables = {
        **scores,
        "named": named,
        **_origins(model, lorsas, tokens),
        "logits": _joined(
            top_logits(model, lorsas[layer], which, vocabulary=strings)
            for layer, which in heads.items()
        ),
        "reads": _joined(
            top_read_tokens(model, lorsas[layer], which, vocabulary=strings)
            for layer, which in heads.items()
        ),
        "pairs": _joined(
            top_token_pairs(model, lorsas[layer], circuit, vocabulary=strings)
            for layer, circuit in _best_circuits(named, n_circuits)
        ),
    }
    if not missing_for_sums(strings):
        tables["operands"] = operand_profiles(model, chosen, vocabulary=strings)
    return tables


def save_tables(tables: Mapping[str, "DataFrame"], folder: Path) -> list[Path]:
    """Write each table as CSV and as JSON."""
    return [file for name, frame in tables.items() for file in save_table(frame, folder / name)]


def _origins(
    model: nn.Module, lorsas: Mapping[int, Lorsa], tokens: Int[Tensor, "batch pos"]
) -> dict[str, "DataFrame"]:
    """Lorsa heads and circuits beside the attention heads of their layers."""
    records = record_attention(model, tokens, lorsas)
    shares = {
        layer: correspondence(model, lorsa, records[layer]) for layer, lorsa in lorsas.items()
    }
    return {
        "correspondence": _joined(shares.values()),
        "spans": _joined(
            span_histogram(frame).assign(layer=layer) for layer, frame in shares.items()
        ),
        "circuits": _joined(
            circuit_overlap(model, lorsa, records[layer]) for layer, lorsa in lorsas.items()
        ),
    }


def _strongest(named: "DataFrame", n: int) -> dict[int, list[int]]:
    """By layer, the strongest named rank-1 heads of each behaviour."""
    heads = named[named["kind"] == "ov"].sort_values("strength", ascending=False)
    top = heads.groupby(["behaviour", "layer"]).head(n)
    return {
        int(layer): sorted({int(head) for head in group["head"]})
        for layer, group in top.groupby("layer")
    }


def _best_circuits(named: "DataFrame", n: int) -> list[tuple[int, int]]:
    """Layer and number of the named circuits with the highest scores in each layer."""
    circuits = named[named["kind"] == "qk"].sort_values("score", ascending=False)
    best = circuits.drop_duplicates(["layer", "head"]).groupby("layer").head(n)
    return sorted((int(row.layer), int(row.head)) for row in best.itertuples())


def _joined(frames: Iterable["DataFrame"]) -> "DataFrame":
    """One table from several; without columns if there are none."""
    import pandas

    parts = list(frames)
    return pandas.concat(parts, ignore_index=True) if parts else pandas.DataFrame()
