"""Pages as headless Chromium shows them."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to render the page in: apt-get install chromium"
)
# a frame, since headless windows have a least width of their own; its script measures the page,
# which may run none
HARNESS = """<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<iframe src="{source}" width="{width}" height="{height}"></iframe><pre id="found"></pre>
<script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, style = e => event.target.contentWindow.getComputedStyle(e);
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    widest: style(page.querySelector("main")).maxWidth,
    titles: [...page.querySelectorAll("h1, h2")].map(e => e.innerText),
    flat: [...page.querySelectorAll("section, .card, h1")].filter(e => e.offsetHeight < 20).length,
    pictures: [...page.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
    sticking_out: [...page.querySelectorAll("h1, h2, p, dt, dd, .card")]
      .filter(e => e.getBoundingClientRect().right > {width} + 1).map(e => e.innerText.slice(0, 60)),
  }});
}};
</script>"""


def harness(page: Path, width: int, height: int) -> Path:
    file = page.parent / f"harness-{width}.html"
    file.write_text(HARNESS.format(source=page.name, width=width, height=height))
    return file


def chromium(file: Path, *arguments: str, profile: Path) -> str:
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--allow-file-access-from-files", "--virtual-time-budget=3000"),
        f"--user-data-dir={profile}",
        *arguments,
        file.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def measured(page: Path, width: int, profile: Path) -> dict:
    """What the browser says of the page in a window of `width` pixels."""
    dom = chromium(harness(page, width, 2000), "--dump-dom", profile=profile)
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    return json.loads(unescape(found[1]))


def screenshot(page: Path, width: int, height: int, profile: Path) -> Path:
    file = page.parent / f"shown-{width}.png"
    size = f"--window-size={max(width, 520)},{height}"
    chromium(harness(page, width, height), size, f"--screenshot={file}", profile=profile)
    return file
