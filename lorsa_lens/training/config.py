"""How Lorsas are trained, as data: every field documented and validated; JSON or YAML."""

from dataclasses import dataclass
from typing import Literal

from lorsa_lens.config import ActFn, OutputSite
from lorsa_lens.validation import Config, ConfigError

LRScheduler = Literal["constant", "linear", "cosine"]
Objective = Literal["reconstruction", "kl", "cross_entropy"]
TrainingInit = Literal["tied", "svd", "random"]
TokenWeights = Literal["uniform", "energy"]
Parallel = Literal["data", "sharded", "heads", "layers"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Everything about a training run but the model and the text. Names follow SAELens.

    Raises:
        ConfigError: at construction, naming the field, the value and the remedy.
    """

    MAY_BE_ZERO = frozenset({
        "lr_warm_up_fraction", "lr_decay_fraction", "adam_beta1", "adam_beta2",
        "k_anneal_fraction", "l1_coefficient", "l0_coefficient", "aux_coefficient", "seed",
        "checkpoint_every", "prefetch_batches", "balance_rate", "resample_every",
    })  # fmt: skip

    # ------------------------------------------------------------------------------- the Lorsas

    n_ov_heads: int | None = None
    """Rank-1 heads of each Lorsa. None: 8 times d_model, rounded to a multiple of `n_qk_heads`."""

    n_qk_heads: int | None = None
    """Query-key circuits of each Lorsa. None: one for each attention head of the layer."""

    k: int | None = None
    """Heads that stay per token. None: d_model / 12, at least 4 (`relu`, `jumprelu`: no limit)."""

    act_fn: ActFn = "topk_relu"
    """How heads are selected: see `LorsaConfig.act_fn`."""

    init: TrainingInit = "tied"
    """How the rank-1 heads start: see `lorsa_lens.lift`."""

    fit_initial_gain: bool = True
    """Before the first step, multiply all activations by the one number that fits the first batch
    best: a fresh Lorsa of a few heads writes much less than the layer."""

    output_site: OutputSite = "attn_out"
    """What the Lorsas replace: see `LorsaConfig.output_site`."""

    start_from: str | None = None
    """A folder that holds a Lorsa for each layer in `blocks.N`, as `lorsas` of a run, to train
    further. They are what they are: the fields above do not matter then."""

    # ------------------------------------------------------------------------------- the text

    training_tokens: int = 2_000_000
    """Tokens to train on; the text is gone through again if it is shorter."""

    context_size: int = 128
    """Tokens of a context. Lorsas need whole contexts."""

    train_batch_size_tokens: int = 4096
    """Tokens of one optimizer step: a whole number of contexts."""

    gradient_accumulation_steps: int = 1
    """Parts in which a batch goes through the model, to save memory."""

    prepend_bos: bool = True
    """Begin each context with the tokenizer's BOS, if it has one."""

    exclude_special_tokens: bool = True
    """Leave BOS, EOS and padding out of the loss; they stay visible to attention."""

    prefetch_batches: int = 2
    """Batches that the language model prepares ahead, in a thread. 0: none."""

    cached_activations_path: str | None = None
    """Train on a folder that `lorsa-lens cache-activations` wrote, and do not run the language
    model. BOS and the tokens that count are those of the cache."""

    # ------------------------------------------------------------------------------- optimization

    objective: Objective = "reconstruction"
    """What is minimized: `reconstruction`, the squared error of each layer's output by itself; or,
    with all Lorsas in place, `kl`, the divergence of the predictions from those of the model as it
    is, or `cross_entropy`, that of the text. The last two are for Lorsas that are trained already,
    at a tenth of `lr` or less."""

    lr: float = 3e-3
    """Highest learning rate of Adam."""

    lr_scheduler: LRScheduler = "linear"
    """Shape of the final decay to 0."""

    lr_warm_up_fraction: float = 0.05
    """Share of the steps over which the learning rate rises to `lr`."""

    lr_decay_fraction: float = 0.4
    """Share of the steps over which it falls to 0 at the end."""

    adam_beta1: float = 0.9
    """Decay of Adam's mean of gradients."""

    adam_beta2: float = 0.99
    """Decay of Adam's mean of squared gradients."""

    max_grad_norm: float | None = 1.0
    """Gradients of a Lorsa are scaled down to this norm. None: never."""

    k_start: int | None = None
    """Heads that stay at the first step, falling linearly to `k`. None: `k` throughout."""

    k_anneal_fraction: float = 0.0
    """Share of the steps over which `k_start` falls to `k`."""

    token_weights: TokenWeights = "energy"
    """How tokens count in the loss: `uniform`, or `energy`, less where the layer writes much (an
    attention sink): in inverse proportion to `|y - b_O|^2` plus a twentieth of its mean."""

    balance_rate: float = 0.05
    """How fast seldom selected heads gain an advantage in the selection of the first 60% of the
    run: see `lorsa_lens.training.balancing`. 0: none."""

    l1_coefficient: float = 0.0
    """Weight of the mean of `sum_i |z^i| ||w_O^i||` in the loss (`relu`)."""

    l0_coefficient: float = 0.0
    """Weight of the mean number of heads that stay in the loss (`jumprelu`)."""

    aux_coefficient: float = 0.0
    """Weight of the auxiliary loss: what dead heads explain of the error (arXiv 2406.04093)."""

    aux_k: int | None = None
    """Dead heads in the auxiliary loss, per token. None: half of d_model, at most all dead ones."""

    resample_every: int = 0
    """Steps after which a few dead heads start again at badly explained tokens, as long as the
    learning rate does not fall: see `lorsa_lens.training.resampling`. 0: never."""

    dead_feature_window: int = 100_000
    """A head that stayed at none of so many counted tokens is dead."""

    autocast: bool = False
    """Run Lorsas in bfloat16 with float32 weights and float32 selection. A processor that would
    only emulate bfloat16 computes in float32, which is faster there."""

    compile: bool = False
    """Compile the Lorsas with `torch.compile`."""

    seed: int = 0
    """For initialisation and the order of the text."""

    parallel: Parallel = "data"
    """What several processes divide besides the text: nothing (`data`: each has whole Lorsas),
    weights, gradients and optimizer state (`sharded`: FSDP2), the heads of every Lorsa (`heads`),
    or the layers (`layers`). One process: no difference. See docs/scaling.md."""

    # ------------------------------------------------------------------------------- the run

    output_path: str | None = None
    """The run's directory: configuration, metrics, checkpoints, final Lorsas. None: nothing is
    written, and a run that is stopped is lost."""

    checkpoint_every: int = 500
    """Steps between checkpoints. 0: none but the last."""

    n_checkpoints_kept: int = 2
    """The newest checkpoints that are kept; the best one is kept besides."""

    log_every: int = 10
    """Steps between lines of `metrics.jsonl`."""

    wandb_project: str | None = None
    """Also log to this Weights & Biases project (`pip install 'lorsa-lens[wandb]'`)."""

    tensorboard: bool = False
    """Also log to TensorBoard (`pip install 'lorsa-lens[tensorboard]'`)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be below 1")
        if self.train_batch_size_tokens % self.context_size:
            whole = self.train_batch_size_tokens // self.context_size * self.context_size
            raise ConfigError(
                f"train_batch_size_tokens = {self.train_batch_size_tokens} must be a multiple of "
                f"context_size = {self.context_size}: for example {whole or self.context_size}"
            )
        n_contexts = self.train_batch_size_tokens // self.context_size
        if n_contexts % self.gradient_accumulation_steps:
            raise ConfigError(
                f"gradient_accumulation_steps = {self.gradient_accumulation_steps} must divide the "
                f"{n_contexts} contexts of a batch"
            )
        if self.lr_warm_up_fraction + self.lr_decay_fraction > 1:
            raise ConfigError(
                f"lr_warm_up_fraction = {self.lr_warm_up_fraction} and lr_decay_fraction = "
                f"{self.lr_decay_fraction} must not exceed 1 together"
            )
        if (self.k_start is None) != (self.k_anneal_fraction == 0):
            raise ConfigError("k_start and k_anneal_fraction go together: give both or neither")
        if self.parallel != "data" and self.objective != "reconstruction":
            raise ConfigError(
                f"objective = {self.objective!r} trains all Lorsas at once in the whole model: "
                f"give parallel = 'data', not {self.parallel!r}"
            )
        if self.parallel in ("sharded", "heads"):
            for name in ("compile", "resample_every"):
                if value := getattr(self, name):
                    raise ConfigError(
                        f"{name} = {value} needs whole Lorsas, but parallel = {self.parallel!r} "
                        "divides them: give parallel = 'data' or 'layers'"
                    )

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the run."""
        return max(1, self.training_tokens // self.train_batch_size_tokens)

    @property
    def batch_size(self) -> int:
        """Contexts of one optimizer step."""
        return self.train_batch_size_tokens // self.context_size
