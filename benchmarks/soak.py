"""Many short erasures in one process: what is left behind by them?

    python benchmarks/soak.py [--runs 1000] [--every 50] [--model FOLDER] [--json FILE]

Each is another of the RECIPES, on the same pipeline: presets, methods, several concepts, one that is
stopped and gone on with, one that fails. Its erasure is saved, loaded, applied and taken off again. What
the process holds is counted before, and after every so many. (Without --model it is the embedded model;
a tiny one, such as tests/golden/sd-ddim, does a thousand in some minutes.)
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import esd_fast
from esd_fast.commands.console import quiet_libraries, resident_bytes
from esd_fast.config import EraseConfig
from esd_fast.models import load_model

SHORT: dict[str, Any] = {"iterations": 3, "num_inference_steps": 4, "learning_rate": 1e-4}
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks"),
)


@dataclass(frozen=True)
class Held:
    """What the process holds, and what a run could leave on the UNet."""

    runs: int
    seconds: float
    resident: int  # bytes
    files: int  # open
    maps: int  # files that are mapped
    threads: int  # of the system; torch's own included
    tensors: int  # alive, by Python's garbage collector
    tensor_bytes: int
    hooks: int
    attributes: int  # of the UNet's modules, all together
    classes: int  # modules of another class than at the start
    filters: int  # of warnings


# what must not grow by a single one; memory is looked at over many runs
EXACT = (
    *("files", "maps", "threads", "tensors", "tensor_bytes"),
    *("hooks", "attributes", "classes", "filters"),
)


def raising(error: BaseException) -> Callable[[Any], None]:
    def at_a_step(_: Any) -> None:
        raise error

    return at_a_step


class Soak:
    """Erasures on one pipeline, and what they leave."""

    def __init__(self, pipeline: Any, folder: Path) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.classes = [type(m) for m in pipeline.unet.modules()]
        self.runs, self.started = 0, time.perf_counter()

    def run(self) -> None:
        RECIPES[self.runs % len(RECIPES)](self, self.runs)
        self.runs += 1

    def erase(self, seed: int, concept: Any = "cat", **settings: Any) -> esd_fast.Erasure:
        return esd_fast.erase(self.pipeline, concept, seed=seed, **SHORT | settings)

    def whole(self, seed: int, **settings: Any) -> None:
        erasure = self.erase(seed, **settings)
        loaded = esd_fast.load(erasure.save(self.folder / "esd.safetensors"))
        erasure.revert(self.pipeline)
        loaded.apply(self.pipeline, strength=0.5)
        loaded.revert(self.pipeline)

    def stopped(self, seed: int) -> None:
        with suppress(esd_fast.EraseInterrupted):
            self.erase(
                *(seed, "cat"),
                checkpoints=self.folder / "run",
                checkpoint_every=1,
                on_step=raising(KeyboardInterrupt()),
            )
        erasure = self.erase(seed, resume=self.folder / "run")
        erasure.revert(self.pipeline)
        for file in (self.folder / "run").iterdir():
            file.unlink()

    def failing(self, seed: int) -> None:
        with suppress(OSError):
            self.erase(seed, on_step=raising(OSError("full")))

    def in_a_thread(self, seed: int) -> None:
        thread = threading.Thread(target=self.whole, args=(seed,))
        thread.start()
        thread.join()

    def held(self) -> Held:
        gc.collect()
        modules = list(self.pipeline.unet.modules())
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        maps = Path("/proc/self/maps").read_text().splitlines()
        return Held(
            runs=self.runs,
            seconds=round(time.perf_counter() - self.started, 1),
            resident=resident_bytes("VmRSS"),
            files=len([*Path("/proc/self/fd").iterdir()]),
            maps=sum(len(fields := line.split()) > 5 and "/" in fields[5] for line in maps),
            threads=len([*Path("/proc/self/task").iterdir()]),
            tensors=len(tensors),
            tensor_bytes=sum(t.untyped_storage().nbytes() for t in tensors if not t.is_meta),
            hooks=sum(len(getattr(m, name)) for m in modules for name in HOOKS),
            attributes=sum(len(vars(m)) for m in modules),
            classes=sum(type(m) is not k for m, k in zip(modules, self.classes, strict=True)),
            filters=len(warnings.filters),
        )


RECIPES: tuple[Callable[[Soak, int], None], ...] = (
    lambda soak, seed: soak.whole(seed),
    lambda soak, seed: soak.whole(seed, preset="reference"),
    lambda soak, seed: soak.whole(seed, preset="paper"),
    lambda soak, seed: soak.whole(seed, train_method="esd-u", checkpointing="all"),
    lambda soak, seed: soak.whole(seed, keep_vocabulary=1.0, optimizer="adamw"),
    lambda soak, seed: soak.whole(seed, concept=["cat", "dog"], erase_from="an animal"),
    Soak.stopped,
    Soak.failing,
    Soak.in_a_thread,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--model", help="a diffusers folder (default: embedded)")
    parser.add_argument("--json", type=Path, help="where the rows go")
    given = parser.parse_args()
    quiet_libraries()
    pipeline = load_model(given.model, EraseConfig("cat")).pipeline
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(pipeline, Path(folder))
        while True:
            if soak.runs % given.every == 0 or soak.runs in (len(RECIPES), given.runs):
                rows.append(soak.held())
                print(json.dumps(asdict(rows[-1])), flush=True)
            if soak.runs >= given.runs:
                break
            soak.run()
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
