"""The Lorsa module: which heads stay, and what they write."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lorsa_lens.attention import LorsaAttention, LorsaState
from lorsa_lens.functional import selection
from lorsa_lens.functional.code import (
    Code,
    compact,
    decode,
    decode_dense,
    keep_all,
    to_dense,
)
from lorsa_lens.functional.precision import native_products

if TYPE_CHECKING:
    from lorsa_lens.lift import Init

THRESHOLD_MOMENTUM = 0.99
"""`batchtopk`: how much of the inference threshold survives a training batch."""


class LorsaOutput(NamedTuple):
    """All that a forward pass computes."""

    recons: Float[Tensor, "batch pos d_model"]
    """What the Lorsa writes."""

    code: Code
    """Which heads stay, and with what activation."""

    acts_pre: Float[Tensor, "batch pos n_ov_heads"]
    """Activations before selection."""


class Lorsa(LorsaAttention):
    """Low-Rank Sparse Attention: an overcomplete, sparse stand-in for an attention layer.

    With `h(i) = i // cfg.group_size` the query-key circuit of rank-1 head i (arXiv 2504.20938,
    section 3):

        q = rot(norm(x W_Q + b_Q)),  k = rot(norm(x W_K + b_K))
        A = softmax(mask(cap(q k^T / attn_scale + bias)))
        v^i = x w_V^i + b_V^i
        z_pre^i[q] = sum_k A^h(i)[q, k] v^i[k]
        z = select(z_pre)
        out = sum_i z^i w_O^i + b_O

    Codes, scores and patterns are dense tensors only while one of their hook points has a hook:
    `hook_attn_scores` and `hook_pattern` [batch, n_qk_heads, query, key], `hook_acts_post`
    [batch, pos, n_ov_heads]. The others always fire: `hook_q`, `hook_k`, `hook_rot_q`,
    `hook_rot_k` [batch, pos, n_qk_heads, d_qk_head], `hook_values`, `hook_acts_pre`
    [batch, pos, n_ov_heads], `hook_recons` [batch, pos, d_model]. An edit at any of them takes
    effect. As on any TransformerLens model, `run_with_cache`, `run_with_hooks` and `hooks` work.

    Args:
        cfg: what to build.
        device: where the parameters live.

    Example:
        >>> cfg = LorsaConfig(d_model=64, n_qk_heads=4, d_qk_head=16, n_ov_heads=256, k=8)
        >>> lorsa = Lorsa(cfg)
        >>> code = lorsa.encode(torch.randn(1, 10, 64))
        >>> code.values.shape, code.indices.shape
        (torch.Size([1, 10, 8]), torch.Size([1, 10, 8]))
    """

    # ------------------------------------------------------------------------------- the passes

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        *,
        qk_input: Float[Tensor, "batch pos d_model"] | None = None,
        positions: Int[Tensor, "#batch pos"] | None = None,
        keep: Bool[Tensor, "batch #pos key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the Lorsa writes at each position.

        Args:
            x: what the attention layer receives.
            qk_input: what queries and keys read, where that differs (shortformer). None: `x`.
            positions: position of each token, for rotary embeddings. None: 0, 1, 2, ...
            keep: keys that may be seen (padding is not), for each query or for all alike.

        Raises:
            ValueError: if `x` is no [batch, pos, d_model] tensor.
        """
        with native_products(self.W_O.device):
            acts = self._select(
                self._pre_activations(x, qk_input=qk_input, positions=positions, keep=keep)
            )
            return self._written(acts)

    def step(
        self,
        x: Float[Tensor, "batch pos d_model"],
        *,
        qk_input: Float[Tensor, "batch pos d_model"] | None = None,
        positions: Int[Tensor, "#batch pos"] | None = None,
        keep: Bool[Tensor, "batch #pos key"] | None = None,
        past: LorsaState | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], LorsaState]:
        """`forward` for the tokens after those in `past`, and the state including them.

        Args:
            x: as in `forward`, for the new tokens only.
            qk_input: as in `forward`.
            positions: as in `forward`. None: counted on from `past`.
            keep: as in `forward`; its keys are those of `past`, then the new ones.
            past: the state that the step before returned.
        """
        with native_products(self.W_O.device):
            q, k, v, mask = self._project(x, qk_input, positions, keep, past)
            out = self._written(self._select(self._attended(q, k, v, mask)))
            return out, LorsaState(k, rearrange(v, "b k h g -> b k (h g)"))

    def outputs(
        self,
        x: Float[Tensor, "batch pos d_model"],
        *,
        score_factors: Float[Tensor, " n_ov_heads"] | None = None,
        **context: Any,
    ) -> LorsaOutput:
        """`forward` with everything it computes on the way, as training needs it.

        Hooks on `hook_acts_post` and `hook_recons` do not fire.

        Args:
            x: as in `forward`.
            score_factors: what the scores of the heads are multiplied by in the selection of
                `topk`, `topk_relu` and `batchtopk`. None: they are left alone.
            **context: `qk_input`, `positions`, `keep`, as in `forward`.
        """
        with native_products(self.W_O.device):
            acts_pre = self._pre_activations(x, **context)
            code = self.select(acts_pre, score_factors)
            return LorsaOutput(self.decode(code), code, acts_pre)

    def encode(self, x: Float[Tensor, "batch pos d_model"], **context: Any) -> Code:
        """Which heads stay at each position, and with what activation.

        Args:
            x: as in `forward`.
            **context: `qk_input`, `positions`, `keep`, as in `forward`.
        """
        with native_products(self.W_O.device):
            acts = self._select(self._pre_activations(x, **context))
        return acts if isinstance(acts, Code) else compact(acts, acts != 0)

    def decode(self, code: Code) -> Float[Tensor, "batch pos d_model"]:
        """`sum_i z^i w_O^i + b_O` over the heads of a code."""
        return self.over_heads(decode(code, self.W_O)) + self.b_O

    # ------------------------------------------------------------------------------- the parts

    def _select(self, acts_pre: Tensor) -> Code | Tensor:
        """The activations that stay: a code, or a dense tensor if they are looked at."""
        code = self.select(acts_pre)
        if not self._watched(self.hook_acts_post):
            return code
        return self._fire(self.hook_acts_post, to_dense(code, self.cfg.n_ov_heads))

    def _written(self, acts: Code | Tensor) -> Tensor:
        """What the heads that stay write, with the bias."""
        if isinstance(acts, Code):
            recons = decode(acts, self.W_O)
        else:
            recons = decode_dense(acts, self.W_O)
        return self._fire(self.hook_recons, self.over_heads(recons) + self.b_O)

    def select(
        self,
        acts_pre: Float[Tensor, "batch pos n_ov_heads"],
        score_factors: Float[Tensor, " n_ov_heads"] | None = None,
    ) -> Code:
        """Which heads stay, given all activations.

        Args:
            acts_pre: activations before selection.
            score_factors: as in `outputs`.
        """
        cfg = self.cfg
        acts_pre = acts_pre.to(self.W_O.dtype)  # under autocast, heads are chosen in float32
        if cfg.act_fn == "relu":
            return selection.select_positive(acts_pre)
        if cfg.k is None and cfg.act_fn == "topk":
            return keep_all(acts_pre)
        if cfg.k is None and cfg.act_fn == "topk_relu":
            return keep_all(acts_pre.relu())
        norms = selection.writing_norms(self.W_O)
        if cfg.act_fn == "jumprelu":
            thresholds = self.log_threshold.exp()
            return selection.select_jumprelu(acts_pre, norms, thresholds, cfg.jumprelu_bandwidth)
        assert cfg.k is not None  # the configuration has checked it
        norms = norms if score_factors is None else norms * score_factors
        if cfg.act_fn == "batchtopk":
            if self.training and torch.is_grad_enabled():
                threshold = self.batch_threshold(acts_pre, norms, cfg.k)
                self._learn_threshold(threshold)
                return selection.select_above(acts_pre, norms, threshold)
            if self.threshold > 0:
                return selection.select_above(acts_pre, norms, self.threshold)
        return self.top(acts_pre, norms, cfg.k, positive=cfg.act_fn == "topk_relu")

    @torch.no_grad()
    def _learn_threshold(self, threshold: Tensor) -> None:
        if self.threshold > 0:
            threshold = self.threshold.lerp(threshold, 1 - THRESHOLD_MOMENTUM)
        self.threshold.copy_(threshold)

    # ----------------------------------------------- what concerns all heads, wherever they are

    def top(
        self,
        acts: Float[Tensor, "batch pos ov_head"],
        norms: Float[Tensor, " ov_head"],
        k: int,
        *,
        positive: bool = False,
    ) -> Code:
        """The `k` heads of each token that write most: see `selection.select_topk`."""
        return selection.select_topk(acts, norms, k, positive=positive)

    def batch_threshold(
        self, acts: Float[Tensor, "batch pos ov_head"], norms: Float[Tensor, " ov_head"], k: int
    ) -> Float[Tensor, ""]:
        """The score from which on heads of a batch stay: see `selection.batch_threshold`."""
        return selection.batch_threshold(acts, norms, k)

    def over_heads(self, part: Tensor) -> Tensor:
        """The sum over all heads, given that over the heads that are here: all of them."""
        return part

    # ------------------------------------------------------------------------- made from and saved

    @classmethod
    def from_attention(
        cls,
        model: nn.Module,
        layer: int,
        *,
        init: "Init | None" = None,
        seed: int = 0,
        **changes: Any,
    ) -> "Lorsa":
        """A Lorsa made from an attention layer: equal to it, or the start of training.

        Args:
            model: a HookedTransformer or a TransformerBridge.
            layer: which layer.
            init: `exact` (the layer itself), `tied`, `svd` or `random`: see `lorsa_lens.lift`.
                None: `exact` if `n_qk_heads` and `n_ov_heads` are the layer's own, else `tied`.
            seed: for what is drawn at random.
            **changes: fields of the configuration to set otherwise, as `n_ov_heads=4096, k=64`.
        """
        from lorsa_lens.lift import lift

        return lift(model, layer, init=init, seed=seed, **changes)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        **hub_options: Any,
    ) -> "Lorsa":
        """Load a Lorsa that `save_pretrained` wrote, or a published one.

        The layout is recognised: ours, Llamascopium's (lm-saes), or that of the paper's repository.

        Args:
            path: a folder, or an id on the Hugging Face hub: `user/repo`, `user/repo/subfolder` or
                `user/repo:subfolder`.
            device: where it goes.
            dtype: precision to convert to. None: as saved.
            revision: branch, tag or commit on the hub.
            **hub_options: `subfolder`, `cache_dir`, `token`, `force_download` and
                `local_files_only`, as everywhere on the hub.

        Raises:
            FileNotFoundError: if there is none, here or on the hub.
            LoadError: if the files are damaged, or mean something that a Lorsa cannot do.
        """
        from lorsa_lens.io.pretrained import load_pretrained

        return load_pretrained(path, device=device, dtype=dtype, revision=revision, **hub_options)

    def save_pretrained(self, path: str | Path) -> Path:
        """Write `config.json` and `lorsa.safetensors` to a folder, each atomically.

        Returns:
            The folder.
        """
        from lorsa_lens.io.pretrained import save_pretrained

        return save_pretrained(self, path)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload it to the Hugging Face hub, in a folder named by what it replaces.

        Args:
            repo_id: `user/repo`; it is made if it is not there.
            **options: as in `lorsa_lens.io.push.push_to_hub`.

        Returns:
            The address of the commit.
        """
        from lorsa_lens.io.push import push_to_hub

        return push_to_hub(self, repo_id, **options)
