"""`esd-fast train --manifest`: what the options of a run that is done again are, and come to."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esd_fast.config import EraseConfig, refuse
from esd_fast.repeating import Recorded, mapping, recorded
from esd_fast.terminal import tell

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure
    from esd_fast.models import Model


@dataclass
class Repeated:
    """`over`: settings that the command line has others of."""

    run: Recorded
    config: EraseConfig
    threads: int | None
    other_base: bool
    over: dict[str, Any] = field(default_factory=dict)

    def with_given(self, given: Mapping[str, Any]) -> EraseConfig:
        """The run's settings, but for those that are not None in `given`; says which differ, and
        which versions do."""
        said = {name: value for name, value in given.items() if value is not None}
        config = dataclasses.replace(self.config, **said)
        for name in said.keys() - {"allow_pickle"}:  # what may be read is no setting of the run
            if getattr(config, name) != getattr(self.config, name):
                self.over[name] = getattr(config, name)
        over = ", ".join(f"{name} {value!r}" for name, value in self.over.items())
        say(f"over {self.run.file}: {over}" if over else "")
        versions = self.run.other_versions()
        say(f"made with other versions: {versions}" if versions else "")
        return config

    def note_processes(self, number: int) -> None:
        was = self.run.processes
        if was != number:
            say(f"made by {was} processes, now {number}: the same batches, rounded otherwise")

    def same_threads(self) -> None:
        """As the run had: torch's sums depend on their number."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def check_base(self, model: Model) -> None:
        if not self.other_base:
            say(self.run.check_base(model, self.over))

    def tell_outcome(self, erasure: Erasure) -> None:
        if not (self.over or self.other_base):
            tell(f"  {self.run.outcome(erasure)}")


def run_to_repeat(arguments: argparse.Namespace) -> Repeated | None:
    """With --manifest: that run, its model, pictures and hardening in place where the command line
    says nothing of them."""
    if arguments.manifest is None:
        arguments.harden = arguments.harden or 0
        return None
    for name in ("resume", "prompt", "preset"):
        value = getattr(arguments, name)
        if value is not None:
            refuse(f"--{name}", value, "left out with --manifest, which says all that it would")
    run = recorded(arguments.manifest)
    repeated = Repeated(run, run.config, run.threads, arguments.allow_other_base)
    if arguments.model is None:
        arguments.model = run.model
    if arguments.harden is None:
        arguments.harden = run.rounds
    elif arguments.harden != run.rounds:
        repeated.over["harden"] = arguments.harden
    drawn = mapping(run.manifest.get("pictures"))
    columns, prompts = drawn.get("columns"), drawn.get("keep_prompts")
    if arguments.pictures is None and isinstance(columns, int):
        arguments.pictures = columns
    if arguments.keep_prompt is None and isinstance(prompts, list):
        arguments.keep_prompt = [str(prompt) for prompt in prompts]
    return repeated


def say(note: str) -> None:
    if note:
        tell(f"note: {note}", sys.stderr)
