"""A model of the testbed as a folder with a Hugging Face GPT-2 and its tokenizer."""

from pathlib import Path

import torch

from lorsa_lens.testbed import load_language, load_weights
from lorsa_lens.testbed.network import LAYER_NORM_EPS


def save_gpt2(name, folder: Path) -> Path:
    """The attention-only network as a GPT-2 with words as tokens, whose MLPs write nothing.

    Its heads fill d_model, as those of a GPT-2 must: the ones added read nothing.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    weights, config = load_weights(name)
    language = load_language(name)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.d_vocab, n_positions=config.n_ctx, n_ctx=config.n_ctx,
            n_embd=config.d_model, n_layer=config.n_layers, n_inner=4 * config.d_model,
            n_head=config.d_model // config.d_head,
            layer_norm_epsilon=LAYER_NORM_EPS, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    model.load_state_dict(_gpt2_weights(weights, config), strict=False)
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.bias)
    model.save_pretrained(folder)
    ids = {word: token for token, word in enumerate(language.vocab)}
    words = Tokenizer(models.WordLevel(ids, unk_token=language.vocab[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=language.vocab[0], eos_token=language.vocab[0]
    ).save_pretrained(folder)
    return folder


def _gpt2_weights(weights, config):
    """Weights by GPT-2's names: [in, out] matrices, heads side by side, queries, keys, values."""
    W_U = weights["unembed.W_U"]
    # GPT-2's unembedding has no bias: the final norm's takes it, which the unembedding reads.
    bias = (
        weights["ln_final.b"] + torch.linalg.pinv(W_U.T.double()).float() @ weights["unembed.b_U"]
    )
    found = {
        "transformer.wte.weight": weights["embed.W_E"],
        "transformer.wpe.weight": weights["pos_embed.W_pos"],
        "transformer.ln_f.weight": weights["ln_final.w"],
        "transformer.ln_f.bias": bias,
        "lm_head.weight": W_U.T,
    }
    for layer in range(config.n_layers):
        own, block = f"blocks.{layer}", f"transformer.h.{layer}"
        n_added = config.d_model // config.d_head - config.n_heads
        matrices = [weights[f"{own}.attn.W_{kind}"] for kind in "QKV"]
        vectors = [weights[f"{own}.attn.b_{kind}"] for kind in "QKV"]
        matrices = [torch.cat((W, torch.zeros(n_added, *W.shape[1:]))) for W in matrices]
        vectors = [torch.cat((b, torch.zeros(n_added, *b.shape[1:]))) for b in vectors]
        W_O = weights[f"{own}.attn.W_O"]
        W_O = torch.cat((W_O, W_O[:n_added]))
        found |= {
            f"{block}.ln_1.weight": weights[f"{own}.ln1.w"],
            f"{block}.ln_1.bias": weights[f"{own}.ln1.b"],
            f"{block}.attn.c_attn.weight": torch.cat(
                [matrix.permute(1, 0, 2).flatten(1) for matrix in matrices], dim=1
            ),
            f"{block}.attn.c_attn.bias": torch.cat([vector.flatten() for vector in vectors]),
            f"{block}.attn.c_proj.weight": W_O.flatten(0, 1),
            f"{block}.attn.c_proj.bias": weights[f"{own}.attn.b_O"],
        }
    return {name: weight.contiguous() for name, weight in found.items()}
