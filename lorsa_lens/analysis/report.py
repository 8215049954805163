"""All tables about the heads of some Lorsas, and where a run keeps what they need."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor, nn

from lorsa_lens.analysis.behaviours import describe_heads, named_heads
from lorsa_lens.analysis.correspondence import correspondence, span_histogram
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import save_table
from lorsa_lens.analysis.vocabulary import top_logits, top_read_tokens
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
) -> dict[str, "DataFrame"]:
    """Every table about heads.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place.
        lorsas: by layer.
        tokens: running text, without padding.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n_prompts: prompts for each behaviour.
        n_named: heads per layer and behaviour, the strongest, whose tokens are listed.

    Returns:
        `prompts` and `text`: scores of all behaviours (`describe_heads`) on prompts made for them
        and on the text; `named`: the heads that have a behaviour on either; `correspondence` with
        attention heads, and `spans`, its histogram by layer; `logits` and `reads`: tokens that
        named heads write and read.
    """
    import pandas

    strings = Vocabulary.of(model) if vocabulary is None else vocabulary
    chosen = list(lorsas.values())
    scores = {
        "prompts": describe_heads(model, chosen, vocabulary=strings, n_prompts=n_prompts),
        "text": describe_heads(model, chosen, tokens, vocabulary=strings),
    }
    named = pandas.concat(
        [named_heads(frame).assign(found_on=name) for name, frame in scores.items()],
        ignore_index=True,
    )
    records = record_attention(model, tokens, lorsas)
    origins = {
        layer: correspondence(model, lorsa, records[layer]) for layer, lorsa in lorsas.items()
    }
    spans = [span_histogram(frame).assign(layer=layer) for layer, frame in origins.items()]
    heads = _strongest(named, n_named)
    return {
        **scores,
        "named": named,
        "correspondence": pandas.concat(origins.values(), ignore_index=True),
        "spans": pandas.concat(spans, ignore_index=True),
        "logits": _of_layers(top_logits, model, lorsas, heads, strings),
        "reads": _of_layers(top_read_tokens, model, lorsas, heads, strings),
    }


def save_tables(tables: Mapping[str, "DataFrame"], folder: Path) -> list[Path]:
    """Write each table as CSV and as JSON."""
    return [file for name, frame in tables.items() for file in save_table(frame, folder / name)]


def _strongest(named: "DataFrame", n: int) -> dict[int, list[int]]:
    """By layer, the strongest named rank-1 heads of each behaviour."""
    heads = named[named["kind"] == "ov"].sort_values("strength", ascending=False)
    top = heads.groupby(["behaviour", "layer"]).head(n)
    return {
        int(layer): sorted({int(head) for head in group["head"]})
        for layer, group in top.groupby("layer")
    }


def _of_layers(
    make: Any,
    model: nn.Module,
    lorsas: Mapping[int, Lorsa],
    heads: Mapping[int, list[int]],
    vocabulary: Vocabulary,
) -> "DataFrame":
    """One table from those of several layers."""
    import pandas

    frames = [
        make(model, lorsas[layer], which, vocabulary=vocabulary) for layer, which in heads.items()
    ]
    return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame()
