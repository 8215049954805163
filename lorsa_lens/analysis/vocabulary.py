"""Heads in terms of tokens: which logits they write, which tokens they read, which pairs they join.

These readings come from weights alone. They hold the norms fixed and see the direct path only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.analysis.sources import head_name
from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.analysis.tables import table
from lorsa_lens.functional.masks import plain_alibi_slopes
from lorsa_lens.hosts import host_of
from lorsa_lens.hosts.ends import (
    attention_input,
    final_norm,
    logit_directions,
    token_embeddings,
)
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.site import reads_normalized
from lorsa_lens.splicing import splice

if TYPE_CHECKING:
    from pandas import DataFrame

Through = Literal["embedding", "mlp0"]

QUERIES_AT_A_TIME = 1024
"""Query tokens whose scores with all key tokens are held at once."""


@torch.no_grad()
def logit_weights(
    model: nn.Module, lorsa: Lorsa, heads: Sequence[int]
) -> Float[Tensor, "head d_vocab"]:
    """What `w_O` of chosen heads adds to the logits, per unit of the final norm's scale.

    Direct logit attribution per unit of activation: through the final norm's gain and centering,
    folded or not.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: whose heads.
        heads: which of them.
    """
    return logit_directions(host_of(model), lorsa.W_O.detach()[list(heads)])


@torch.no_grad()
def direct_logit_attribution(
    model: nn.Module, lorsa: Lorsa, tokens: Int[Tensor, "batch pos"], heads: Sequence[int]
) -> Float[Tensor, "batch pos head d_vocab"]:
    """What chosen heads add to the logits of a text, by the direct path.

    The final norm's scale is that of the model with the Lorsa in place, held fixed. In the last
    layer of a model without a final norm it is what ablating the head takes from the logits.

    Args:
        model: a HookedTransformer or a TransformerBridge, with nothing in place at this layer.
        lorsa: whose heads.
        tokens: the text.
        heads: which heads.
    """
    host, layer = host_of(model), lorsa.cfg.layer
    norm = final_norm(host)
    acts_name = f"blocks.{layer}.attn.lorsa.hook_acts_post"
    final_name = f"blocks.{host.n_layers - 1}.hook_resid_post"
    with splice(model, lorsa):
        _, cache = cast(Any, model).run_with_cache(tokens, names_filter=[acts_name, final_name])
    acts, resid = cache[acts_name][..., list(heads)], cache[final_name]
    if norm.centres:
        resid = resid - resid.mean(-1, keepdim=True)
    if norm.scales:
        acts = acts / resid.square().mean(-1, keepdim=True).sqrt().to(acts)
    directions = logit_weights(model, lorsa, heads).to(acts)
    added: Tensor = einsum(acts, directions, "b s head, head v -> b s head v")
    return added


def top_logits(
    model: nn.Module,
    lorsa: Lorsa,
    heads: Sequence[int],
    *,
    vocabulary: Vocabulary | None = None,
    n: int = 10,
) -> "DataFrame":
    """The tokens whose logits chosen heads raise and lower most, for positive activations.

    Args:
        model: as for `logit_weights`.
        lorsa: as for `logit_weights`.
        heads: as for `logit_weights`.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n: tokens per head and direction.

    Returns:
        Rows with `head`, `direction` (`raises` or `lowers`), `rank`, `token`, `string`, `logit`
        (less the mean over all tokens).
    """
    weights = logit_weights(model, lorsa, heads)
    weights = weights - weights.mean(1, keepdim=True)
    return _ranked(lorsa, heads, weights, ("raises", "lowers"), "logit", _of(model, vocabulary), n)


@torch.no_grad()
def read_weights(
    model: nn.Module, lorsa: Lorsa, heads: Sequence[int], *, through: Through = "embedding"
) -> Float[Tensor, "head d_vocab"]:
    """The value `x w_V + b_V` that chosen heads would fetch from each token.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: whose heads.
        heads: which of them.
        through: what stands for a token in the residual stream: its `embedding`, or what block 0
            makes of the token alone (`mlp0`: the effective embedding of arXiv 2312.09230).
    """
    x = _token_inputs(model, lorsa, through)
    chosen = list(heads)
    values = nn.functional.linear(x, lorsa.W_V[chosen], lorsa.b_V[chosen])
    return values.T.contiguous()


def top_read_tokens(
    model: nn.Module,
    lorsa: Lorsa,
    heads: Sequence[int],
    *,
    through: Through = "embedding",
    vocabulary: Vocabulary | None = None,
    n: int = 10,
) -> "DataFrame":
    """The tokens from which chosen heads fetch the largest and the smallest values.

    Args:
        model: as for `read_weights`.
        lorsa: as for `read_weights`.
        heads: as for `read_weights`.
        through: as for `read_weights`.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n: tokens per head and direction.

    Returns:
        Rows with `head`, `direction` (`largest` or `smallest`), `rank`, `token`, `string`, `value`.
    """
    weights = read_weights(model, lorsa, heads, through=through)
    names = ("largest", "smallest")
    return _ranked(lorsa, heads, weights, names, "value", _of(model, vocabulary), n)


@torch.no_grad()
def top_token_pairs(
    model: nn.Module,
    lorsa: Lorsa,
    circuit: int,
    *,
    offsets: Sequence[int] = (1,),
    through: Through = "embedding",
    vocabulary: Vocabulary | None = None,
    n: int = 20,
) -> "DataFrame":
    """The pairs of query and key tokens that a circuit scores highest, by distance.

    Learned positions are left out; rotary positions and ALiBi give each distance its own scores.

    Args:
        model: a HookedTransformer or a TransformerBridge.
        lorsa: whose circuit.
        circuit: which query-key circuit.
        offsets: distances from key to query.
        through: as for `read_weights`.
        vocabulary: strings of all tokens. None: those of the model's tokenizer.
        n: pairs per distance.

    Returns:
        Rows with `offset`, `rank`, `query_token`, `key_token`, their strings and `score` (before
        the softmax).

    Raises:
        ValueError: if there is no such circuit.
    """
    if not 0 <= circuit < lorsa.cfg.n_qk_heads:
        raise ValueError(f"circuit = {circuit}: the Lorsa has 0 to {lorsa.cfg.n_qk_heads - 1}")
    strings = _of(model, vocabulary)
    x = _token_inputs(model, lorsa, through)[:, None]

    def projected(position: int) -> tuple[Tensor, Tensor]:
        at = torch.full((1, 1), position, device=x.device)
        q, k = lorsa.queries_and_keys(x, positions=at)
        return q[:, 0, circuit], k[:, 0, circuit]

    rows: list[dict[str, Any]] = []
    _, keys = projected(0)
    for offset in offsets:
        queries, _ = projected(offset)
        values, pairs = _top_products(queries, keys, n)
        scores = _scores(lorsa, values, circuit, offset)
        for rank, (score, (query, key)) in enumerate(
            zip(scores.tolist(), pairs.tolist(), strict=True)
        ):
            rows.append(
                {
                    "layer": lorsa.cfg.layer,
                    "circuit": circuit,
                    "offset": offset,
                    "rank": rank,
                    "query_token": query,
                    "key_token": key,
                    "query_string": strings.strings[query],
                    "key_string": strings.strings[key],
                    "score": score,
                }
            )
    return table(rows)


def _scores(
    lorsa: Lorsa, products: Float[Tensor, " pair"], circuit: int, offset: int
) -> Float[Tensor, " pair"]:
    """Scores from products of queries and keys: scaled, capped, less what distance costs."""
    cfg = lorsa.cfg
    scores = products / cfg.score_divisor
    if cfg.attn_scores_soft_cap is not None:
        scores = cfg.attn_scores_soft_cap * torch.tanh(scores / cfg.attn_scores_soft_cap)
    if cfg.positional_embedding_type == "alibi":
        slopes = cfg.alibi_slopes or plain_alibi_slopes(cfg.n_qk_heads)
        scores = scores - slopes[circuit] * offset
    return scores


def _top_products(
    queries: Float[Tensor, "query dim"], keys: Float[Tensor, "key dim"], n: int
) -> tuple[Float[Tensor, " pair"], Int[Tensor, "pair 2"]]:
    """The largest products of any query with any key, and which they are."""
    n = min(n, len(queries) * len(keys))
    best, pairs = queries.new_empty(0), torch.empty(0, 2, dtype=torch.long, device=queries.device)
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        products = (queries[start : start + QUERIES_AT_A_TIME] @ keys.T).flatten()
        top = products.topk(min(n, len(products)))
        found = torch.stack((top.indices // len(keys) + start, top.indices % len(keys)), dim=1)
        joined = torch.cat((best, top.values))
        best, order = joined.topk(min(n, len(joined)))
        pairs = torch.cat((pairs, found))[order]
    return best, pairs


def _token_inputs(
    model: nn.Module, lorsa: Lorsa, through: Through
) -> Float[Tensor, "d_vocab d_model"]:
    """What a Lorsa would read at each token, if there were nothing but the token."""
    if through not in ("embedding", "mlp0"):
        raise ValueError(f"through = {through!r} must be 'embedding' or 'mlp0'")
    host, layer = host_of(model), lorsa.cfg.layer
    if layer is None:
        raise ValueError("the Lorsa's cfg.layer is None: say which layer it belongs to")
    if through == "embedding":
        resid = token_embeddings(host)
    else:
        name = "blocks.0.hook_resid_post"
        tokens = torch.arange(int(host.model.cfg.d_vocab), device=lorsa.W_V.device)[:, None]
        _, cache = host.model.run_with_cache(tokens, names_filter=name)
        resid = cache[name][:, 0]
    x = attention_input(host, layer, resid[:, None])[:, 0]
    norm = host.input_norm(layer)
    if norm is not None and reads_normalized(lorsa):
        x = (x - norm.bias) / norm.gain
    return x.to(lorsa.W_V)


def _of(model: nn.Module, vocabulary: Vocabulary | None) -> Vocabulary:
    return Vocabulary.of(model) if vocabulary is None else vocabulary


def _ranked(
    lorsa: Lorsa,
    heads: Sequence[int],
    weights: Float[Tensor, "head d_vocab"],
    directions: tuple[str, str],
    column: str,
    vocabulary: Vocabulary,
    n: int,
) -> "DataFrame":
    """The tokens with the largest and the smallest weights of each head."""
    rows: list[dict[str, Any]] = []
    for direction, sign in zip(directions, (1, -1), strict=True):
        top = (sign * weights).topk(min(n, weights.shape[1]), dim=1)
        for head, values, tokens in zip(
            heads, top.values.tolist(), top.indices.tolist(), strict=True
        ):
            for rank, (value, token) in enumerate(zip(values, tokens, strict=True)):
                rows.append(
                    {
                        "layer": lorsa.cfg.layer,
                        "head": head,
                        "name": head_name(lorsa.cfg.layer, head),
                        "direction": direction,
                        "rank": rank,
                        "token": token,
                        "string": vocabulary.strings[token],
                        column: sign * value,
                    }
                )
    return table(rows)
