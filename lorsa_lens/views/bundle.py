"""The JavaScript of circuitsvis, read from the installed package."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)


@cache
def bundle() -> str:
    r"""Return the bundle that defines the global `CircuitsVis`, fit to stand in a script element.

    ``</script`` inside its strings is written ``<\/script``, and the comment that makes a browser
    look for a source map beside the page is left out. The package is located, not imported.

    Raises:
        FileNotFoundError: If the installed circuitsvis has no bundle.
    """
    spec = find_spec("circuitsvis")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder) / "dist" / "cdn" / "iife.js"
        if path.is_file():
            text = _SOURCE_MAP.sub("", path.read_text(encoding="utf-8"))
            return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE).strip()
    raise FileNotFoundError(
        "the figures need the file dist/cdn/iife.js of the package circuitsvis, which is not "
        "installed or incomplete; run: pip install 'circuitsvis>=1.43.3'"
    )
