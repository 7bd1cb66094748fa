"""`esd-fast train`: load, draw, erase, save, draw again, report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast import IMPORTED
from esd_fast.config import MOST_AT_A_TIME, EraseConfig, check_count, refuse
from esd_fast.evaluation import write_atomically
from esd_fast.files import check_outside, check_target, free_folder, output_folder
from esd_fast.pages import keep_pages
from esd_fast.parameters import canonical_method
from esd_fast.prompt_list import read_prompts
from esd_fast.prompts import file_part, safe_name
from esd_fast.terminal import tell

from .console import Bars, peak_memory_bytes, quiet_libraries
from .launching import launched, placed
from .reference_flags import reference_file, translated
from .repeating import Repeated, run_to_repeat

if TYPE_CHECKING:
    from esd_fast.erasure import Erasure
    from esd_fast.models import Model
    from esd_fast.parallel import Ranks
    from esd_fast.run_state import Checkpoints, RunState
    from esd_fast.stored_samples import StoredSamples

COLUMNS_EMBEDDED, COLUMNS_GPU = 6, 3
MOST_COLUMNS, MOST_ROUNDS = 100, 100
MANIFEST = "manifest.json"
OF_REPORT = ("report.json", "report.html", "before_after.png", "loss.png")
WRITTEN = (MANIFEST, *OF_REPORT)
KEEP_PROMPTS = ("a photo of a dog", "a house by a lake", "a portrait of a woman")


def train(arguments: argparse.Namespace) -> int:
    """Exit code 0; 130 after Ctrl-C or SIGTERM, with the work so far saved. Of several processes
    the first draws and writes."""
    with launched() as ranks:
        return train_in(ranks, arguments)


def train_in(ranks: Ranks, arguments: argparse.Namespace) -> int:
    repeated = run_to_repeat(arguments)
    for note in translated(arguments):
        tell(f"note: {note}", sys.stderr)
    stored = samples_to_take(arguments)
    resume = state_to_resume(arguments, ranks.size)
    config = config_of(arguments, resume, repeated, stored, ranks.size)
    config = placed(config, ranks, arguments.device)
    if not 0 <= arguments.harden <= MOST_ROUNDS:
        refuse("--harden", arguments.harden, f"a whole number from 0 (none) to {MOST_ROUNDS}")
    if arguments.pictures is not None and not 0 <= arguments.pictures <= MOST_COLUMNS:
        refuse("--pictures", arguments.pictures, f"a whole number from 0, at most {MOST_COLUMNS}")
    if arguments.harden and (resume or arguments.checkpoint_every is not None):
        refuse("--harden", arguments.harden, "0 with checkpoints: its several runs are not resumed")
    if arguments.harden and ranks.size > 1:
        refuse("--harden", arguments.harden, "0 where there are several processes")
    if not ranks.first:
        return follow(ranks, arguments, config, resume, repeated, stored)
    delta = delta_place(arguments, config)
    folder = results_folder(arguments.output, config, arguments.overwrite or resume is not None)
    check_outside(folder, arguments.model)
    with output_folder(folder):  # shown to be writable before any training
        return train_into(ranks, folder, delta, arguments, config, resume, repeated, stored)


def follow(
    ranks: Ranks,
    arguments: argparse.Namespace,
    config: EraseConfig,
    resume: RunState | None,
    repeated: Repeated | None,
    stored: StoredSamples | None,
) -> int:
    """What every process but the first does of a run."""
    keep_pages()
    quiet_libraries()
    from esd_fast.esd import EraseInterrupted, run

    model, config = model_for(arguments, config, repeated, stored)
    # 0 in any case: torchrun ends the others at once where one fails, and the first is saving
    with suppress(EraseInterrupted):
        run(model, config, resume=resume, stored=stored, ranks=ranks)
    return 0


def model_for(
    arguments: argparse.Namespace,
    config: EraseConfig,
    repeated: Repeated | None,
    stored: StoredSamples | None,
) -> tuple[Model, EraseConfig]:
    """The model, and the settings with what only it tells. Raises ValueError where it is not that
    of the run that is repeated, or of the samples."""
    from esd_fast.models import load_model

    if repeated:
        repeated.same_threads()
    model = load_model(arguments.model, config)
    if repeated:
        repeated.check_base(model)
    config = config.for_model(model)
    if stored is not None:
        stored.check(model, config)  # before anything is drawn
    return model, config


def train_into(
    ranks: Ranks,
    folder: Path,
    delta: Path | None,
    arguments: argparse.Namespace,
    config: EraseConfig,
    resume: RunState | None,
    repeated: Repeated | None,
    stored: StoredSamples | None,
) -> int:
    keep_pages()
    bars = Bars()
    quiet_libraries()
    from esd_fast.esd import EraseInterrupted
    from esd_fast.evaluation.proof import proof_for
    from esd_fast.run_state import Checkpoints, forget_checkpoints

    checkpoints = Checkpoints.of(folder, arguments.checkpoint_every, resume)
    model, config = model_for(arguments, config, repeated, stored)
    if resume is None:
        forget_checkpoints(folder)  # --overwrite was said
    loaded = time.monotonic() - IMPORTED
    columns = columns_of(arguments.pictures, model)
    proof = proof_for(model, config, columns, arguments.keep_prompt or KEEP_PROMPTS)
    before = proof.draw(model.pipeline, bars.drawing("draw before"))
    drawn = time.monotonic() - IMPORTED
    interruption = None
    try:
        erasure = erased(model, config, arguments.harden, bars, ranks, checkpoints, resume, stored)
    except EraseInterrupted as caught:
        erasure, interruption = caught.erasure, caught
    finally:
        bars.close()
    erasure.manifest["pictures"] = {
        "columns": columns,
        "keep_prompts": arguments.keep_prompt,
    }
    save(erasure, folder)
    if delta:
        erasure.save(delta)
    if interruption:
        done = len(erasure.manifest["losses"])
        tell(f"interrupted after {done} of {config.iterations} steps; saved in {folder}")
        if interruption.checkpoint:
            again = "" if done or config.rollout == "student" else ", collecting again"
            tell(f"  esd-fast train --resume {shlex.quote(str(folder))} goes on{again}")
        return 130
    forget_checkpoints(folder)  # the result is there
    trained = time.monotonic() - IMPORTED
    after = proof.draw(model.pipeline, bars.drawing("draw after"))
    bars.close()
    report = report_of(erasure, model)
    report["seconds"] |= {"load": loaded, "draw_before": drawn - loaded}
    report["seconds"]["draw_after"] = time.monotonic() - IMPORTED - trained
    report |= proof.results(before, after)
    concept, losses = erasure.manifest["concept"], erasure.manifest["losses"]
    write_pictures(folder, proof.rows(before, after), concept, losses)
    report["seconds"]["total"] = time.monotonic() - IMPORTED
    from esd_fast.evaluation.report import write_report

    page = write_report(folder, report)
    tell(summary(report, page))
    if repeated:
        repeated.tell_outcome(erasure)
    tell(f"  again: esd-fast train --manifest {shlex.quote(str(folder))}")
    return 0


def erased(
    model: Model,
    config: EraseConfig,
    rounds: int,
    bars: Bars,
    ranks: Ranks | None = None,
    checkpoints: Checkpoints | None = None,
    resume: RunState | None = None,
    stored: StoredSamples | None = None,
) -> Erasure:
    """Hardening, which is several runs, leaves no checkpoints."""
    from esd_fast.esd import Progress, run
    from esd_fast.hardening import drawn_adversary, harden

    def show(progress: Progress) -> None:
        bars.show(progress.phase, progress.done, progress.total, progress.loss)

    if not rounds:
        return run(
            *(model, config),
            checkpoints=checkpoints,
            resume=resume,
            stored=stored,
            ranks=ranks,
            on_progress=show,
        )
    adversaries = [
        drawn_adversary(model, text, resolution=config.resolution, on_progress=bars.drawing("draw"))
        for text in config.concepts
    ]
    return harden(model, config, rounds, adversaries, on_progress=show)


def state_to_resume(arguments: argparse.Namespace, processes: int = 1) -> RunState | None:
    """With --resume: the newest whole checkpoint. Model and output are then its run's."""
    if arguments.resume is None:
        if not (
            arguments.concept
            or arguments.concepts_file
            or arguments.manifest
            or arguments.samples_file
        ):
            raise ValueError("what to erase is missing: --concept, --concepts-file or --prompt")
        return None
    from esd_fast.run_state import newest_state

    place = Path(arguments.resume)
    folder = place if place.is_dir() else place.parent
    if arguments.output is not None and Path(arguments.output).resolve() != folder.resolve():
        raise ValueError(
            f"--output is {arguments.output!r}; with --resume results go to {str(folder)!r}"
        )
    state = newest_state(place)
    arguments.output = str(folder)
    if arguments.model is None and state.identity.model != "embedded":
        arguments.model = state.identity.model
    tell(f"going on from step {state.step}", sys.stderr)
    if state.world_size != processes:
        tell(
            f"note: it was in {state.world_size} processes, now {processes}: the same batches, "
            "rounded otherwise",
            sys.stderr,
        )
    return state


def samples_to_take(arguments: argparse.Namespace) -> StoredSamples | None:
    """With --samples: the file. The model is then its own, if none is named."""
    if arguments.samples_file is None:
        return None
    for other in ("resume", "manifest", "harden"):
        if getattr(arguments, other):
            raise ValueError(f"--samples and --{other} do not go together: give one of them")
    from esd_fast.stored_samples import read_samples

    stored = read_samples(arguments.samples_file)
    if arguments.model is None and stored.model != "embedded":
        arguments.model = stored.model
    return stored


def config_of(
    arguments: argparse.Namespace,
    resume: RunState | None = None,
    repeated: Repeated | None = None,
    stored: StoredSamples | None = None,
    processes: int = 1,
) -> EraseConfig:
    """Every field of EraseConfig that the command line gives; over those of a resumed run or of
    stored samples, which are compared where the run begins, or of one that is repeated. The batch
    is of all processes, as it is there; on the command line and in presets of each."""
    names = {f.name for f in dataclasses.fields(EraseConfig)} - {"concept", "preset"}
    given = {n: getattr(arguments, n) for n in names if hasattr(arguments, n)}
    concepts = arguments.concept
    if arguments.concepts_file is not None:
        concepts = [case.prompt for case in read_prompts(arguments.concepts_file)]
    if arguments.preserve_file is not None:
        listed = [case.prompt for case in read_prompts(arguments.preserve_file)]
        given["preserve"] = [*(given["preserve"] or ()), *listed]
    recorded = repeated.config.concepts if repeated else ()
    if given["erase_from"] is not None and len(concepts or recorded) > 1:  # "" leaves one out
        given["erase_from"] = [text or None for text in given["erase_from"]]
    if given["batch_size"] is not None:
        check_count("--batch-size", given["batch_size"], MOST_AT_A_TIME // processes)
        given["batch_size"] *= processes
    if repeated:
        repeated.note_processes(processes)
        return repeated.with_given({"concept": concepts, **given})
    if resume is not None:
        from esd_fast.run_state import config_in

        given |= {"concept": concepts, "preset": arguments.preset}
        said = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(config_in(resume), **said)
    if stored is not None:
        given = stored.settings(preset=arguments.preset, concept=concepts, **given)
        preset, concepts = given.pop("preset"), given.pop("concept")
        config = EraseConfig.from_preset(preset, concepts, arguments.model, **given)
        stored.check_settings(config)
        return config
    config = EraseConfig.from_preset(arguments.preset or "fast", concepts, arguments.model, **given)
    if given["batch_size"] is not None:
        return config
    return dataclasses.replace(config, batch_size=config.batch_size * processes)


def delta_place(arguments: argparse.Namespace, config: EraseConfig) -> Path | None:
    """With --save_path: the file that the reference would write there. The run goes beside it."""
    if arguments.save_path is None:
        return None
    folder = Path(arguments.save_path)
    file = reference_file(
        folder, config.concepts, config.sources, canonical_method(config.train_method)
    )
    check_target(file, arguments.overwrite)
    if arguments.output is None:
        arguments.output = str(usual_folder(folder, config, arguments.overwrite))
    return file


def usual_folder(parent: Path, config: EraseConfig, overwrite: bool) -> Path:
    folder = parent / f"erased-{safe_name(file_part(config.concepts))}"
    return folder if overwrite else free_folder(folder, lambda f: bool(in_the_way(f)))


def results_folder(output: str | None, config: EraseConfig, overwrite: bool) -> Path:
    """Neither earlier results nor files of others are replaced unasked."""
    if output is None:
        folder = usual_folder(Path(), config, overwrite)
    else:
        folder = Path(output)
        found = in_the_way(folder)
        if found and not overwrite:
            unfinished = f"--resume {folder} goes on with it, " if holds_checkpoints(folder) else ""
            raise FileExistsError(
                f"{folder} holds {found}; {unfinished}--overwrite replaces what a run writes, "
                "another --output keeps it"
            )
    for name in WRITTEN:
        if (folder / name).is_dir():
            raise FileExistsError(f"{folder / name} is a folder; give another --output")
    return folder


def in_the_way(folder: Path) -> str:
    """What a run would replace there; empty where it would not."""
    if any(folder.glob("esd-*.safetensors")) or holds_checkpoints(folder):
        return "the results of a run"
    return next((name for name in WRITTEN if os.path.lexists(folder / name)), "")


def holds_checkpoints(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*.safetensors"))


def columns_of(asked: int | None, model: Model) -> int:
    if asked is not None:
        return asked
    if model.source == "embedded":
        return COLUMNS_EMBEDDED
    if model.device.type == "cpu":
        tell("no pictures on the CPU unless asked for: --pictures 2 draws them", sys.stderr)
        return 0
    return COLUMNS_GPU


def save(erasure: Erasure, folder: Path) -> None:
    """The delta first; what else an overwritten run left goes once the new one is there."""
    old = delta_of_manifest(folder)
    kept = erasure.save(folder)
    if old is not None and old != kept:
        old.unlink(missing_ok=True)
    for name in OF_REPORT:  # it would be told of another run
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / MANIFEST, json.dumps(erasure.manifest, indent=1).encode())


def delta_of_manifest(folder: Path) -> Path | None:
    """The delta of the run whose manifest lies there: others beside it are not that run's."""
    from esd_fast.erasure import Erasure
    from esd_fast.repeating import manifest_in

    try:
        return folder / Erasure({}, manifest_in(folder / MANIFEST)).file_name
    except (OSError, ValueError):
        return None


def report_of(erasure: Erasure, model: Model) -> dict[str, Any]:
    manifest = erasure.manifest
    losses: Sequence[float] = manifest["losses"]
    return {
        **{k: v for k, v in manifest.items() if k != "losses"},
        "seconds": {"collect": manifest["seconds"]["collect"], "fit": manifest["seconds"]["fit"]},
        "losses": {"first": losses[0], "last": losses[-1], "steps": len(losses)},
        "peak_memory_bytes": peak_memory_bytes(model.device),
        "weights": erasure.moves(model.unet),
    }


def write_pictures(folder: Path, rows: Any, concept: str, losses: Sequence[float]) -> None:
    from esd_fast.evaluation.pictures import before_after_grid, loss_curve, save_png

    if rows:
        save_png(before_after_grid(rows), folder / "before_after.png", {"concept": concept})
    save_png(loss_curve(losses, "loss"), folder / "loss.png", {"concept": concept})


def summary(report: dict[str, Any], page: Path) -> str:
    seconds, passes = report["seconds"], report["unet_passes"]["total"]
    lines = [
        (
            f'"{report["concept"]}" erased: {passes} UNet passes, '
            f"collect {seconds['collect']:.1f} s, fit {seconds['fit']:.1f} s, "
            f"all in all {seconds['total']:.0f} s"
        )
    ]
    if "hardening" in report:
        told = report["hardening"]
        lines.append(
            f"  that was the last of {told['rounds']} rounds of hardening; all of it: "
            f"{told['unet_passes']} UNet passes, {told['seconds']:.1f} s"
        )
    for kind in ("erased", "kept"):
        if kind in report:
            rate = report[kind]
            lines.append(
                f"  {kind:<6} concepts recognised in {rate['before']:.0%} of pictures before, "
                f"{rate['after']:.0%} after ({rate['images']} each)"
            )
    for group, name in (("preserved", "preserved"), ("not_preserved", "not preserved")):
        rate = report.get("kept", {}).get(group, {})
        if rate.get("images"):
            lines.append(
                f"    of these {name}: {rate['before']:.0%} before, {rate['after']:.0%} after "
                f"({rate['images']} each)"
            )
    return "\n".join([*lines, f"  report: {page}"])
