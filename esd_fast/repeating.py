"""A finished run, once more: what its manifest says of how to do that.

On the CPU the same manifest gives the same bits on the same machine with the same versions and the
same number of threads. Other numbers of threads round otherwise: torch then sums kernels of 1x1 and
the gradient of GroupNorm in another order, and cuts SiLU into other pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import EraseConfig, Loading, refuse
from .files import parsed_json

if TYPE_CHECKING:
    from .erasure import Erasure
    from .models import Model

LARGEST = 2**24  # bytes of a manifest; one of 100,000 steps has about 2 MB of losses
# what decides which weights are in memory, and in which dtype: where another one is asked for they
# are others, and cannot be compared
LOADED = {"dtype", *(f.name for f in dataclasses.fields(Loading))} - {"allow_pickle"}


@dataclass(frozen=True)
class Recorded:
    """The manifest of a run, and the file that it is in."""

    file: Path
    manifest: dict[str, Any]

    @property
    def config(self) -> EraseConfig:
        """All of the run's settings, with what "auto" came to in it. Raises ValueError where the
        manifest has none, or is of a run that cannot be repeated from it."""
        told = self.manifest
        if not isinstance(told.get("config"), dict):
            raise ValueError(f"{self.file} holds no settings of a run: another program made it")  # noqa: TRY004
        if told.get("given") or (told.get("extra_concepts") and not self.rounds):
            what = ", ".join(map(str, told.get("given") or ["extra"]))
            raise ValueError(
                f"{self.file} is of a run that was given {what} in Python, which no manifest holds"
            )
        found = EraseConfig.recorded(told["config"], str(self.file))
        came_to: dict[str, Any] = {
            "dtype": told.get("dtype"),
            "device": mapping(told.get("paths_taken")).get("device"),
            "collect_batch_size": told.get("collect_batch_size"),
            # that of the last round, which took those of the first once more for each round
            "iterations": found.iterations // (1 + self.rounds),
        }
        return dataclasses.replace(found, **{k: v for k, v in came_to.items() if v is not None})

    @property
    def model(self) -> str | None:
        """As `load_model` takes it. Raises ValueError where only who ran it has it."""
        source = self.manifest.get("model")
        if source == "embedded":
            return None
        if not isinstance(source, str) or source in ("pipeline", "unknown", ""):
            raise ValueError(
                f"{self.file} is of a run on a pipeline in Python; --model names what it was "
                "loaded from"
            )
        return source

    @property
    def rounds(self) -> int:
        """Of hardening."""
        return self.count(mapping(self.manifest.get("hardening")).get("rounds", 0), "rounds", 0)

    @property
    def threads(self) -> int | None:
        """torch's, that the run had; None where it does not matter, or is not said."""
        said = self.manifest.get("threads")
        on_cpu = mapping(self.manifest.get("paths_taken")).get("device") == "cpu"
        return self.count(said, "threads", 1) if on_cpu and said is not None else None

    @property
    def processes(self) -> int:
        """That the run had; its batch is of all of them."""
        return self.count(self.manifest.get("world_size", 1), "world_size", 1)

    def count(self, value: Any, name: str, least: int) -> int:
        most = 4096
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            refuse(f"{self.file}: {name}", value, f"a whole number from {least} to {most}")
        return int(value)

    def check_base(self, model: Model, overridden: Mapping[str, Any]) -> str:
        """Raises ValueError where `model`'s weights or scheduler are not those of the run. Gives
        what there is to say where they cannot be compared. Before any weight moves."""
        from .bases import base_digest

        was, other = self.manifest.get("base_digest"), sorted(LOADED & overridden.keys())
        if was is None:
            return "it is of an earlier version, and does not say what the model was"
        if other:
            return f"another {', '.join(other)} was asked for: the model is not compared"
        now = base_digest(model)
        if was != now:
            raise ValueError(
                f"{model.source} is another model than that of {self.file}: weights, dtype or "
                f"scheduler have the digest {now}, those of {self.manifest.get('model')} had {was}; "
                "--allow-other-base goes on with it"
            )
        return ""

    def other_versions(self) -> str:
        """What the run was made with that is not what is here; empty where all is the same."""
        from .erasure import versions

        return differences(mapping(self.manifest.get("versions")), versions())

    def outcome(self, erasure: Erasure) -> str:
        """Whether `erasure` came out as the run did, and what differed on the way if not."""
        was, now = self.manifest, erasure.manifest
        if self.manifest.get("interrupted"):
            taken = len(now["losses"])
            return f"{self.file} is of a run that was interrupted; this one took all {taken} steps"
        if was.get("result_fingerprint") is None:
            return f"{self.file} is of an earlier version, and does not say what came out"
        if was["result_fingerprint"] == now["result_fingerprint"]:
            return f"the same bits as {self.file}: {now['result_fingerprint']}"
        plain = {k: (was.get(k), now[k]) for k in ("world_size", "threads", "processor")}
        told = [
            differences({k: v[0] for k, v in plain.items()}, {k: v[1] for k, v in plain.items()}),
            differences(mapping(was.get("versions")), now["versions"]),
            differences(mapping(was.get("paths_taken")), now["paths_taken"]),
        ]
        why = "; ".join(filter(None, told)) or "nothing that it notes differs"
        return f"not the bits of {self.file}: {why}"


def recorded(path: str | Path) -> Recorded:
    """From a manifest.json or report.json, a delta, or the folder of a run.

    Raises FileNotFoundError, or ValueError where there is no manifest in it.
    """
    from .erasure import delta_in

    file = Path(path)
    if file.is_dir():
        found = file / "manifest.json"
        file = found if found.is_file() else delta_in(file)
    if not file.is_file():
        raise FileNotFoundError(f"manifest {str(path)!r} does not exist")
    return Recorded(file, manifest_in(file))


def manifest_in(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from .erasure import manifest_from
        from .tensor_files import open_safetensors

        return manifest_from(open_safetensors(file).metadata, file)
    if file.stat().st_size > LARGEST:
        raise ValueError(
            f"{file} has {file.stat().st_size:,} bytes, too many for a manifest; it must be a "
            "run's manifest.json, report.json, .safetensors or folder"
        )
    found = parsed_json(file.read_bytes(), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no manifest: it holds no table")  # noqa: TRY004
    return found


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Such as "torch 2.11.0, now 2.13.0"."""
    return "; ".join(
        f"{name} {was[name]}, now {now.get(name)}"
        for name in was
        if was[name] is not None and was[name] != now.get(name)
    )
