"""MLPs on a prompt: a node per token, linear around the prompt, or features of a transcoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.stages import Change, Reading, Stage, leaves, writers_of
from lorsa_lens.circuits.transcoders import TranscoderCode
from lorsa_lens.hosts import Host, UnsupportedAttentionError
from lorsa_lens.singular.frozen_norm import FrozenNorm, freeze, no_norm
from lorsa_lens.singular.stream import Stream


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MLPPart:
    """One MLP on a prompt: what it read and what came of it."""

    module: nn.Module
    resid: Float[Tensor, "pos d_model"]
    """The stream that it read."""
    x: Float[Tensor, "pos d_model"]
    """What it received."""
    norm: FrozenNorm
    """From the stream to `x`."""
    post_norm: FrozenNorm
    """From what it returned to `out`."""
    out: Float[Tensor, "pos d_model"]
    """What it writes to the stream."""
    precision: torch.dtype

    def call(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """What the module returns; differentiable."""
        returned = self.module(x.to(self.precision)[None])
        first: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return first[0].double()

    @torch.enable_grad()
    def pull(self, c: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos d_model"]:
        """At each position, a functional of what is written as one of the stream.

        By the transposed Jacobian at the prompt, norms frozen.
        """
        x = self.x.clone().requires_grad_(True)
        (back,) = torch.autograd.grad(self.call(x), x, self.post_norm.pull(c))
        return self.norm.pull(back.detach())

    def push(self, change: Change) -> Change:
        """What a change of the stream adds to what is written, by the Jacobian."""
        return self.along(self.norm.share(change))

    @torch.enable_grad()
    def along(self, change: Float[Tensor, "pos d_model"]) -> Change:
        """The same for a change of what the module receives.

        By two reverse passes: forward-mode differentiation knows fewer modules.
        """
        x = self.x.clone().requires_grad_(True)
        dummy = torch.zeros_like(self.out, requires_grad=True)
        (back,) = torch.autograd.grad(self.call(x), x, dummy, create_graph=True)
        (along,) = torch.autograd.grad(back, dummy, change)
        return self.post_norm.share(along.detach())


@contextmanager
def recorded_mlps(host: Host) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within, what every MLP receives and returns is noted, by layer."""
    noted: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            del module
            received = args[0] if args else next(iter(kwargs.values()))
            returned = out[0] if isinstance(out, tuple) else out
            noted[layer] = (received.detach(), returned.detach())

        return hook

    handles = []
    for layer in range(host.n_layers):
        mlp = host.mlp(layer)
        if mlp is not None:
            handles.append(mlp.register_forward_hook(note(layer), with_kwargs=True))
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def mlp_part(
    host: Host, stream: Stream, layer: int, noted: dict[int, tuple[Tensor, Tensor]]
) -> MLPPart | None:
    """One MLP, from what was noted; None where the layer has none.

    Raises:
        UnsupportedAttentionError: if the layer writes what no module of the name `mlp` returned.
    """
    part, module = stream.layers[layer], host.mlp(layer)
    if not part.mlp_out.any():
        return None
    if layer not in noted or module is None:
        raise UnsupportedAttentionError(
            f"layer {layer}: its MLP is no module that the model calls, so it cannot be linearised"
        )
    received, returned = (tensor[0].double() for tensor in noted[layer])
    read = part.resid_pre if host.parallel else part.resid_pre + part.attn_out
    norm, after = host.mlp_norm(layer), host.mlp_post_norm(layer)
    post = no_norm(returned) if after is None else freeze(after, returned, part.mlp_out)
    if after is None and not torch.allclose(returned, part.mlp_out, rtol=1e-3, atol=1e-6):
        raise UnsupportedAttentionError(
            f"layer {layer}: what its MLP returns is not what is added to the residual stream"
        )
    return MLPPart(
        module=module,
        resid=read,
        x=received,
        norm=no_norm(read) if norm is None else freeze(norm, read, received),
        post_norm=post,
        out=part.mlp_out,
        precision=noted[layer][0].dtype,
    )


class LinearMLP(Stage):
    """An MLP as one node per token: its Jacobian at the prompt, and the rest as a constant."""

    def __init__(self, layer: int, part: MLPPart) -> None:
        self.layer, self.part = layer, part
        n_pos = len(part.out)
        nodes = [Node("mlp", layer, pos) for pos in range(n_pos)]
        self.writers = writers_of([(nodes, part.out, None)], n_pos)
        unit = torch.zeros_like(part.out)
        directions = self.writers.vectors / self.writers.activations[:, None]
        unit[self.writers.pos] = directions
        self.directions = directions
        self.cotangents = part.pull(unit)

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        places = [self.units[node] for node in nodes]
        at = self.writers.pos[places]
        vectors = self.cotangents[at]
        c = vectors.new_zeros(len(nodes), *self.cotangents.shape)
        c[torch.arange(len(nodes)), at] = vectors
        norms = self.writers.activations[places]
        return Reading(c, norms - (vectors * self.part.resid[at]).sum(1), norms)

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        written = self.part.push(change)
        return (written[self.writers.pos] * self.directions).sum(1), written

    @override
    def own_answer(self, place: int, change: Change) -> Float[Tensor, " d_model"]:
        return self.part.push(change)[self.writers.pos[place]]


class TranscoderStage(Stage):
    """The features of a transcoder that are active, its bias, and what it misses."""

    def __init__(self, layer: int, part: MLPPart, transcoder: object) -> None:
        self.layer, self.norm = layer, part.norm
        n_pos = len(part.out)
        self.code = TranscoderCode(transcoder, part.x, part.norm, layer)
        self.pos, self.feature, self.acts = self.code.active
        nodes = [
            Node("feature", layer, pos, feature)
            for pos, feature in zip(self.pos.tolist(), self.feature.tolist(), strict=True)
        ]
        written = self.acts[:, None] * self.code.W_dec[self.feature]
        bias = self.code.b_dec.expand(n_pos, -1)
        self.error = error = (part.out - bias).index_add(0, self.pos, -written)
        self.writers = writers_of(
            [
                (nodes, written, self.acts),
                (leaves("bias", layer, n_pos, "mlp"), bias, None),
                (leaves("error", layer, n_pos, "mlp"), error, None),
            ],
            n_pos,
        )
        self._place = {node: i for i, node in enumerate(nodes)}
        self._live = [i for i, node in enumerate(nodes) if node in self.units]
        self._places = [self.units[nodes[i]] for i in self._live]

    @override
    def read(self, nodes: Sequence[Node]) -> Reading:
        chosen = [self._place[node] for node in nodes]
        at, W_enc = self.pos[chosen], self.code.read[chosen]
        c = W_enc.new_zeros(len(nodes), len(self.norm.scale), W_enc.shape[1])
        c[torch.arange(len(nodes)), at] = self.norm.pull(W_enc, at)
        constants = W_enc @ self.norm.bias + self.code.read_bias[chosen]
        return Reading(c, constants, self.acts[chosen])

    @override
    def respond(self, change: Change) -> tuple[Tensor, Change]:
        x = self.norm.share(change)[self.pos]
        return self._answers(self._places, (x * self.code.read).sum(1)[self._live])
