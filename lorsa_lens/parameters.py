"""What a Lorsa is made of: parameters and hook points."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.config import LorsaConfig
from lorsa_lens.hook_points import HookedRootModule, HookPoint, fire, is_hooked


class LorsaParameters(HookedRootModule):
    """Parameters, named and shaped as in TransformerLens, and hook points that can be muted."""

    W_Q: Float[nn.Parameter, "n_qk_heads d_model d_qk_head"]
    W_K: Float[nn.Parameter, "n_qk_heads d_model d_qk_head"]
    W_V: Float[nn.Parameter, "n_ov_heads d_model"]
    W_O: Float[nn.Parameter, "n_ov_heads d_model"]
    b_Q: Float[nn.Parameter, "n_qk_heads d_qk_head"]
    b_K: Float[nn.Parameter, "n_qk_heads d_qk_head"]
    b_V: Float[nn.Parameter, " n_ov_heads"]
    b_O: Float[nn.Parameter, " d_model"]
    q_norm: Float[nn.Parameter, "n_qk_heads d_qk_head"]
    k_norm: Float[nn.Parameter, "n_qk_heads d_qk_head"]
    log_threshold: Float[nn.Parameter, " n_ov_heads"]
    threshold: Float[Tensor, ""]

    def __init__(self, cfg: LorsaConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        dtype = getattr(torch, cfg.dtype)

        def parameter(*shape: int, std: float = 0.0, mean: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(mean, std))

        qk_shape, std = (cfg.n_qk_heads, cfg.d_qk_head), cfg.d_model**-0.5
        self.W_Q = parameter(cfg.n_qk_heads, cfg.d_model, cfg.d_qk_head, std=std)
        self.W_K = parameter(cfg.n_qk_heads, cfg.d_model, cfg.d_qk_head, std=std)
        self.W_V = parameter(cfg.n_ov_heads, cfg.d_model, std=std)
        self.W_O = parameter(cfg.n_ov_heads, cfg.d_model, std=std)
        self.b_Q, self.b_K = parameter(*qk_shape), parameter(*qk_shape)
        self.b_V, self.b_O = parameter(cfg.n_ov_heads), parameter(cfg.d_model)
        if cfg.qk_norm is not None:
            self.q_norm, self.k_norm = (
                parameter(*qk_shape, mean=1.0),
                parameter(*qk_shape, mean=1.0),
            )
        if cfg.act_fn == "jumprelu":
            log_threshold = torch.tensor(cfg.jumprelu_init_threshold).log().item()
            self.log_threshold = parameter(cfg.n_ov_heads, mean=log_threshold)
        if cfg.act_fn == "batchtopk":
            # 0 until the first training batch has set it: then each token keeps its own top k.
            self.register_buffer("threshold", torch.zeros((), device=device, dtype=dtype))

        self.hook_q, self.hook_k = HookPoint(), HookPoint()
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_values = HookPoint()
        self.hook_acts_pre, self.hook_acts_post = HookPoint(), HookPoint()
        self.hook_recons = HookPoint()
        self._muted = False
        self.setup()
        self.eval()

    @contextmanager
    def hooks_muted(self) -> Iterator[None]:
        """Within, hook points are passed by: the clean pass beside one with interventions."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def has_hooks(self) -> bool:
        """Whether any of the Lorsa's hook points has a hook."""
        return any(is_hooked(hook_point) for hook_point in self.hook_dict.values())

    def _fire(self, hook_point: HookPoint, tensor: Tensor) -> Tensor:
        return tensor if self._muted else fire(hook_point, tensor)

    def _watched(self, hook_point: HookPoint) -> bool:
        return not self._muted and is_hooked(hook_point)

    def _check_input(self, name: str, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[-1] != self.cfg.d_model:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: a Lorsa of d_model = {self.cfg.d_model} "
                f"reads [batch, pos, {self.cfg.d_model}]"
            )

    @staticmethod
    def _check_heads(heads: Sequence[int], n_heads: int) -> None:
        for head in heads:
            if not 0 <= head < n_heads:
                raise ValueError(f"head {head} is out of range: there are {n_heads}, from 0")
