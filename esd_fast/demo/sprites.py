"""The hands' drawings: free icon sets fetched by package name and rendered once."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .world import OBJECTS, STYLES

# hand -> (npm package version, SPDX licence, credit)
ICON_SETS: dict[str, tuple[str, str, str]] = {
    "noto": ("1.2.9", "Apache-2.0", "Noto Emoji, Google Inc."),
    "noto-v1": ("1.2.5", "Apache-2.0", "Noto Emoji (v1), Google Inc."),
    "fluent-emoji-flat": ("1.2.6", "MIT", "Fluent UI Emoji, Microsoft Corporation"),
    "fluent-emoji-high-contrast": ("1.2.6", "MIT", "Fluent UI Emoji, Microsoft Corporation"),
    "twemoji": ("1.2.5", "CC-BY-4.0", "Twemoji, Twitter Inc. and other contributors"),
}
SPRITE_PIXELS = 96
MARGIN = 0.06  # of the picture's side, kept free on each edge


def fetch_icons(folder: Path) -> dict[str, dict]:
    """icons.json of every hand, through `npm pack` (already fetched packages are kept)."""
    folder.mkdir(parents=True, exist_ok=True)
    icons = {}
    for name, (version, _, _) in ICON_SETS.items():
        archive = folder / f"iconify-json-{name}-{version}.tgz"
        if not archive.exists():
            package = f"@iconify-json/{name}@{version}"
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True)
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None, f"{archive} holds no package/icons.json"
            icons[name] = json.load(member)
    return icons


def svg_of(icons: dict, name: str) -> str:
    """A whole SVG of one icon, aliases followed."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    pad = MARGIN * max(width, height)
    box = f"{-pad} {-pad} {width + 2 * pad} {height + 2 * pad}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'width="{SPRITE_PIXELS}" height="{SPRITE_PIXELS}"'
    body = icon["body"].replace("currentColor", "#111")
    return f'{head} {size} viewBox="{box}">{body}</svg>'


def render(icons: dict, name: str) -> np.ndarray:
    """(SPRITE_PIXELS, SPRITE_PIXELS, 4) uint8, straight alpha."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg_of(icons, name)))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def sprites(folder: Path) -> np.ndarray:
    """(objects, styles, P, P, 4) uint8, in the order of world.OBJECTS and world.STYLES."""
    cached = folder / "sprites.npy"
    if not cached.exists():
        icons = fetch_icons(folder)
        drawn = [
            [render(icons[hand], icon) for hand in STYLES.values()]
            for icon, _ in tqdm(OBJECTS.values(), desc="sprites", unit="object")
        ]
        np.save(cached, np.array(drawn))
    return np.load(cached)


def strangers(folder: Path, count: int = 240) -> np.ndarray:
    """(count, styles, P, P, 4): objects outside the world, for the judge's "none of these"."""
    cached = folder / "strangers.npy"
    if not cached.exists():
        icons = fetch_icons(folder)
        known = {icon for icon, _ in OBJECTS.values()}
        common = set.intersection(*(set(i["icons"]) for i in icons.values())) - known
        # one concept's other drawings ("cat" beside "cat-face") would teach the judge to deny it
        stems = {part for icon in known for part in icon.split("-")} - {"face", "red", "without"}
        free = sorted(n for n in common if not stems & set(n.replace("-", " ").split()))
        picked = free[:: max(1, len(free) // count)][:count]
        drawn = [
            [render(icons[hand], icon) for hand in STYLES.values()]
            for icon in tqdm(picked, desc="strangers", unit="object")
        ]
        np.save(cached, np.array(drawn))
    return np.load(cached)
