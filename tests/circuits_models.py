"""Small models of the testbed with both layers replaced: trained once per test process."""

from functools import cache
from typing import Any

from lorsa_lens import Lorsa
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import CyclicLanguage, Language, load_language, load_model
from lorsa_lens.testbed.models import ModelName
from lorsa_lens.training import TrainingConfig, train_on

SIZES: dict[str, dict[str, int]] = {
    "recall": {"n_qk_heads": 2, "n_ov_heads": 128, "k": 8},
    "induction": {"n_qk_heads": 6, "n_ov_heads": 192, "k": 8},
}
N_STEPS, N_SEQUENCES = 150, 32


def language_of(name: ModelName) -> Language:
    """Its language; that of induction so short that each token has one earlier occurrence.

    At later positions the heads of the model's first layer no longer look at the token before.
    """
    if name == "induction":
        return CyclicLanguage(n_ctx=19, min_period=9)
    return load_language(name)


@cache
def replaced(name: ModelName) -> tuple[Any, dict[int, Lorsa]]:
    """A model of the testbed, and a trained Lorsa for each of its two layers.

    They are shared: leave them as they are.
    """
    model, language = load_model(name), language_of(name)
    seen = language.sample(1024, seed=1).tokens
    lorsas = {
        layer: Lorsa.from_attention(model, layer, act_fn="topk_relu", **SIZES[name])
        for layer in (0, 1)
    }
    batch = N_SEQUENCES * seen.shape[1]
    config = TrainingConfig(
        train_batch_size_tokens=batch, context_size=seen.shape[1], training_tokens=N_STEPS * batch
    )
    train_on(lorsas, record_attention(model, seen, [0, 1]), config, progress=False)
    for lorsa in lorsas.values():
        lorsa.requires_grad_(requires_grad=False).eval()
    return model, lorsas
