"""The circuit of associative recall: what the example and the notebook share."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lorsa_lens.analysis.relations import induction, previous_token
from lorsa_lens.analysis.sources import source_scores
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.splicing import splice
from lorsa_lens.testbed import RecallLanguage
from lorsa_lens.training import TrainingConfig, train_on
from lorsa_lens.views import Table

N_QK_HEADS, N_OV_HEADS, K = 2, 128, 8
BATCH = 32


def trained_lorsas(model: Any, n_steps: int) -> dict[int, Lorsa]:
    """Lorsas for both layers of the recall model: 128 heads each, 8 of them at a token."""
    tokens = RecallLanguage().sample(1024, seed=1).tokens
    n_pos = tokens.shape[1]
    lorsas = {
        layer: Lorsa.from_attention(
            model, layer, n_qk_heads=N_QK_HEADS, n_ov_heads=N_OV_HEADS, k=K, act_fn="topk_relu"
        )
        for layer in (0, 1)
    }
    config = TrainingConfig(
        context_size=n_pos,
        train_batch_size_tokens=BATCH * n_pos,
        training_tokens=n_steps * BATCH * n_pos,
    )
    train_on(lorsas, record_attention(model, tokens, [0, 1]), config, progress=False)
    for lorsa in lorsas.values():
        lorsa.requires_grad_(requires_grad=False).eval()
    return lorsas


def recall_prompt(seed: int, pair: int = 6) -> tuple[Int[Tensor, " pos"], int]:
    """Sixteen different pairs of words, then the key of one of them; and its value."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(32, generator=generator) + 1
    bos = torch.zeros(1, dtype=torch.int64)
    prompt = torch.cat((bos, words, words[2 * pair : 2 * pair + 1]))
    return prompt, int(words[2 * pair + 1])


def behaviours(model: Any, lorsas: Mapping[int, Lorsa]) -> dict[tuple[int, int], str]:
    """Names of heads by what they fetch from: the token before, or what followed a token before."""
    tokens = RecallLanguage().sample(64, seed=2).tokens
    sources = {"previous token": previous_token(tokens), "induction": induction(tokens)}
    records = record_attention(model, tokens, list(lorsas))
    found: dict[tuple[int, int], str] = {}
    for layer, lorsa in lorsas.items():
        scores = source_scores(lorsa, records[layer], sources)
        for name, score in scores.items():
            found |= {(layer, head): name for head in score.heads()}
    return found


@torch.no_grad()
def answer_losses(model: Any, lorsas: Mapping[int, Lorsa]) -> dict[str, float]:
    """Cross entropy of the answers: of the model, with both Lorsas, and without attention."""
    labels = RecallLanguage().sample(128, seed=3)
    asked = labels.answer >= 0

    def loss(logits: Tensor) -> float:
        wanted = labels.answer[asked]
        return float(torch.nn.functional.cross_entropy(logits[asked], wanted))

    off = [(f"blocks.{layer}.hook_attn_out", nothing) for layer in lorsas]
    found = {"model": loss(model(labels.tokens))}
    with splice(model, lorsas.values()):
        found["both layers replaced"] = loss(model(labels.tokens))
    found["no attention"] = loss(model.run_with_hooks(labels.tokens, fwd_hooks=off))
    return found


def nothing(out: Tensor, hook: Any) -> Tensor:  # noqa: ARG001 (hooks are called with both)
    """A hook that takes a layer's output away."""
    return torch.zeros_like(out)


def recovered(losses: Mapping[str, float]) -> float:
    """How much of the way from no attention to the model both Lorsas go."""
    model, spliced, none = losses.values()
    return (none - spliced) / (none - model)


def attention_table(traced: Mapping[str, Any], n: int = 5) -> Table:
    """Why a head attends, by pairs of nodes; of `QKTracing.to_dict`."""
    rows = [[query, key, value] for query, key, value in traced["pair_wise"][:n]]
    return Table(["query node", "key node", "part of the score"], rows)
