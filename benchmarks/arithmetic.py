"""How fast a Lorsa could be: its floating point operations, and the speed of a GEMM."""

import time

import torch

from lorsa_lens import LorsaConfig


def flop(cfg: LorsaConfig, pos: int, batch: int, *, train: bool) -> float:
    """The fewest operations of exact maths: causal half of the attention, K-sparse decode.

    Training adds the gradients of the weights (none for the input), of the attention and of the
    decode; patterns are made once.
    """
    tokens, group = pos * batch, cfg.n_ov_heads // cfg.n_qk_heads
    qk_width = cfg.n_qk_heads * cfg.d_qk_head
    projection = 2 * tokens * cfg.d_model * (2 * qk_width + cfg.n_ov_heads)
    pairs = tokens * (pos + 1) / 2 * cfg.n_qk_heads
    scores, mixing = 2 * pairs * cfg.d_qk_head, 2 * pairs * group
    assert cfg.k is not None
    decode = 2 * tokens * cfg.k * cfg.d_model
    forward = projection + scores + mixing + decode
    if not train:
        return forward
    live = min(1.0, cfg.k / cfg.n_qk_heads)  # at most this share of rows has a gradient
    return forward + projection + live * (2 * scores + 2 * mixing) + 2 * decode


class Gemm:
    """A large matrix product, timed between the runs of everything else.

    Of `dtype` and of float32, whichever is faster: some processors only emulate bfloat16.
    """

    def __init__(self, dtype: torch.dtype, size: int = 1024) -> None:
        pair = torch.randn(2, size, size)
        self.pairs = [pair] if dtype == torch.float32 else [pair, pair.to(dtype)]
        self.flop = 2 * size**3

    def flop_per_s(self) -> float:
        """Of one product."""
        return max(self.flop / self._seconds(*pair) for pair in self.pairs)

    @staticmethod
    def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - start
