"""Attention superposition: rules that share an attention head, pulled apart.

A layer of three attention heads serves eleven rules, so heads are shared and switching one off
breaks many rules at once. We take the layer's output apart in two ways, into the heads of a Lorsa
and into the features of a TopK SAE of the same size, trained on the same tokens with the same loss.
For each method and each rule we choose units on some sequences and judge them on others: do they
tell where the rule is at work, and does switching them off break this rule and no other?

Both methods pull the rules apart. What only the Lorsa has is a source: each head says which token
it fetched from. For an SAE's feature one has to go back through the attention heads.

    python examples/attention_superposition.py
"""

from collections.abc import Sequence
from typing import Any

from lorsa_lens import Lorsa
from lorsa_lens.demo.example import example_options, show
from lorsa_lens.demo.superposition import LORSA, Comparison, at_work, compare
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import RuleLanguage, load_model
from lorsa_lens.testbed.sae import TopKSAE, train_sae
from lorsa_lens.training import TrainingConfig, train
from lorsa_lens.views import Heading, Text

LANGUAGE = RuleLanguage()
N_UNITS, K = 256, 4
N_TEST = 192
"""Sequences on which units are chosen and judged."""


def trained(model: Any, n_steps: int) -> tuple[Lorsa, TopKSAE]:
    """A Lorsa and an SAE of the same size, from the same tokens."""
    tokens = LANGUAGE.sample(2048, seed=1).tokens
    n_pos = LANGUAGE.n_ctx
    config = TrainingConfig(
        n_qk_heads=8,
        n_ov_heads=N_UNITS,
        k=K,
        context_size=n_pos,
        train_batch_size_tokens=32 * n_pos,
        training_tokens=n_steps * 32 * n_pos,
    )
    lorsa = train(model, tokens, [0], config)[0]
    outputs = record_attention(model, tokens, [0])[0].out
    return lorsa, train_sae(outputs, n_features=N_UNITS, k=K, n_steps=n_steps)


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Run the example."""
    parser = example_options(__doc__, "attention_superposition")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    options = parser.parse_args(argv)

    model = load_model("rules")
    lorsa, sae = trained(model, options.steps)
    test = LANGUAGE.sample(N_TEST, seed=2)
    found = compare(model, lorsa, sae, LANGUAGE, test)
    clearest = sorted(found.methods[LORSA], key=lambda row: -row.f1)[:6]
    show(
        options.out,
        "Attention superposition",
        Heading("Attention heads are shared"),
        Text(
            "Nats that the answers of each rule cost when an attention head is set to its mean; "
            "and how much of what the rule's Lorsa heads carry came from each attention head."
        ),
        found.sharing(),
        Heading("Pulled apart"),
        Text(
            "Means over the rules. F1: whether the rule's units tell where it is at work. Off: "
            "nats that switching them off costs the rule itself, and the other rules."
        ),
        found.means(),
        Text(
            "Rule by rule. Source: how much of the best attention head's pattern, and of the z "
            "pattern of the Lorsa heads, lies on the true source. An SAE's feature has none."
        ),
        found.rules(),
        Heading("What stays mixed"),
        Text("Units of a rule that break another rule too, by more than a tenth of their cost."),
        found.mixing(),
        Heading("Lorsa heads at work"),
        at_work(model, lorsa, LANGUAGE, test, clearest),
    )
    return found


if __name__ == "__main__":
    main()
