"""`esd-fast collect`: the samples of an erasure, as a file for `esd-fast train --samples`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esd_fast.files import check_target
from esd_fast.pages import keep_pages
from esd_fast.prompts import file_part, safe_name
from esd_fast.terminal import tell

from .console import Bars, quiet_libraries
from .launching import launched, placed
from .train import config_of

if TYPE_CHECKING:
    from esd_fast.parallel import Ranks


def collect(arguments: argparse.Namespace) -> int:
    """Exit code 0; nothing is written where it was stopped. Of several processes the first writes."""
    with launched() as ranks:
        return collect_in(ranks, arguments)


def collect_in(ranks: Ranks, arguments: argparse.Namespace) -> int:
    config = placed(config_of(arguments, processes=ranks.size), ranks, arguments.device)
    target = Path(
        arguments.output or f"samples-{safe_name(file_part(config.concepts))}.safetensors"
    )
    if target.suffix != ".safetensors":
        raise ValueError(f"--output is {str(target)!r}; it must be a file .safetensors")
    if ranks.first:
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
        model = load_model(arguments.model, config)
        stored = collecting.collect(model, config, ranks=ranks, on_progress=show)
    finally:
        bars.close()
    if not ranks.first:
        return 0
    stored.save(target)
    kept = f", {stored.preserved} of them of what is preserved" if stored.preserved else ""
    tell(
        f"{len(stored)} samples{kept}: {stored.unet_passes} UNet passes, {stored.seconds:.1f} s\n"
        f"  esd-fast train --samples {target} takes them"
    )
    return 0
