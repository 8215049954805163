"""A small TopK SAE on what an attention layer returns: the baseline that a Lorsa stands beside."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.losses import energy_weights, squared_error
from lorsa_lens.training.schedules import lr_factor


class TopKSAE(nn.Module):
    """`f = TopK(relu((y - b_dec) W_enc + b_enc))`, `y' = f W_dec + b_dec` (arXiv 2406.04093, 2.3).

    Features are selected by `f ||W_dec||`, as the heads of a Lorsa are by what they write. It has
    what `lorsa_lens.analysis.match_features` needs, as the SAEs of SAELens have.

    Args:
        d_model: width of what it reads.
        n_features: how many features.
        k: how many of them stay per token.
        seed: for the decoder at the start; the encoder starts as its transpose.

    Raises:
        ValueError: if `k` is not within 1 to `n_features`.
    """

    def __init__(self, d_model: int, n_features: int, k: int, *, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= n_features:
            raise ValueError(f"k = {k} must be within 1 to n_features = {n_features}")
        generator = torch.Generator().manual_seed(seed)
        decoder = torch.randn(n_features, d_model, generator=generator)
        decoder = nn.functional.normalize(decoder, dim=1)
        self.k = k
        self.W_dec = nn.Parameter(decoder)
        self.W_enc = nn.Parameter(decoder.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, y: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token feature"]:
        """Activations of the features, 0 for all but `k` of each token."""
        acts = ((y - self.b_dec) @ self.W_enc + self.b_enc).relu()
        kept = (acts * self.W_dec.detach().norm(dim=1)).topk(self.k, dim=-1).indices
        return torch.zeros_like(acts).scatter(-1, kept, acts.gather(-1, kept))

    def decode(self, acts: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token d_model"]:
        """What the features write."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, y: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token d_model"]:
        """The reconstruction."""
        return self.decode(self.encode(y))


def train_sae(
    outputs: Float[Tensor, "batch pos d_model"],
    *,
    n_features: int,
    k: int,
    n_steps: int,
    batch_size: int = 32,
    seed: int = 0,
) -> TopKSAE:
    """Train an SAE with the loss, the optimizer and the schedule that Lorsas are trained with.

    Args:
        outputs: what the layer returned, for example `record_attention(model, tokens, [0])[0].out`.
        n_features: how many features.
        k: how many of them stay per token.
        n_steps: optimizer steps.
        batch_size: sequences of a step.
        seed: for the start and the order of the sequences.

    Returns:
        An SAE of outputs as they are: the scale of training is folded into its weights.
    """
    tokens_per_step = batch_size * outputs.shape[1]
    cfg = TrainingConfig(
        context_size=outputs.shape[1],
        train_batch_size_tokens=tokens_per_step,
        training_tokens=n_steps * tokens_per_step,
    )
    scale = (outputs - outputs.mean((0, 1))).square().sum(-1).mean().rsqrt()
    sae = TopKSAE(outputs.shape[-1], n_features, k, seed=seed)
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=cfg.lr, betas=betas)
    generator = torch.Generator().manual_seed(seed)
    counted = torch.ones(batch_size, outputs.shape[1], dtype=torch.bool)
    for step in range(n_steps):
        rows = torch.randint(outputs.shape[0], (batch_size,), generator=generator)
        target = outputs[rows] * scale
        loss = squared_error(sae(target), target, counted, energy_weights(target, sae.b_dec))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(sae.parameters(), cfg.max_grad_norm or torch.inf)
        optimizer.param_groups[0]["lr"] = cfg.lr * lr_factor(cfg, step)
        optimizer.step()
    with torch.no_grad():
        sae.W_enc.mul_(scale)
        sae.W_dec.div_(scale)
        sae.b_dec.div_(scale)
    return sae
