"""Which models a browser may choose: the embedded one, those of the owner, and hub ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "embedded"
FILES = (".safetensors", ".ckpt")
HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")


@dataclass(frozen=True)
class OfferedModels:
    """A browser names models by label and never learns where they lie. `named`: what the owner
    gave on the command line; `folder`: what lies there is offered as well."""

    folder: Path
    named: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path, named: Sequence[str] = ()) -> OfferedModels:
        """Raises FileNotFoundError where one of `named` is neither there nor a hub id."""
        for source in named:
            if not Path(source).exists() and not HUB_ID.fullmatch(source):
                raise FileNotFoundError(f"--model is {source!r}; there is no such folder or file")
        return cls(folder, tuple(named))

    def sources(self) -> dict[str, str | None]:
        """By label; None is the embedded one."""
        found: dict[str, str | None] = {EMBEDDED: None}
        lying = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        models = [p for p in lying if p.suffix in FILES or (p / "model_index.json").is_file()]
        for source in (*self.named, *map(str, models)):
            path = Path(source)
            plain = (path.stem if path.is_file() else path.name) if path.exists() else source
            label, number = plain, 1
            while label in found:
                number += 1
                label = f"{plain} ({number})"
            found[label] = source
        return found

    def labels(self) -> list[str]:
        return list(self.sources())

    def source_of(self, label: object) -> str | None:
        """What the package loads. Raises ValueError for what is not offered and no hub id; a path
        is neither, so that nothing of this machine can be named."""
        sources = self.sources()
        if isinstance(label, str) and label in sources:
            return sources[label]
        if not isinstance(label, str) or not HUB_ID.fullmatch(label) or Path(label).exists():
            raise ValueError(
                f"model is {label!r}; it must be {', '.join(sources)}, or a hub id such as "
                "'owner/name' (whoever runs the app offers folders and files with --model)"
            )
        return label

    def paths(self) -> dict[str, str]:
        """Label by place, to put in its stead in what is shown."""
        found: dict[str, str] = {}
        for label, source in self.sources().items():
            if source is not None and Path(source).exists():
                found |= {source: label, str(Path(source).resolve()): label}
        return found
