"""A training run as one file: which model, which text, which layers, and how."""

from dataclasses import dataclass

from lorsa_lens.config import Dtype
from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.validation import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainingConfig):
    """A `TrainingConfig`, and what it is applied to."""

    MAY_BE_ZERO = TrainingConfig.MAY_BE_ZERO | {"layers"}

    model: str
    """A folder with a Hugging Face model and its tokenizer, or an id on the hub."""

    tokens: str | None = None
    """Text or token ids: a .txt, .jsonl, .npy or .bin file, or the name of a dataset. May be left
    out with `cached_activations_path`."""

    layers: tuple[int, ...] | None = None
    """Layers to train on. None: all."""

    output_path: str = "runs/lorsa"
    """The run's directory: configuration, metrics, checkpoints, final Lorsas."""

    device: str = "cpu"
    """Where the model and the Lorsas are."""

    model_dtype: Dtype = "float32"
    """Precision of the model's weights. Lorsas are trained in float32 at least."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        super().__post_init__()
        if self.tokens is None and self.cached_activations_path is None:
            raise ConfigError("tokens = None and cached_activations_path = None: give one of them")

    def training(self) -> TrainingConfig:
        """The part that is not about the model and the text."""
        own = {"model", "tokens", "layers", "device", "model_dtype"}
        values = {name: value for name, value in self.to_dict().items() if name not in own}
        return TrainingConfig.from_dict(values)
