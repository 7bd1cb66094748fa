"""Benchmarks that anyone can rerun: time, memory and quality beside each other.

    python benchmarks/run.py kernels            # each operator against torch and a plain copy
    python benchmarks/run.py step               # one guided step, one fit step, at full size
    python benchmarks/run.py erase              # the whole job against the reference (an hour)
    python benchmarks/run.py scale              # resolution, batch, iterations
    python benchmarks/run.py full-size          # an SD 1.x-shaped checkpoint through the CLI
    python benchmarks/run.py all --quick        # does everything run?

Rows go to the screen, to SUITE.csv and a plot SUITE.png in --output, and with --json to one file.
A run that was stopped goes on with the same --json FILE and --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # where esd_fast is not installed, the source folder serves

from measure import Settings, machine
from rows import Row, read_json, read_machine, show, write_csv, write_json

SUITES = ("kernels", "step", "cpu", "erase", "scale", "full-size")


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    settings = settings_of(arguments)
    about = machine(settings.device)
    rows: dict[object, Row] = {}
    if arguments.resume:
        check_same(about, read_machine(arguments.json), arguments.json)
        rows = {r.key: r for r in read_json(arguments.json)}
    settings = dataclasses.replace(settings, done=tuple(rows.values()))
    for name in SUITES if arguments.suite == "all" else (arguments.suite,):
        suite = importlib.import_module("suites." + name.replace("-", "_"))
        for row in (suite.sweep if arguments.sweep else suite.run)(settings):
            rows[row.key] = row  # a suite may measure again what was there
            print(f"{row.suite} {row.case}: {row.contestant}", file=sys.stderr)
            if arguments.json:  # what is measured is kept, whatever comes next
                write_json(list(rows.values()), about, arguments.json)
        report(name, suite, [r for r in rows.values() if r.suite in suites_of(name)], arguments)


def check_same(now: dict[str, Any], then: dict[str, Any], file: Path) -> None:
    """One file tells of one machine and one commit: its rows are compared with each other."""
    for what in ("commit", "machine", "threads", "versions"):
        if now[what] != then.get(what):
            raise SystemExit(
                f"--resume: {file} was measured with {what} {then.get(what)}, this is {now[what]}; "
                "name another --json file"
            )


def report(name: str, suite: object, rows: list[Row], arguments: argparse.Namespace) -> None:
    """Table, CSV, plot, and what it comes to."""
    if not rows:
        return
    for kind in dict.fromkeys(r.suite for r in rows):
        show([r for r in rows if r.suite == kind], title=kind)
    for verdict in getattr(suite, "verdicts", lambda _: [])(rows):
        print(f"{verdict.ours} against the reference, {verdict.runs} pairs of runs:")
        print("\n".join(f"  {line}" for line in verdict.lines()))
    write_csv(rows, arguments.output / f"{name}.csv")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    suite.plot(rows, figure)  # type: ignore[attr-defined]
    figure.savefig(arguments.output / f"{name}.png", dpi=120)
    print(f"{arguments.output / name}.csv, .png")


def suites_of(name: str) -> tuple[str, ...]:
    """The `suite` values that a suite's rows carry."""
    return ("erase", "curve") if name == "erase" else (name,)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("suite", choices=[*SUITES, "all"])
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    made.add_argument("--quick", action="store_true", help="smallest sizes, fewest repeats")
    made.add_argument("--json", type=Path, help="all rows, with commit, versions and machine")
    made.add_argument("--resume", action="store_true", help="keep the rows that --json FILE holds")
    made.add_argument("--output", type=Path, default=Path("benchmark-results"), help="CSV, plots")
    made.add_argument("--sweep", action="store_true", help="erase: learning rates of all")
    made.add_argument("--concepts", nargs="*", default=(), help="erase: of these")
    made.add_argument("--contestants", nargs="*", default=(), help="erase: only these")
    made.add_argument("--seeds", type=int, default=3, help="erase: runs of a concept")
    made.add_argument(
        "--erased", type=int, default=64, help="erase: pictures of the erased concept"
    )
    made.add_argument("--kept", type=int, default=400, help="erase: pictures of kept ones")
    return made


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Checked before anything is measured."""
    import torch

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here; --device cpu would do")
    if arguments.sweep and arguments.suite != "erase":
        raise SystemExit("--sweep is of the suite erase")
    if arguments.resume and not (arguments.json and arguments.json.exists()):
        raise SystemExit("--resume needs --json FILE with a file that is there")
    if arguments.json and arguments.json.exists() and not arguments.resume:
        raise SystemExit(f"{arguments.json} is there: --resume goes on with it, or name another")
    return Settings(
        device=arguments.device,
        quick=arguments.quick,
        concepts=tuple(arguments.concepts),
        contestants=tuple(arguments.contestants),
        seeds=arguments.seeds,
        erased=arguments.erased,
        kept=arguments.kept,
    )


if __name__ == "__main__":
    main()
