"""Lorsas among SAELens's sparse dictionaries, and its SAEs beside Lorsas (extra `saelens`).

A `LorsaSAE` is an `SAE` of SAELens with another input hook than output hook, as its transcoders
have: `run_with_saes`, `run_with_cache_with_saes`, `run_with_hooks_with_saes`, the error term,
`save_model` and `load_from_disk` work with it. Importing this module registers the architecture
`lorsa`. SAELens hands a dictionary neither padding nor a KV cache: for padded texts and for
generation use `lorsa_lens.splice`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lorsa_lens.config import LorsaConfig
from lorsa_lens.functional.code import to_dense
from lorsa_lens.hook_points import HookPoint
from lorsa_lens.hosts import host_of
from lorsa_lens.interop.sites import to_site
from lorsa_lens.lorsa import Lorsa

try:
    from sae_lens import SAE, SAEConfig
    from sae_lens.registry import SAE_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata
except ImportError as error:
    raise ImportError(
        f"SAELens is needed here ({error}): pip install 'lorsa-lens[saelens]'"
    ) from error

SHOWN = (
    "hook_q",
    "hook_k",
    "hook_rot_q",
    "hook_rot_k",
    "hook_values",
    "hook_attn_scores",
    "hook_pattern",
)
"""Hook points of the Lorsa that appear beside SAELens's own."""


@dataclass
class LorsaSAEConfig(SAEConfig):
    """A Lorsa's configuration in the terms of SAELens: `d_in` is d_model, `d_sae` is n_ov_heads."""

    apply_b_dec_to_input: bool = False
    metadata: Any = field(default_factory=SAEMetadata)
    lorsa: dict[str, Any] = field(default_factory=dict)
    """`LorsaConfig.to_dict()`."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "lorsa"


class LorsaSAE(SAE[LorsaSAEConfig]):
    """A Lorsa as an `SAE`: `encode` gives dense head activations, `decode` what they write.

    Besides SAELens's hook points (`hook_sae_acts_post` are the activations of the heads that
    stay) it has the Lorsa's `hook_pattern`, `hook_attn_scores`, `hook_values`, `hook_q`, `hook_k`,
    `hook_rot_q` and `hook_rot_k`.
    """

    cfg: LorsaSAEConfig

    @override
    def initialize_weights(self) -> None:
        cfg = LorsaConfig.from_dict(self.cfg.lorsa)
        self.lorsa = Lorsa(cfg.replace(dtype=self.cfg.dtype), device=self.device)
        self._captured: Tensor | None = None

    @override
    def setup(self) -> None:
        """Name the hook points, the Lorsa's without `lorsa.` before them."""
        super().setup()
        for name in [name for name in self.hook_dict if name.startswith("lorsa.")]:
            del self.hook_dict[name]
        for name in SHOWN:
            self.hook_dict[name] = getattr(self.lorsa, name)

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_ov_heads"]:
        """What the heads read."""
        return self.lorsa.W_V.T

    @property
    def b_enc(self) -> nn.Parameter:
        """The heads' biases."""
        return self.lorsa.b_V

    @property
    def W_dec(self) -> nn.Parameter:
        """What the heads write."""
        return self.lorsa.W_O

    @property
    def b_dec(self) -> nn.Parameter:
        """What is written whatever the heads do."""
        return self.lorsa.b_O

    @override
    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input in the Lorsa's precision; no bias is subtracted."""
        x: Tensor = self.hook_sae_input(sae_in.to(self.dtype))
        return x

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Activations [batch, pos, n_ov_heads], 0 for every head that does not stay."""
        x = x if self._captured is None else self._captured
        # SAELens silences a dictionary by putting other modules in the place of its hook points.
        silent = not isinstance(self.hook_sae_acts_post, HookPoint)
        with self.lorsa.hooks_muted() if silent else nullcontext():
            acts_pre = self.lorsa._pre_activations(self.process_sae_in(x))
        acts_pre = self.hook_sae_acts_pre(acts_pre)
        acts = to_dense(self.lorsa.select(acts_pre), self.cfg.d_sae)
        shown: Tensor = self.hook_sae_acts_post(acts)
        return shown

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        """`sum_i z^i w_O^i + b_O`."""
        recons: Tensor = self.hook_sae_recons(feature_acts @ self.lorsa.W_O + self.lorsa.b_O)
        return recons

    @override
    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x))`; it has no error term by itself, since it writes elsewhere."""
        return self.decode(self.encode(x))


def as_sae(lorsa: Lorsa, model: nn.Module, **metadata: Any) -> LorsaSAE:
    """A Lorsa as an SAE for `model.run_with_saes(tokens, saes=sae)`; it shares no weights.

    It reads `ln1.hook_normalized`, with the norm's gain and bias folded in where the model has
    them, and writes `hook_attn_out`.

    Args:
        lorsa: made or trained for this model; its layer must be set.
        model: a HookedSAETransformer or a SAETransformerBridge.
        **metadata: more of SAELens's metadata, as `context_size=128, prepend_bos=True`, which its
            activation stores ask for.

    Raises:
        ValueError: if the Lorsa does not fit the layer, or replaces `attn_out` before a norm.
    """
    lorsa = to_site(lorsa, model, input_site="ln1_normalized", output_site="hook_attn_out")
    dtype = str(lorsa.W_O.dtype).removeprefix("torch.")
    cfg = LorsaSAEConfig(
        d_in=lorsa.cfg.d_model,
        d_sae=lorsa.cfg.n_ov_heads,
        dtype=dtype,
        device=str(lorsa.W_O.device),
        lorsa=lorsa.cfg.to_dict(),
        metadata=SAEMetadata(
            hook_name=lorsa.cfg.hook_in,
            hook_name_out=lorsa.cfg.hook_out,
            model_name=host_of(model).model_name,
            **metadata,
        ),
    )
    sae = LorsaSAE(cfg)
    sae.lorsa.load_state_dict(lorsa.state_dict())
    return sae


def as_lorsa(sae: LorsaSAE) -> Lorsa:
    """The Lorsa of a `LorsaSAE`, with its own hook points, for `splice`; it shares no weights."""
    lorsa = Lorsa(sae.lorsa.cfg, device=sae.lorsa.W_O.device)
    lorsa.to(sae.lorsa.W_O.dtype)
    lorsa.load_state_dict(sae.lorsa.state_dict())
    return lorsa


@contextmanager
def at_output(sae: LorsaSAE, model: nn.Module) -> Iterator[LorsaSAE]:
    """Within, the SAE sits at its output hook alone, as SAELens's `run_evals` needs it.

    `run_evals` knows one hook: it asks for the reconstruction of the activation there. So within
    this context `encode` ignores what it is given, and reads what the model's last pass showed at
    the input hook.

    Example:
        >>> with at_output(sae, model):  # doctest: +SKIP
        ...     metrics, _ = run_evals(sae, store, model, ActivationScaler(), EvalConfig(...))
    """
    metadata = sae.cfg.metadata
    hook_in, hook_out = metadata.hook_name, metadata.hook_name_out
    hook_point = cast(Any, model).hook_dict[hook_in]

    def capture(x: Tensor, hook: HookPoint) -> Tensor:
        del hook
        sae._captured = x
        return x

    hook_point.add_hook(capture, is_permanent=True)
    handle = hook_point.fwd_hooks[-1]
    metadata.hook_name, metadata.hook_name_out = hook_out, None
    try:
        yield sae
    finally:
        handle.hook.remove()
        hook_point.fwd_hooks.remove(handle)
        metadata.hook_name, metadata.hook_name_out = hook_in, hook_out
        sae._captured = None


def load_attention_sae(
    path: str | Path, sae_id: str | None = None, *, device: str = "cpu"
) -> "SAE[Any]":
    """A SAELens SAE on the output of an attention layer, to compare Lorsas with.

    Args:
        path: a folder that SAELens saved, or with `sae_id` a release (or repository) of SAELens.
        sae_id: which SAE of the release.
        device: where it goes.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it reads anything but an attention output.
    """
    sae: SAE[Any]
    if sae_id is not None:
        sae = SAE.from_pretrained(str(path), sae_id, device=device)
    elif not (Path(path) / "cfg.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no cfg.json, so no SAE is saved there; to load one of SAELens's "
            "releases, give its sae_id too"
        )
    else:
        sae = SAE.load_from_disk(path, device=device)
    hook_name = str(sae.cfg.metadata.hook_name)
    if not hook_name.endswith(("hook_attn_out", "attn.hook_out", "attn.hook_z")):
        raise ValueError(
            f"this SAE reads {hook_name}: only one on hook_attn_out or attn.hook_z can be compared "
            "with a Lorsa"
        )
    return sae


SAE_CLASS_REGISTRY["lorsa"] = (LorsaSAE, LorsaSAEConfig)
