"""Induction heads, taken apart: from two attention heads to single-purpose Lorsa heads.

A two-layer attention-only transformer has learned to continue repeated sequences. We train a Lorsa
on its second layer, splice it in, and ask which heads fetch the token after the last occurrence of
the current one; then we switch them off.

    python examples/induction_heads.py
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.analysis.relations import induction
from lorsa_lens.analysis.sources import SourceScores, head_name, source_scores
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.evaluation import evaluate
from lorsa_lens.recording import AttentionRecord, record_attention
from lorsa_lens.testbed import CyclicLanguage, LabelledTokens, load_model
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.views import Figure, Table, Text, z_pattern_view

LAYER = 1
LANGUAGE = CyclicLanguage(n_ctx=19, min_period=9)  # so short that every source is the only one


class Found(NamedTuple):
    """What the example found."""

    heads: list[int]
    """Induction heads, strongest first."""

    share: float
    """How much of their z pattern lies on the token after the last occurrence."""

    ce_recovered: float
    accuracy: float
    """With the Lorsa in place."""

    accuracy_without: float
    """With the Lorsa in place and these heads off."""


def trained_lorsa(model: Any, n_steps: int) -> Lorsa:
    """A Lorsa of 256 heads, of which 4 stay per token."""
    tokens = CyclicLanguage().sample(1024, seed=1).tokens
    n_pos = tokens.shape[1]
    config = TrainingConfig(
        n_qk_heads=8,
        n_ov_heads=256,
        k=4,
        context_size=n_pos,
        train_batch_size_tokens=32 * n_pos,
        training_tokens=n_steps * 32 * n_pos,
    )
    return train(model, tokens, [LAYER], config)[LAYER]


@torch.no_grad()
def accuracies(
    model: Any, lorsa: Lorsa, labels: LabelledTokens, heads: list[int]
) -> tuple[float, float]:
    """Share of right answers with the Lorsa in place, and with some of its heads off."""
    hook = (f"blocks.{LAYER}.attn.lorsa.hook_acts_post", zero_heads(heads))
    with splice(model, lorsa):
        return (
            accuracy(model(labels.tokens), labels.answer),
            accuracy(model.run_with_hooks(labels.tokens, fwd_hooks=[hook]), labels.answer),
        )


def accuracy(logits: Tensor, answer: Tensor) -> float:
    """Share of the asked positions at which the highest logit is the answer."""
    asked = answer >= 0
    return float((logits[asked].argmax(-1) == answer[asked]).double().mean())


@torch.no_grad()
def figure(lorsa: Lorsa, record: AttentionRecord, tokens: Tensor, heads: list[int]) -> Figure:
    """What each token gives the strongest heads, on the first sequence."""
    z_pattern = lorsa.z_pattern(record.x[:1], heads)[0]
    names = [head_name(LAYER, head) for head in heads]
    return z_pattern_view(z_pattern, LANGUAGE.str_tokens(tokens), head_names=names)


def head_table(scores: SourceScores, heads: list[int]) -> Table:
    """The heads with their scores."""
    header = ["head", "z pattern on the source", "energy at such queries", "queries"]
    rows = [
        [
            head_name(LAYER, head),
            scores.share[head].item(),
            scores.energy[head].item(),
            int(scores.n_queries[head]),
        ]
        for head in heads
    ]
    return Table(header, rows)


def main(argv: Sequence[str] | None = None) -> Found:
    """Run the example."""
    parser = example_options(__doc__, "induction_heads")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default 400)")
    options = parser.parse_args(argv)

    model = load_model("induction")
    lorsa = trained_lorsa(model, options.steps)
    test = LANGUAGE.sample(128, seed=2)
    (fidelity,) = evaluate(model, lorsa, test.tokens, predicted=test.answer >= 0)
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    scores = source_scores(lorsa, record, {"induction": induction(test.tokens)})["induction"]
    heads = scores.heads()
    share = scores.mean_share(heads)
    spliced, without = accuracies(model, lorsa, test, heads)
    found = Found(heads, share, float(fidelity.ce_recovered), spliced, without)
    summary: list[list[str | float]] = [
        ["cross entropy recovered", found.ce_recovered],
        ["induction heads", len(heads)],
        ["their z pattern on the source", share],
        ["accuracy, Lorsa in place", spliced],
        ["accuracy, these heads off", without],
    ]
    show(
        options.out,
        "Induction heads",
        Table(["", "value"], summary),
        Text("The ten strongest:"),
        head_table(scores, heads[:10]),
        figure(lorsa, record, test.tokens[0], heads[:6]),
    )
    return found


if __name__ == "__main__":
    main()
