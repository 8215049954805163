"""The model card of a repository of Lorsas."""

import re
from collections.abc import Sequence

from lorsa_lens.io.listing import Entry


def model_card(repo_id: str, entries: Sequence[Entry]) -> str:
    """The text of a `README.md`: what the Lorsas are, how good, and how to load one.

    Args:
        repo_id: `user/repo`.
        entries: the Lorsas of the repository.
    """
    readable = [entry for entry in entries if entry.cfg is not None]
    models = sorted({e.cfg.model_name for e in readable if e.cfg and e.cfg.model_name})
    first = readable[0].name if readable else ""
    where = f"{repo_id}:{first}" if first else repo_id
    of = f" of {', '.join(models)}" if models else ""
    return f"""{_front_matter(models)}
# Lorsas{of}

Low-Rank Sparse Attention ([arXiv 2504.20938](https://arxiv.org/abs/2504.20938)): each takes the
place of an attention layer, as many rank-1 heads of which a few are active at a token.

## Use

```python
from lorsa_lens import Lorsa, splice

lorsa = Lorsa.from_pretrained("{where}")
with splice(model, lorsa):  # a HookedTransformer or a TransformerBridge
    logits, cache = model.run_with_cache(tokens)
```

`lorsa-lens list {repo_id}` lists what is here.

## Lorsas

{_configurations(readable)}
{_metrics(readable)}"""


def _front_matter(models: Sequence[str]) -> str:
    """Tags by which the hub finds it; a base model only where its name is an id there."""
    lines = ["---", "library_name: lorsa_lens", "tags:", "- lorsa", "- sparse-attention"]
    lines += ["- mechanistic-interpretability"]
    bases = [model for model in models if re.fullmatch(r"[\w.-]+/[\w.-]+", model)]
    if bases:
        lines += ["base_model:", *(f"- {base}" for base in bases)]
    return "\n".join([*lines, "---", ""])


def _configurations(entries: Sequence[Entry]) -> str:
    header = ("folder", "layer", "circuits", "heads", "act_fn", "K", "reads", "writes")
    rows = []
    for entry in entries:
        assert entry.cfg is not None  # only readable ones are given
        cfg = entry.cfg
        cells = (cfg.layer, cfg.n_qk_heads, cfg.n_ov_heads, cfg.act_fn, cfg.k)
        sites = (f"`{cfg.input_site}`", f"`{cfg.output_site}`")
        rows.append((f"`{entry.name or '.'}`", *cells, *sites))
    return _table(header, rows)


def _metrics(entries: Sequence[Entry]) -> str:
    measured = [entry for entry in entries if entry.metrics]
    names = list(dict.fromkeys(name for entry in measured for name in entry.metrics or ()))
    if not names:
        return ""
    rows = [
        (f"`{entry.name or '.'}`", *(_number((entry.metrics or {}).get(name)) for name in names))
        for entry in measured
    ]
    return f"\n## Measured\n\n{_table(('folder', *names), rows)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")
