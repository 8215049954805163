"""What attention layers receive and return while a model runs: the data Lorsas learn from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorsa_lens.hosts import Host, InputNorm, host_of
from lorsa_lens.lorsa import Lorsa
from lorsa_lens.site import reads_normalized, site_at


class AttentionRecord(NamedTuple):
    """What one attention layer received and returned, for some sequences of one length."""

    x: Float[Tensor, "batch pos d_model"]
    """What the attention module received."""

    out: Float[Tensor, "batch pos d_model"]
    """What it returned."""

    qk_input: Float[Tensor, "batch pos d_model"] | None
    """What queries and keys read, where that differs from `x` (shortformer)."""

    positions: Int[Tensor, "#batch pos"]
    """Position of each token."""

    keep: Bool[Tensor, "#batch #pos key"] | None
    """Keys that could be seen, where some could not."""

    input_norm: InputNorm | None = None
    """The affine part of the norm before attention, if there is one that is not folded."""

    attn_out: Float[Tensor, "batch pos d_model"] | None = None
    """What was added to the residual stream, where a norm stands between it and `out`."""

    def batch(self, rows: Tensor | slice) -> "AttentionRecord":
        """The records of some of the sequences."""

        def rows_of(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[rows]

        return self._replace(
            x=self.x[rows],
            out=self.out[rows],
            qk_input=None if self.qk_input is None else self.qk_input[rows],
            positions=rows_of(self.positions),
            keep=None if self.keep is None else rows_of(self.keep),
            attn_out=None if self.attn_out is None else self.attn_out[rows],
        )

    def target(self, lorsa: Lorsa) -> Float[Tensor, "batch pos d_model"]:
        """What a Lorsa should write: `out`, or `attn_out` where its `output_site` says so."""
        if lorsa.cfg.output_site == "hook_attn_out" and self.attn_out is not None:
            return self.attn_out
        return self.out

    def seen_by(self, lorsa: Lorsa) -> "AttentionRecord":
        """The record as a Lorsa in the place of the layer meets it.

        `x` and `qk_input` are what it reads, without the affine part of the norm where its
        `input_site` or `fold_ln` says so; `out` is what it should write; both in its precision and
        on its device.
        """
        like = lorsa.W_O

        def read(stream: Tensor) -> Tensor:
            if self.input_norm is not None and reads_normalized(lorsa):
                stream = (stream - self.input_norm.bias) / self.input_norm.gain
            return stream.to(like)

        return AttentionRecord(
            x=read(self.x),
            out=self.target(lorsa).to(like),
            qk_input=None if self.qk_input is None else read(self.qk_input),
            positions=self.positions.to(like.device),
            keep=None if self.keep is None else self.keep.to(like.device),
        )

    @property
    def context(self) -> dict[str, Any]:
        """Keyword arguments for `Lorsa.forward`, `encode`, `pattern` and `z_pattern`."""
        keep = None if self.keep is None else self.keep.expand(self.x.shape[0], -1, -1)
        return {"qk_input": self.qk_input, "positions": self.positions, "keep": keep}


@torch.no_grad()
def record_attention(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    layers: Iterable[int],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[int, AttentionRecord]:
    """Run a model and keep what chosen attention layers receive and return.

    Args:
        model: a HookedTransformer or a TransformerBridge. Lorsas may be in place at other layers.
        tokens: token ids, without padding.
        layers: which layers.
        batch_size: sequences per forward pass.
        progress: show a progress bar.

    Returns:
        For each layer, one record of all sequences.

    Raises:
        ValueError: if there are no tokens, `batch_size` is not positive, or a layer does not exist
            or has a Lorsa in its place.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens has shape {list(tokens.shape)}: give ids [batch, pos]")
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be positive")
    host, layers = host_of(model), list(dict.fromkeys(layers))
    for layer in layers:
        host.check_layer(layer)
        if site_at(host, layer) is not None:
            raise ValueError(
                f"layer {layer} is spliced, so its attention does not run: remove the splice first"
            )
    parts: dict[int, list[AttentionRecord]] = {layer: [] for layer in layers}
    starts = range(0, tokens.shape[0], batch_size)
    with recorded(host, layers, parts):
        for start in tqdm(starts, desc="recording attention", disable=not progress):
            model(tokens[start : start + batch_size], return_type=None)
    return {layer: joined(records) for layer, records in parts.items()}


@contextmanager
def recorded(
    host: Host, layers: Sequence[int], parts: dict[int, list[AttentionRecord]]
) -> Iterator[None]:
    """Within, every call of the layers' attention is appended to `parts`."""
    recorders = [_Recorder(host, layer, parts[layer]) for layer in layers]
    hidden = [recorder.attention.__dict__.get("forward") for recorder in recorders]
    post_norms = [host.post_norm(layer) for layer in layers]
    handles: list[Any] = []
    try:
        for recorder, post_norm in zip(recorders, post_norms, strict=True):
            recorder.attention.__dict__["forward"] = recorder.forward
            if post_norm is not None:
                handles.append(post_norm.register_forward_hook(recorder.after_post_norm))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for recorder, forward in zip(recorders, hidden, strict=True):
            recorder.attention.__dict__.pop("forward", None)
            if forward is not None:
                recorder.attention.__dict__["forward"] = forward


class _Recorder:
    """Runs an attention module as it is, and notes what went in and out."""

    def __init__(self, host: Host, layer: int, records: list[AttentionRecord]) -> None:
        self.host, self.layer, self.records = host, layer, records
        self.attention = host.attention(layer)
        self.original = self.attention.forward
        self.input_norm = host.input_norm(layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the attention module's `forward`."""
        call = self.host.receive(self.layer, args, kwargs)
        out = self.host.run_original(self.layer, self.original, call, args, kwargs)
        record = AttentionRecord(
            x=call.x,
            out=out,
            qk_input=call.qk_input,
            positions=_once(call.positions),
            keep=None if call.keep is None else _once(call.keep),
            input_norm=self.input_norm,
        )
        self.records.append(record)
        return self.host.respond(self.layer, out)

    def after_post_norm(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """A forward hook of the norm after attention."""
        del module, args
        self.records[-1] = self.records[-1]._replace(attn_out=out)


def _once(tensor: Tensor) -> Tensor:
    """A tensor that says the same for every sequence, for one of them."""
    return tensor[:1].clone() if bool((tensor == tensor[:1]).all()) else tensor


def joined(records: list[AttentionRecord]) -> AttentionRecord:
    """Records of one layer, batch after batch, as one."""
    sizes = [record.x.shape[0] for record in records]
    positions = _joined_shared([record.positions for record in records], sizes)
    assert positions is not None
    return AttentionRecord(
        x=torch.cat([record.x for record in records]),
        out=torch.cat([record.out for record in records]),
        qk_input=_joined_given([record.qk_input for record in records]),
        positions=positions,
        keep=_joined_shared([record.keep for record in records], sizes),
        input_norm=records[0].input_norm,
        attn_out=_joined_given([record.attn_out for record in records]),
    )


def _joined_given(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def _joined_shared(parts: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    """Parts with one row for all sequences of a batch where these agree; so is the whole."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    # A mask may be there for some batches only: for the others, nothing is hidden.
    whole = [torch.ones_like(given[0][:1]) if part is None else part for part in parts]
    if all(torch.equal(part, whole[0][:1]) for part in whole):
        return whole[0]
    pairs = zip(whole, sizes, strict=True)
    return torch.cat([part.expand(size, *part.shape[1:]) for part, size in pairs])
