"""Put a Lorsa in the place of an attention layer, look at its heads, switch one off.

The lines of the README, on a model that comes with the package.

    python examples/splice_and_look.py
"""

import torch

from lorsa_lens import Lorsa, splice, zero_heads
from lorsa_lens.recording import record_attention
from lorsa_lens.testbed import load_language, load_model
from lorsa_lens.views import attention_view, save, z_pattern_view

torch.set_grad_enabled(False)
model, language = load_model("rules"), load_language("rules")
tokens = language.sample(1, seed=0).tokens

# The layer itself, written as a Lorsa: 3 query-key circuits, 48 rank-1 heads, all of them kept.
lorsa = Lorsa.from_attention(model, layer=0)

with splice(model, lorsa):  # the original attention is not computed any more
    logits, cache = model.run_with_cache(tokens)
print("largest difference of a logit:", float((logits - model(tokens)).abs().max()))

acts = cache["blocks.0.attn.lorsa.hook_acts_post"]  # [batch, pos, n_ov_heads]
pattern = cache["blocks.0.attn.lorsa.hook_pattern"]  # [batch, n_qk_heads, query, key]
head = int(acts[0, -1].abs().argmax())

# With an error term the model stays exact, and a head can be removed from it.
with splice(model, lorsa, error_term=True):
    hook = ("blocks.0.attn.lorsa.hook_acts_post", zero_heads([head]))
    ablated = model.run_with_hooks(tokens, fwd_hooks=[hook])
print(f"without head {head}:", float((ablated - logits).abs().max()))

# Who moved what where: what each source token gives the head.
words = language.str_tokens(tokens[0])
x = record_attention(model, tokens, [0])[0].x  # what the layer receives
figure = z_pattern_view(lorsa.z_pattern(x, [head])[0], words, head_names=[f"L0.{head}"])
save("lorsa_demo/splice_and_look.html", figure, attention_view(pattern[0], words))
