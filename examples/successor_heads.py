"""Successor heads out of attention superposition: three heads, eleven rules.

One layer of three attention heads has learned, among other rules, to count: the next number, the
next day, the next ordinal. Each attention head serves several of these rules. We train a Lorsa on
the layer and print, for each successor rule, the single-purpose heads that carry it and which value
each of them fetches.

    python examples/successor_heads.py
"""

import torch

from lorsa_lens import Lorsa
from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.functional.code import to_dense
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import load_language, load_model, source_mass
from lorsa_lens.training import TrainingConfig, train_on

SUCCESSORS = ("nextnum", "nextday", "nextord")


def main(n_steps: int = 700) -> dict[str, list[int]]:
    """Run the example; returns the heads of each successor rule."""
    model, language = load_model("rules"), load_language("rules")
    seen, test = language.sample(2048, seed=1), language.sample(256, seed=2)

    _, cache = model.run_with_cache(test.tokens, names_filter="blocks.0.attn.hook_pattern")
    mass = source_mass(cache["blocks.0.attn.hook_pattern"], test, len(language.rules))
    print("attention heads that look at the source of each rule (more than half of their pattern):")
    for rule, row in zip(language.rules, mass, strict=True):
        heads = [f"0.{head}" for head, share in enumerate(row.tolist()) if share > 0.5]
        print(f"  {rule:10} {' '.join(heads) or 'none'}")

    lorsa = Lorsa.from_attention(model, 0, n_qk_heads=8, n_ov_heads=256, k=4, act_fn="topk_relu")
    n_pos = language.n_ctx
    config = TrainingConfig(
        train_batch_size_tokens=32 * n_pos, context_size=n_pos, training_tokens=n_steps * 32 * n_pos
    )
    train_on({0: lorsa}, record_attention(model, seen.tokens, [0]), config)

    record = record_attention(model, test.tokens, [0])[0]
    sources = {
        rule: test.source.masked_fill(test.rule != language.rules.index(rule), -1)
        for rule in SUCCESSORS
    }
    scores = source_scores(lorsa, record, sources)
    with torch.no_grad():
        acts = to_dense(lorsa.encode(record.x), lorsa.cfg.n_ov_heads).abs()
    found = {}
    for rule in SUCCESSORS:
        found[rule] = scores[rule].heads()
        share = scores[rule].mean_share(found[rule]) if found[rule] else float("nan")
        print(f"\n{rule}: {len(found[rule])} heads, {share:.0%} of their z pattern on the source")
        batch, query = torch.nonzero(sources[rule] >= 0, as_tuple=True)
        value = test.tokens[batch, sources[rule][batch, query]]
        for head in found[rule][:6]:
            strength = torch.zeros(len(language.vocab))
            strength.index_add_(0, value, acts[batch, query, head])
            top = strength.argmax()
            part = float(strength[top] / strength.sum())
            print(f"  L0.{head:<4} {part:.0%} of its activity at {language.vocab[top]!r}")
    return found


if __name__ == "__main__":
    main()
