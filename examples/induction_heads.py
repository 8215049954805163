"""Induction heads, taken apart: from two attention heads to single-purpose Lorsa heads.

A two-layer attention-only transformer has learned to continue repeated sequences. We train a Lorsa
on its second layer, splice it in, and ask which heads fetch the token after the last occurrence of
the current one; then we switch them off.

    python examples/induction_heads.py
"""

import torch

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.analysis.relations import induction
from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.evaluation import evaluate
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import CyclicLanguage, load_model
from lorsa_lens.training import TrainingConfig, train_on

LAYER = 1


def main(n_steps: int = 400) -> dict[str, float]:
    """Run the example; returns the numbers that it prints."""
    model = load_model("induction")
    seen = CyclicLanguage().sample(1024, seed=1).tokens
    test = CyclicLanguage(n_ctx=19, min_period=9).sample(128, seed=2)

    lorsa = Lorsa.from_attention(
        model, LAYER, n_qk_heads=8, n_ov_heads=256, k=4, act_fn="topk_relu"
    )
    batch = 32 * seen.shape[1]
    config = TrainingConfig(
        train_batch_size_tokens=batch, context_size=seen.shape[1], training_tokens=n_steps * batch
    )
    train_on({LAYER: lorsa}, record_attention(model, seen, [LAYER]), config)

    (fidelity,) = evaluate(model, lorsa, test.tokens, predicted=test.answer >= 0)
    record = record_attention(model, test.tokens, [LAYER])[LAYER]
    scores = source_scores(lorsa, record, {"induction": induction(test.tokens)})["induction"]
    heads = scores.heads()

    hook_acts = f"blocks.{LAYER}.attn.lorsa.hook_acts_post"
    with torch.no_grad(), splice(model, lorsa):
        spliced = accuracy(model(test.tokens), test.answer)
        with model.hooks(fwd_hooks=[(hook_acts, zero_heads(heads))]):
            without = accuracy(model(test.tokens), test.answer)
    numbers = {
        "cross entropy recovered": fidelity.ce_recovered,
        "induction heads": len(heads),
        "share of their z pattern on the source": scores.mean_share(heads),
        "accuracy": spliced,
        "accuracy without them": without,
    }
    for name, value in numbers.items():
        print(f"{name:40} {value:.3g}")
    print("strongest:", ", ".join(f"L{LAYER}.{head}" for head in heads[:8]))
    return numbers


def accuracy(logits: torch.Tensor, answer: torch.Tensor) -> float:
    """Share of the asked positions at which the highest logit is the answer."""
    asked = answer >= 0
    return float((logits[asked].argmax(-1) == answer[asked]).double().mean())


if __name__ == "__main__":
    main()
