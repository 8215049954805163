"""One thread, one seed, and shapes checked against their jaxtyping annotations."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

try:
    import beartype  # noqa: F401
except ImportError:  # the environments of the test matrix do without
    pass
else:
    from jaxtyping import install_import_hook

    install_import_hook("lorsa_lens", "beartype.beartype")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets():
    """Real models and texts beside the repository; tests that want them skip where they are not."""
    folder = Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip("the real assets are not beside the repository")
    return folder
