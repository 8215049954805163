"""The local replacement model: one prompt, run once, and everything frozen that is not linear.

Attention patterns, norm scales and the sets of heads and features that stay are those of the
prompt. What then remains is linear (Ameisen et al. 2025, "Circuit Tracing", section 3): what one
node writes has an exact direct effect on what another reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorsa_lens.circuits.attention_stages import Attention, AttentionStage, LorsaStage
from lorsa_lens.circuits.graph import Node
from lorsa_lens.circuits.mlp_stages import (
    LinearMLP,
    MLPPart,
    TranscoderStage,
    mlp_part,
    recorded_mlps,
)
from lorsa_lens.circuits.stages import Change, Embedding, Reading, Stage
from lorsa_lens.circuits.targets import Output
from lorsa_lens.hosts import host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.singular.stream import Stream, record_stream


@torch.no_grad()
def local_replacement(
    model: nn.Module,
    lorsas: Lorsa | Iterable[Lorsa],
    tokens: Int[Tensor, "*one pos"] | Sequence[int],
    *,
    transcoders: Mapping[int, object] | None = None,
    attention: Attention = "frozen",
    str_tokens: Sequence[str] | None = None,
) -> "LocalReplacement":
    """Run a prompt once and freeze it.

    Args:
        model: a HookedTransformer or a TransformerBridge, no Lorsa in place.
        lorsas: for the layers that their `cfg.layer` names; there may be none.
        tokens: ids of one prompt, [pos] or [1, pos].
        transcoders: by layer; from SAELens, or any object with `W_enc`, `b_enc`, `W_dec`, `b_dec`.
            Other MLPs become one node per token, linearised by their Jacobian.
        attention: what becomes of the attention of other layers: `frozen` (no nodes, edges pass
            through), `heads` (a node per head and token) or `heads_by_source` (one per head, token
            and source token).
        str_tokens: the tokens as text. None: from the model's tokenizer, or their ids.

    Raises:
        ValueError: if a Lorsa or a transcoder does not fit the model, or `tokens` is no prompt.
        UnsupportedAttentionError: if the model's stream cannot be taken apart.
    """
    host = host_of(model)
    by_layer = lorsas_by_layer(lorsas, host.n_layers, host.d_model)
    given = dict(transcoders or {})
    for layer in given:
        if not 0 <= layer < host.n_layers:
            raise ValueError(f"transcoders[{layer}]: the model has layers 0 to {host.n_layers - 1}")
    if attention not in get_args(Attention):
        raise ValueError(f"attention = {attention!r}: one of {get_args(Attention)}")
    with recorded_mlps(host) as noted:
        stream = record_stream(model, tokens)
    if str_tokens is not None and len(str_tokens) != stream.n_pos:
        raise ValueError(f"str_tokens has {len(str_tokens)} entries for {stream.n_pos} tokens")
    stages: list[Stage] = [Embedding(stream)]
    parts: dict[int, MLPPart] = {}
    for layer in range(host.n_layers):
        before = len(stages) - 1
        if layer in by_layer:
            norm = host.input_norm(layer)
            stages.append(LorsaStage(by_layer[layer], layer, stream, norm))
        else:
            stages.append(AttentionStage(layer, stream, attention))
        stages[-1].reads_after = before
        part = mlp_part(host, stream, layer, noted)
        if part is None:
            if layer in given:
                raise ValueError(f"transcoders[{layer}]: layer {layer} has no MLP")
            continue
        parts[layer] = part
        transcoder = given.get(layer)
        stages.append(
            LinearMLP(layer, part)
            if transcoder is None
            else TranscoderStage(layer, part, transcoder)
        )
        stages[-1].reads_after = before if host.parallel else before + 1
    names = tuple(str_tokens) if str_tokens is not None else _texts(model, stream)
    return LocalReplacement(stream, tuple(stages), by_layer, given, names, parts)


class LocalReplacement:
    """One prompt as a linear machine; made by `local_replacement`.

    Attributes:
        stream: the prompt's residual stream, taken apart.
        stages: embedding, then attention and MLP of every layer: what each reads and writes.
        lorsas: the Lorsas, by layer.
        transcoders: the transcoders, by layer.
        tokens: the prompt, token by token.
        mlps: the MLPs on the prompt, by layer.
    """

    def __init__(
        self,
        stream: Stream,
        stages: tuple[Stage, ...],
        lorsas: dict[int, Lorsa],
        transcoders: dict[int, object],
        tokens: tuple[str, ...],
        mlps: dict[int, MLPPart],
    ) -> None:
        self.stream, self.stages, self.tokens = stream, stages, tokens
        self.lorsas, self.transcoders, self.mlps = lorsas, transcoders, mlps

    def __repr__(self) -> str:
        return (
            f"LocalReplacement(n_pos={self.stream.n_pos}, n_nodes={len(self.nodes)}, "
            f"lorsas={sorted(self.lorsas)}, transcoders={sorted(self.transcoders)})"
        )

    # ------------------------------------------------------------------------------------ nodes

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Everything that writes to the stream, sorted; targets are not among them."""
        return tuple(node for stage in self.stages for node in stage.writers.nodes)

    @cached_property
    def places(self) -> dict[Node, int]:
        """The place of every node in `nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def activations(self) -> Float[Tensor, " node"]:
        """Of every node."""
        return torch.cat([stage.writers.activations for stage in self.stages])

    @cached_property
    def starts(self) -> list[int]:
        """Where each stage's nodes begin in `nodes`."""
        starts = [0]
        for stage in self.stages:
            starts.append(starts[-1] + len(stage.writers.nodes))
        return starts

    @cached_property
    def stage_of(self) -> dict[Node, int]:
        """Index of the stage of every node."""
        return {node: i for i, stage in enumerate(self.stages) for node in stage.writers.nodes}

    def vector(self, node: Node) -> Float[Tensor, " d_model"]:
        """What a node writes to the stream at its position.

        Raises:
            ValueError: if it is not at work on this prompt.
        """
        if node not in self.places:
            raise ValueError(f"{node.id} is not at work on this prompt")
        stage = self.stages[self.stage_of[node]]
        return stage.writers.vectors[self.places[node] - self.starts[self.stage_of[node]]]

    def before_attention(self, layer: int) -> int:
        """Index of the last stage whose writing a layer's attention reads."""
        for stage in self.stages:
            if stage.layer == layer and not isinstance(stage, Embedding):
                return stage.reads_after
        raise ValueError(f"layer = {layer}: the prompt has {len(self.stream.layers)} layers")

    # ---------------------------------------------------------------------------------- effects

    def effects(
        self,
        cotangents: Float[Tensor, "row pos d_model"],
        reads_after: Sequence[int],
    ) -> Float[Tensor, "row node"]:
        """What linear functionals of the stream get from every node.

        One pass back through the frozen layers serves all rows; the prompt is not run again.

        Args:
            cotangents: the functionals.
            reads_after: for each, the index of the last stage before which it reads.
        """
        out = cotangents.new_zeros(len(cotangents), len(self.nodes))
        level = torch.as_tensor(reads_after)
        c = torch.zeros_like(cotangents)
        for i in range(len(self.stages) - 1, -1, -1):
            c[level == i] = cotangents[level == i]
            stage = self.stages[i]
            out[:, self.starts[i] : self.starts[i + 1]] = stage.writers.effects(c)
            through = stage.pull(c)
            if through is not None:
                c = c + through
        return out

    def read(self, nodes: Sequence[Node], output: Output) -> tuple[Reading, list[int]]:
        """What any nodes read, targets of `output` among them, and after which stages.

        Raises:
            ValueError: if one reads nothing, or is not at work on this prompt.
        """
        shape = self.stream.resid_final.shape
        c = self.stream.resid_final.new_zeros(len(nodes), *shape)
        constants, values = c.new_zeros(len(nodes)), c.new_zeros(len(nodes))
        levels = [len(self.stages) - 1] * len(nodes)
        groups: dict[int, list[int]] = {}
        for row, node in enumerate(nodes):
            if node.is_leaf or (node not in self.places and node not in output.nodes):
                raise ValueError(f"{node.id} is nothing that reads on this prompt")
            groups.setdefault(self.stage_of.get(node, len(self.stages)), []).append(row)
        for i, rows in groups.items():
            stage = output if i == len(self.stages) else self.stages[i]
            reading = stage.read([nodes[row] for row in rows])
            c[rows], constants[rows] = reading.cotangents, reading.constants
            values[rows] = reading.pre_activations
            if stage is not output:
                for row in rows:
                    levels[row] = stage.reads_after
        return Reading(c, constants, values), levels

    def rows(
        self, nodes: Sequence[Node], output: Output
    ) -> tuple[Float[Tensor, "target node"], Reading]:
        """The direct effects of every node on some targets, and what else these read."""
        reading, levels = self.read(nodes, output)
        return self.effects(reading.cotangents, levels), reading

    # -------------------------------------------------------------------------------- responses

    def respond(self, edits: Mapping[Node, float], output: Output) -> tuple[Tensor, Tensor]:
        """What follows of setting activations, everything frozen: the total effects.

        Args:
            edits: activations that nodes are held at.
            output: the targets.

        Returns:
            The changes of every node's activation, in the order of `nodes`, and of the targets.
        """
        n_stages = len(self.stages)
        zero = torch.zeros_like(self.stream.resid_final)
        after: list[Change] = []
        changes = torch.zeros_like(self.activations)
        resid = zero
        for i in range(n_stages):
            stage, start = self.stages[i], self.starts[i]
            read = after[stage.reads_after] if stage.reads_after >= 0 else zero
            answer, written = stage.respond(read) if i else (changes[: self.starts[1]], zero)
            answer = answer.clone()
            for node, value in edits.items():
                if self.stage_of[node] == i:
                    written, answer = self._held(node, value, read, written, answer)
            changes[start : self.starts[i + 1]] = answer
            resid = resid + written
            after.append(resid)
        c = output.read(output.nodes).cotangents
        return changes, (c * resid).sum((1, 2))

    def _held(
        self, node: Node, value: float, read: Change, written: Change, answer: Tensor
    ) -> tuple[Change, Tensor]:
        """A stage's answer while one of its nodes is held at an activation."""
        i = self.stage_of[node]
        stage, place = self.stages[i], self.places[node] - self.starts[i]
        vector, activation = stage.writers.vectors[place], stage.writers.activations[place]
        own = stage.own_answer(place, read) if read.any() else torch.zeros_like(vector)
        written = written.clone()
        written[node.pos] += vector * (value / activation - 1) - own
        answer[place] = value - activation
        return written, answer


def lorsas_by_layer(
    lorsas: Lorsa | Iterable[Lorsa], n_layers: int, d_model: int
) -> dict[int, Lorsa]:
    """Lorsas by the layer that each is for.

    Raises:
        ValueError: if one has no layer or one that another has, or does not fit the model.
    """
    chosen = [lorsas] if isinstance(lorsas, Lorsa) else list(lorsas)
    by_layer: dict[int, Lorsa] = {}
    for lorsa in chosen:
        layer = lorsa.cfg.layer
        if layer is None:
            raise ValueError("a Lorsa's cfg.layer is None: say which layer it belongs to")
        if not 0 <= layer < n_layers or lorsa.cfg.d_model != d_model:
            raise ValueError(
                f"a Lorsa of layer {layer} and width {lorsa.cfg.d_model} does not fit the model, "
                f"with layers 0 to {n_layers - 1} and width {d_model}"
            )
        if layer in by_layer:
            raise ValueError(f"two Lorsas are for layer {layer}")
        by_layer[layer] = lorsa
    return by_layer


def _texts(model: nn.Module, stream: Stream) -> tuple[str, ...]:
    """The prompt as text, or its ids where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    ids = stream.tokens.tolist()
    if tokenizer is None:
        return tuple(str(token) for token in ids)
    return tuple(str(token) for token in tokenizer.convert_ids_to_tokens(ids))
