"""`esd-fast collect`: the samples of an erasure, as a file for `esd-fast train --samples`."""

from __future__ import annotations

import argparse
from pathlib import Path

from esd_fast.files import check_target
from esd_fast.pages import keep_pages
from esd_fast.prompts import file_part, safe_name
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .train import config_of


def collect(arguments: argparse.Namespace) -> int:
    """Exit code 0; nothing is written where it was stopped."""
    config = config_of(arguments)
    target = Path(
        arguments.output or f"samples-{safe_name(file_part(config.concepts))}.safetensors"
    )
    if target.suffix != ".safetensors":
        raise ValueError(f"--output is {str(target)!r}; it must be a file .safetensors")
    check_target(target, arguments.overwrite)
    keep_pages()
    quiet_libraries()
    from esd_fast import collecting
    from esd_fast.esd import Progress
    from esd_fast.models import load_model

    bars = Bars()

    def show(progress: Progress) -> None:
        bars.show(progress.phase, progress.done, progress.total)

    try:
        stored = collecting.collect(load_model(arguments.model, config), config, on_progress=show)
    finally:
        bars.close()
    stored.save(target)
    kept = f", {stored.preserved} of them of what is preserved" if stored.preserved else ""
    tell(
        f"{len(stored)} samples{kept}: {stored.unet_passes} UNet passes, {stored.seconds:.1f} s\n"
        f"  esd-fast train --samples {target} takes them"
    )
    return 0
