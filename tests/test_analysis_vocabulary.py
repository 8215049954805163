"""Heads in terms of tokens, against measured logits and plain products."""

import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.vocabulary import (
    direct_logit_attribution,
    logit_weights,
    read_weights,
    top_logits,
    top_read_tokens,
    top_token_pairs,
)
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.ends import attention_input, final_norm, logit_directions, token_embeddings
from lorsa_lens.recording import record_attention

STRINGS = Vocabulary(tuple(f" w{i}" for i in range(zoo.D_VOCAB)))
DECODERS = [
    kind for kind in zoo.KINDS
    if kind.name in (
        "learned", "learned-processed", "attn-only", "llama", "olmo2", "gemma3", "shortformer",
        "bridge-gpt2", "bridge-llama-processed", "bridge-gemma", "bridge-phi", "bridge-native",
    )
]  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_both_ends_of_a_host(kind):
    """Embeddings, the input of a layer, and logits rebuilt from the residual stream."""
    model = kind.build(torch.float64)
    host, tokens = host_of(model), zoo.tokens(1, 10)
    last = host.n_layers - 1
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        record = record_attention(model, tokens, [last])[last]
        received = attention_input(host, last, cache[f"blocks.{last}.hook_resid_pre"])
        if not host.shortformer:  # there hook_embed is what positions were added to
            embedded = token_embeddings(host)[tokens]
            torch.testing.assert_close(embedded, cache["hook_embed"])
        norm = final_norm(host)
        resid = cache[f"blocks.{last}.hook_resid_post"][0]
        centred = resid - resid.mean(-1, keepdim=True) if norm.centres else resid
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        written = logit_directions(host, resid) / scale
    torch.testing.assert_close(received, record.x)
    constant = logits[0] - written  # biases of the final norm and the unembedding
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.skipif(zoo.lacks("learned"), reason="models without norms are HookedTransformers")
def test_direct_attribution_is_the_logit_change_of_ablation():
    model = zoo.hooked(torch.float64, normalization_type=None)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    tokens = zoo.tokens(2, 8)
    # MLPs read what attention writes, so only the last attention of an attention-only path is
    # direct: take the MLP after it away.
    with torch.no_grad():
        model.blocks[1].mlp.W_out.zero_()
    found = direct_logit_attribution(model, lorsa, tokens, [3, 9])
    name = "blocks.1.attn.lorsa.hook_acts_post"
    changed = 0
    with torch.no_grad(), splice(model, lorsa):
        logits = model(tokens)
        for index, head in enumerate((3, 9)):
            without = model.run_with_hooks(tokens, fwd_hooks=[(name, zero_heads([head]))])
            torch.testing.assert_close(found[:, :, index], logits - without)
            changed += (logits - without).abs().max()
    assert changed > 1e-3


def test_attribution_through_a_norm_is_linear_in_its_frozen_scale():
    model = zoo.KINDS[0].build(torch.float64)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=16)
    tokens = zoo.tokens(1, 6)
    found = direct_logit_attribution(model, lorsa, tokens, list(range(16)))
    final = f"blocks.{host_of(model).n_layers - 1}.hook_resid_post"
    with torch.no_grad(), splice(model, lorsa):
        names = ["blocks.1.attn.lorsa.hook_recons", final]
        _, cache = model.run_with_cache(tokens, names_filter=names)
    resid = cache[final]
    scale = resid.std(-1, unbiased=False, keepdim=True)
    written = cache[names[0]] - lorsa.b_O.detach()
    expected = logit_directions(host_of(model), written[0]) / scale[0]
    torch.testing.assert_close(found.sum(2)[0], expected, rtol=1e-5, atol=1e-7)


def test_layer_0_reads_what_the_embedding_says():
    """Without positions, the value of a token is the value in a text of that token alone."""
    name = "bridge-gptneox" if zoo.lacks("rotary") else "rotary"
    model = zoo.by_name(name).build(torch.float64)
    tokens = torch.arange(zoo.D_VOCAB)[:, None]
    for layer, through in ((0, "embedding"), (1, "mlp0")):
        lorsa = Lorsa.from_attention(model, layer, n_ov_heads=16, k=4)
        record = record_attention(model, tokens, [layer])[layer].seen_by(lorsa)
        with torch.no_grad():
            z = lorsa.outputs(record.x).acts_pre[:, 0]
        found = read_weights(model, lorsa, [2, 15], through=through)
        torch.testing.assert_close(found, z[:, [2, 15]].T)


def test_tables_list_the_extremes_in_order():
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1, n_ov_heads=16, k=4)
    weights = logit_weights(model, lorsa, [5])[0]
    frame = top_logits(model, lorsa, [5, 7], vocabulary=STRINGS, n=3)
    assert list(frame.columns) == [
        "layer", "head", "name", "direction", "rank", "token", "string", "logit",
    ]  # fmt: skip
    assert len(frame) == 2 * 2 * 3
    rows = frame[(frame["head"] == 5) & (frame["direction"] == "lowers")]
    assert rows["token"].tolist() == weights.argsort()[:3].tolist()
    assert rows["logit"].tolist() == pytest.approx(
        (weights.sort().values[:3] - weights.mean()).tolist(), rel=1e-4
    )
    assert rows["string"].iloc[0] == f" w{int(weights.argmin())}"
    reads = top_read_tokens(model, lorsa, [5], vocabulary=STRINGS, n=2)
    values = read_weights(model, lorsa, [5])[0]
    assert reads["token"].tolist() == [
        *values.argsort(descending=True)[:2].tolist(),
        *values.argsort()[:2].tolist(),
    ]


@pytest.mark.parametrize("offset", [1, 3])
def test_token_pairs_are_the_largest_scores(offset):
    """Each score is what two tokens at that distance would get."""
    name = "bridge-gptneox" if zoo.lacks("rotary") else "rotary"
    model = zoo.by_name(name).build(torch.float64)
    lorsa = Lorsa.from_attention(model, 0)
    frame = top_token_pairs(model, lorsa, 2, offsets=[offset], vocabulary=STRINGS, n=5)
    host = host_of(model)
    with torch.no_grad():
        x = attention_input(host, 0, token_embeddings(host)[:, None])[:, 0]
        scores = torch.empty(zoo.D_VOCAB, zoo.D_VOCAB, dtype=torch.float64)
        for key in range(zoo.D_VOCAB):
            pair = torch.zeros(zoo.D_VOCAB, offset + 1, x.shape[1], dtype=torch.float64)
            pair[:, 0], pair[:, offset] = x[key], x
            _, cache = lorsa.run_with_cache(pair, names_filter="hook_attn_scores")
            scores[:, key] = cache["hook_attn_scores"][:, 2, offset, 0]
    top = scores.flatten().topk(5)
    assert frame["score"].tolist() == pytest.approx(top.values.tolist())
    pairs = (frame["query_token"] * zoo.D_VOCAB + frame["key_token"]).tolist()
    assert pairs == top.indices.tolist()


def test_what_has_no_vocabulary_is_refused(monkeypatch):
    model = zoo.KINDS[0].build(torch.float32)
    lorsa = Lorsa.from_attention(model, 1)
    with pytest.raises(ValueError, match="circuit = 99"):
        top_token_pairs(model, lorsa, 99, vocabulary=STRINGS)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="through = 'x' must be"):
        read_weights(model, lorsa, [0], through="x")
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="no tokenizer: give vocabulary"):
        top_logits(model, lorsa, [0])
