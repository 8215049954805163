"""Where things lie in a run's directory."""

from pathlib import Path

RUN_CONFIG_FILE = "run_config.json"
"""The whole run, as the command line began it: model and text, too."""

CONFIG_FILE = "training_config.json"
"""The training of it."""

CHECKPOINTS = "checkpoints"
LORSAS = "lorsas"


def saved_lorsas(folder: Path) -> dict[int, Path]:
    """By layer, the folders `blocks.N` in a folder of Lorsas; none before a run has ended."""
    found = {path.name.removeprefix("blocks."): path for path in folder.glob("blocks.*")}
    layers = sorted(int(layer) for layer in found if layer.isdigit())
    return {layer: found[str(layer)] for layer in layers}
