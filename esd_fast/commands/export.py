"""`esd-fast export`, `apply` and `diff`: results elsewhere, and what differs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from esd_fast.terminal import tell

from .console import quiet_libraries


def export(arguments: argparse.Namespace) -> int:
    return write(arguments, arguments.format)


def apply(arguments: argparse.Namespace) -> int:
    """Base and erasures in the base's own form: a file of a file, a folder of all else."""
    file = arguments.model is not None and Path(arguments.model).is_file()
    return write(arguments, "single-file" if file else "diffusers")


def write(arguments: argparse.Namespace, format: str) -> int:
    from esd_fast.export import checked_target, export

    checked_target(arguments.output, format, arguments.overwrite)
    quiet_libraries()
    from esd_fast.erasure import load

    erasures = [load(path, arguments.allow_pickle) for path in arguments.erasures]
    of_lora = {n: getattr(arguments, n, None) for n in ("rank", "energy", "dtype")}
    done = export(
        erasures,
        arguments.output,
        format,
        model=arguments.model,
        strength=arguments.strength,
        overwrite=arguments.overwrite,
        allow_pickle=arguments.allow_pickle,
        allow_other_base=arguments.allow_other_base,
        model_config=arguments.model_config,
        **{name: value for name, value in of_lora.items() if value is not None},
    )
    for note in done.notes:
        tell(f"note: {note}", sys.stderr)
    tell(f"{done.path}: {done.lora}" if done.lora else str(done.path))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Exit code 0 where nothing differs, 1 where something does, as `diff` has it."""
    quiet_libraries()
    from esd_fast.export.compare import as_json, as_text, compare

    found = compare(arguments.a, arguments.b, arguments.allow_pickle)
    tell(json.dumps(as_json(found), indent=1) if arguments.json else as_text(found))
    return 0 if found.same else 1
