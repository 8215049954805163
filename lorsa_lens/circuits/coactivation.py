"""What virtual weights come to on a corpus: which heads are at work together, batch by batch.

A virtual weight says what would happen if two heads met; whether they meet is a matter of the
text. With all Lorsas in place, patterns, norms and selection frozen, let

    m_ij[q] = sum_k A^h(j)[q, k] z_i[k] / scale[k]

be how much of what head i wrote head j's circuit brings to query q. For a virtual weight V_ij:

    expected attribution (ERA)      V_ij E[ 1(z_j[q] != 0) m_ij[q] ]
    target-weighted (TWERA)         V_ij E[ |z_j[q]| m_ij[q] ] / E[ |z_j[q]| ]

as in "Circuit Tracing" (2025), section on global weights. On the query and the key side the target
is the score. A softmax sees only how a score differs from those of the other keys, so with
`D[q, k] = A[q, k] - 1 / n_keys[q]` the expected attribution of head i through the keys of circuit h
is `E_q[ sum_k D[q, k] (what i wrote at k adds to the score of q and k) ]`; through the query
`E_q[ sum_k D[q, k] (what i wrote at q adds to it) ]`.

Memory does not grow with the corpus: one [lower head, upper head] matrix for each two layers, and
`batch_size` sequences at a time with their [head, query, key] patterns.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorsa_lens.circuits.folded import read_norm
from lorsa_lens.circuits.global_circuit import GlobalCircuit
from lorsa_lens.circuits.stages import unfolded
from lorsa_lens.hosts.ends import attention_input
from lorsa_lens.singular.frozen_norm import FrozenNorm, freeze, no_norm
from lorsa_lens.singular.qk_head import QKReading
from lorsa_lens.splicing import splice

Pair = tuple[int, int]
"""Layers of the lower and the upper head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Coactivation:
    """Statistics of the heads of several layers, at work together on a corpus."""

    n_tokens: int
    scales: dict[int, float]
    """One over the mean of `1 / scale` of each norm; the final norm's by the number of layers."""
    post_scales: dict[int, float]
    """The same for norms after attention."""
    frequency: dict[int, Float[Tensor, " ov_head"]]
    """Share of the tokens at which a head stays."""
    activations: dict[int, Float[Tensor, " ov_head"]]
    """Root mean square of z where the head stays."""
    met: dict[Pair, Float[Tensor, "up down"]]
    """`E[1(z_j != 0) m_ij]`."""
    met_weighted: dict[Pair, Float[Tensor, "up down"]]
    """`E[|z_j| m_ij] / E[|z_j|]`."""
    query: dict[Pair, Float[Tensor, "up circuit"]]
    """Expected attribution of lower heads through the query side, in units of scores."""
    key: dict[Pair, Float[Tensor, "up circuit"]]
    """The same through the key side."""

    def corrected(self, circuit: GlobalCircuit) -> GlobalCircuit:
        """The circuit with scales and activations as they are on the corpus."""
        return circuit.held_at(self.scales, self.post_scales, self.activations)

    def expected(
        self, circuit: GlobalCircuit, low: int, high: int, *, target_weighted: bool = False
    ) -> Float[Tensor, "up down"]:
        """Virtual weights of the value side as they come out on the corpus (ERA, or TWERA).

        Args:
            circuit: whose virtual weights.
            low: layer of the lower heads.
            high: layer of the upper heads.
            target_weighted: weigh tokens by the size of the upper head's z.
        """
        met = (self.met_weighted if target_weighted else self.met)[low, high]
        return circuit.value_weights(low, high) * met * circuit.layers[high].norm.scale


@torch.no_grad()
def measure_coactivation(
    circuit: GlobalCircuit,
    tokens: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 16,
) -> Coactivation:
    """Run a corpus through the model with all Lorsas in place, and keep what heads do together.

    Args:
        circuit: the Lorsas of a model, nothing in place.
        tokens: ids [sequence, pos], without padding; or any iterable of such, of any lengths.
        batch_size: sequences that are run at once.

    Raises:
        ValueError: if there are no tokens, or the model has shortformer positions, which do not
            pass through the norm.
    """
    if circuit.host.shortformer:
        raise ValueError("the model has shortformer positions: they do not pass through the norm")
    sums = _Sums(circuit)
    with splice(circuit.model, circuit.lorsas.values()):
        for batch in [tokens] if isinstance(tokens, Tensor) else tokens:
            for part in batch.split(batch_size):
                sums.add(part)
    if sums.n_tokens == 0:
        raise ValueError("tokens is empty: give at least one sequence")
    return sums.result()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """One layer on one sequence."""

    norm: FrozenNorm
    written: Float[Tensor, "pos ov_head"]
    """z, times the held scale of a norm after attention over the true one."""
    post: FrozenNorm
    acts: Float[Tensor, "pos ov_head"]
    readings: list[QKReading]


class _Sums:
    """Running sums over a corpus."""

    def __init__(self, circuit: GlobalCircuit) -> None:
        self.folded, self.lorsas, self.host = circuit.layers, circuit.lorsas, circuit.host
        self.n_tokens = 0
        self.total: dict[tuple[Any, ...], Tensor] = {}
        self.final = f"blocks.{self.host.n_layers - 1}.hook_resid_post"

    def add(self, tokens: Int[Tensor, "sequence pos"]) -> None:
        """Run some sequences."""
        names = {self.final}
        for layer in self.lorsas:
            names |= {f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out"}
            lorsa = f"blocks.{layer}.attn.lorsa"
            names |= {f"{lorsa}.hook_acts_post", f"{lorsa}.hook_recons"}
        _, cache = self.host.model.run_with_cache(tokens, names_filter=lambda name: name in names)
        self.n_tokens += tokens.numel()
        for row in range(len(tokens)):
            self._add_sequence({name: cache[name][row].double() for name in names})

    def _add_sequence(self, cache: dict[str, Tensor]) -> None:
        final = self._final_norm(cache[self.final])
        self._add("inverse_scale", self.host.n_layers, value=(1 / final.scale).sum())
        layers = {layer: self._layer(layer, cache) for layer in self.lorsas}
        for layer, part in layers.items():
            stays = part.acts != 0
            self._add("inverse_scale", layer, value=(1 / part.norm.scale).sum())
            self._add("stays", layer, value=stays.sum(0))
            self._add("inverse_post_scale", layer, value=(1 / part.post.scale).sum())
            self._add("square", layer, value=part.acts.square().sum(0))
            self._add("size", layer, value=part.acts.abs().sum(0))
        for high in layers:
            for low in (low for low in layers if low < high):
                self._add_pair(low, high, layers[low], layers[high])

    def _layer(self, layer: int, cache: dict[str, Tensor]) -> _Layer:
        resid = cache[f"blocks.{layer}.hook_resid_pre"]
        like = next(self.host.model.parameters())
        x = attention_input(self.host, layer, resid.to(like)[None])[0].double()
        norm = no_norm(resid)
        if not torch.equal(x, resid.to(like).double()):
            norm = freeze(self.host.norm_before(layer), resid, x)
        acts = cache[f"blocks.{layer}.attn.lorsa.hook_acts_post"]
        post, recons = no_norm(resid), cache[f"blocks.{layer}.attn.lorsa.hook_recons"]
        post_norm = self.host.post_norm(layer)
        if post_norm is not None and self.lorsas[layer].cfg.output_site == "attn_out":
            post = freeze(post_norm, recons, cache[f"blocks.{layer}.hook_attn_out"])
        return _Layer(
            norm=norm,
            written=acts * (self.folded[layer].post_scale / post.scale)[:, None],
            post=post,
            acts=acts,
            readings=[circuit.reading(x) for circuit in self.folded[layer].circuits],
        )

    def _add_pair(self, low: int, high: int, below: _Layer, above: _Layer) -> None:
        scaled = below.written / above.norm.scale[:, None]
        size = self.lorsas[high].cfg.group_size
        met, weighted, sides = [], [], []
        for number, reading in enumerate(above.readings):
            brought = reading.pattern @ scaled
            z = above.acts[:, number * size : (number + 1) * size]
            met.append(brought.mT @ (z != 0).double())
            weighted.append(brought.mT @ z.abs())
            sides.append(self._through_scores(low, below, above, reading))
        self._add("met", low, high, value=torch.cat(met, dim=1))
        self._add("weighted", low, high, value=torch.cat(weighted, dim=1))
        for side, parts in zip(("query", "key"), zip(*sides, strict=True), strict=True):
            self._add(side, low, high, value=torch.stack(parts, dim=1))

    def _through_scores(
        self, low: int, below: _Layer, above: _Layer, reading: QKReading
    ) -> tuple[Float[Tensor, " up"], Float[Tensor, " up"]]:
        """What lower heads add to relative scores, through the queries and through the keys."""
        visible = reading.visible.double()
        D = reading.pattern - visible / visible.sum(-1, keepdim=True).clamp(min=1)
        norm, head = above.norm, reading.head
        if head.input_norm is not None:
            norm = unfolded(norm, *head.input_norm)
        W_O = self.folded[low].W_O
        found = []
        for projection, factor, other in (
            (head.query, reading.q_factor, D @ reading.k),
            (head.key, reading.k_factor, D.mT @ reading.q),
        ):
            read = reading.rotation.transposed(other) * factor[:, None]
            read = norm.pull(read @ projection.effective[0].mT)
            found.append(((read @ W_O.mT) * below.written).sum(0) / head.divisor)
        return found[0], found[1]

    def _final_norm(self, resid: Float[Tensor, "pos d_model"]) -> FrozenNorm:
        norm = self.host.final_norm
        return no_norm(resid) if norm is None else read_norm(norm, resid)

    def _add(self, *name: Any, value: Tensor) -> None:
        self.total[name] = self.total.get(name, torch.zeros_like(value)) + value

    def result(self) -> Coactivation:
        """The statistics so far."""
        n, total = self.n_tokens, self.total
        pairs = [(low, high) for kind, low, *rest in total if kind == "met" for high in rest]
        stays = {layer: total["stays", layer].clamp(min=1) for layer in self.lorsas}
        sizes = {layer: total["size", layer].clamp(min=1e-30) for layer in self.lorsas}
        return Coactivation(
            n_tokens=n,
            scales={
                layer: n / total["inverse_scale", layer].item()
                for layer in (*self.lorsas, self.host.n_layers)
            },
            post_scales={
                layer: n / total["inverse_post_scale", layer].item() for layer in self.lorsas
            },
            frequency={layer: total["stays", layer] / n for layer in self.lorsas},
            activations={
                layer: (total["square", layer] / stays[layer]).sqrt() for layer in self.lorsas
            },
            met={pair: total[("met", *pair)] / n for pair in pairs},
            met_weighted={pair: total[("weighted", *pair)] / sizes[pair[1]] for pair in pairs},
            query={pair: total[("query", *pair)] / n for pair in pairs},
            key={pair: total[("key", *pair)] / n for pair in pairs},
        )
