"""How the Lorsas of a run are laid out over its processes: `TrainingConfig.parallel`.

In every layout the language model reads each process's share of the contexts. What differs is where
the weights are, and which activations travel. A new layout is a subclass of `Layout`.
"""

from lorsa_lens.training.config import TrainingConfig
from lorsa_lens.training.parallel.heads import HeadsLayout
from lorsa_lens.training.parallel.layers import LayersLayout
from lorsa_lens.training.parallel.layout import Layout
from lorsa_lens.training.parallel.sharded import ShardedLayout
from lorsa_lens.training.ranks import Ranks

__all__ = ["Layout", "layout_of"]

_LAYOUTS = {
    "data": Layout,
    "sharded": ShardedLayout,
    "heads": HeadsLayout,
    "layers": LayersLayout,
}


def layout_of(cfg: TrainingConfig) -> Layout:
    """The layout that a configuration asks for; with one process they are all the same."""
    return Layout() if Ranks().n == 1 else _LAYOUTS[cfg.parallel]()
