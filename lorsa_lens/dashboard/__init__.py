"""Heads as facts for cards, and a static site of all heads of a run."""

from typing import TYPE_CHECKING

from lorsa_lens.lazy import lazy

if TYPE_CHECKING:
    from lorsa_lens.dashboard.facts import read_heads
    from lorsa_lens.dashboard.gallery import Prompt, read_prompts
    from lorsa_lens.dashboard.playground import Edit, Fetch, Playground, Prediction
    from lorsa_lens.dashboard.server import bind, make_app, make_server
    from lorsa_lens.dashboard.site import write_site
    from lorsa_lens.dashboard.stored import stored_heads

_HOMES = {
    "Edit": "playground",
    "Fetch": "playground",
    "Playground": "playground",
    "Prediction": "playground",
    "Prompt": "gallery",
    "bind": "server",
    "make_app": "server",
    "make_server": "server",
    "read_heads": "facts",
    "read_prompts": "gallery",
    "stored_heads": "stored",
    "write_site": "site",
}

__all__ = [
    "Edit",
    "Fetch",
    "Playground",
    "Prediction",
    "Prompt",
    "bind",
    "make_app",
    "make_server",
    "read_heads",
    "read_prompts",
    "stored_heads",
    "write_site",
]

__getattr__, __dir__ = lazy(__name__, _HOMES)
