"""Make the pictures of the README: train, write the pages, and photograph them in Chromium.

    python docs/screenshots.py [--out docs]

On the induction model that comes with the package, in less than two minutes on two cores. Needs
the extra `dev`, and Debian's packages chromium and chromium-driver.
"""

import argparse
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorsa_lens.analysis.strings import Vocabulary
from lorsa_lens.dashboard import read_heads, read_prompts, write_site
from lorsa_lens.demo.story import Finding, Story, tell
from lorsa_lens.demo.subjects import from_testbed
from lorsa_lens.views import HeadFacts, save, z_pattern_view

SCALE = 1.5
"""Pixels of a picture for one of the window."""

N_TOKENS, N_HEADS = 24, 6
"""Of the picture of z patterns."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1",
)


def main() -> None:
    """Train, write, photograph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps for each layer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    given = parser.parse_args()
    story = tell(from_testbed("induction"), n_steps=given.steps)
    with tempfile.TemporaryDirectory() as made, chromium() as browser:
        folder = Path(made)
        table, head, z_pattern = write_pages(story, folder)
        found = f"{table.as_uri()}#query=induction&sort=size&down=1"
        photograph(browser, found, given.out / "dashboard.png", 1290, 650)
        photograph(browser, head.as_uri(), given.out / "head.png", 880, 790)
        photograph(browser, z_pattern.as_uri(), given.out / "z_pattern.png", 880, 1200)


def write_pages(story: Story, folder: Path) -> tuple[Path, Path, Path]:
    """The table of all heads, the page of an induction head, and one of z patterns."""
    model, tokens = story.subject.model, story.subject.test_tokens
    vocabulary = Vocabulary(tuple(story.subject.str_tokens(torch.arange(model.cfg.d_vocab))))
    facts: list[HeadFacts] = []
    for lorsa in story.lorsas:
        every = range(lorsa.cfg.n_ov_heads)
        facts += read_heads(model, lorsa, tokens, every, vocabulary=vocabulary)
    lorsas = dict(enumerate(story.lorsas))
    prompts = read_prompts(model, lorsas, tokens[:4], vocabulary=vocabulary)
    title = "Lorsa heads of an induction model"
    table = write_site(folder / "site", facts, title=title, prompts=prompts)

    found = induction(story)
    record = story.records[found.layer].batch(slice(0, 1)).seen_by(lorsas[found.layer])
    with torch.no_grad():
        z_pattern = lorsas[found.layer].z_pattern(record.x, found.heads, **record.context)
    z_pattern = z_pattern[0, :, :N_TOKENS, :N_TOKENS]
    chosen = z_pattern.amax((1, 2)).topk(N_HEADS).indices.tolist()
    heads = [found.heads[place] for place in chosen]
    figure = z_pattern_view(
        z_pattern[chosen],
        story.subject.str_tokens(tokens[0, :N_TOKENS]),
        head_names=[f"L{found.layer}.{head}" for head in heads],
    )
    page = save(folder / "z_pattern.html", figure, title="Induction heads: which token each copies")
    return table, table.parent / "heads" / f"L{found.layer}.{heads[0]}.html", page


def induction(story: Story) -> Finding:
    """The induction heads that were found."""
    named = [finding for finding in story.findings if finding.relation == "induction"]
    return max(named, key=lambda finding: len(finding.heads))


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium without a network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        raise SystemExit(f"needs {' and '.join(missing)}: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    try:
        yield browser
    finally:
        browser.quit()


def photograph(browser: Any, page: str, path: Path, width: int, most: int) -> None:
    """Write the picture of a page: the whole of it, or its top."""
    from PIL import Image
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": most, "deviceScaleFactor": SCALE, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page)
    drawn = "return document.querySelector('.card > div:empty') === null"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(drawn))
    whole = browser.execute_script("return document.querySelector('main').scrollHeight")
    size["height"] = min(most, int(whole))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size // 1000} kB\n")


if __name__ == "__main__":
    main()
