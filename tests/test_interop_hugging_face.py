"""A bare Hugging Face model gets Lorsas in two lines: a bridge around it, and a splice."""

import pytest
import torch
import zoo

from lorsa_lens import Lorsa, splice

TOKENS = zoo.tokens()


@pytest.fixture(params=["GPT2", "Llama", "Gemma2"])
def wrapped(request):
    """A model of `transformers`, and nothing of TransformerLens."""
    if zoo.lacks(f"bridge-{request.param.lower()}"):
        pytest.skip("the installed TransformerLens has no bridge")
    return zoo.hugging_face(torch.float64, request.param)


def bridge_around(hf_model, tokenizer):
    """The first of the two lines, as docs/sharing.md has it."""
    from transformer_lens.model_bridge import TransformerBridge

    with zoo.quiet():
        return TransformerBridge.boot_transformers(
            "any-name", hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
        )


def test_two_lines_splice_a_hugging_face_model(wrapped):
    expected = wrapped(TOKENS).logits.clone()
    model = bridge_around(wrapped, zoo.tokenizer())
    with splice(model, Lorsa.from_attention(model, layer=1)):
        spliced, cache = model.run_with_cache(TOKENS)
        its_own = wrapped(TOKENS).logits  # the model that was given runs the Lorsa too
    torch.testing.assert_close(spliced, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(its_own, expected, rtol=1e-5, atol=1e-5)
    assert cache["blocks.1.attn.lorsa.hook_pattern"].shape[-2:] == (12, 12)


def test_interventions_reach_generation_of_the_hugging_face_model(wrapped):
    model = bridge_around(wrapped, zoo.tokenizer())
    lorsa = Lorsa.from_attention(model, layer=0)
    prompt, options = TOKENS[:1], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": zoo.PAD}
    expected = wrapped.generate(prompt, **options)
    with splice(model, lorsa):
        assert torch.equal(wrapped.generate(prompt, **options), expected)
    lorsa.W_O.data.zero_()
    with splice(model, lorsa):
        zeroed = wrapped(prompt).logits
    assert (zeroed - wrapped(prompt).logits).abs().max() > 1e-3
