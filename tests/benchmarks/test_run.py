"""run.py's command line."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import run
from rows import Row, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kernels", "--sweep"], "erase"),
        (["erase", "--resume"], "--json"),
        (["erase", "--resume", "--json", "missing.json"], "--json"),
        (["kernels", "--json", "there.json"], "--resume"),
    ],
)
def test_refused_before_anything_is_measured(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    with pytest.raises(SystemExit, match=said):
        run.main(arguments)


@pytest.mark.parametrize("what", ["commit", "machine", "threads", "versions"])
def test_one_file_holds_one_commit_and_one_machine(what, tmp_path, monkeypatch):
    """Else rows of an earlier commit would be written down as this one's."""
    monkeypatch.chdir(tmp_path)
    write_json([], run.machine("cpu") | {what: "another"}, tmp_path / "there.json")
    with pytest.raises(SystemExit, match=f"{what} another"):
        run.main(["kernels", "--resume", "--json", "there.json"])


def test_what_is_measured_again_replaces_its_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "report", lambda *_: None)
    suite = types.SimpleNamespace(run=lambda _: iter([Row("kernels", "x", "eager", seconds=2.0)]))
    monkeypatch.setattr(run.importlib, "import_module", lambda _: suite)
    other = Row("kernels", "y", "eager", seconds=3.0)
    old = [Row("kernels", "x", "eager", seconds=1.0), other]
    write_json(old, run.machine("cpu"), tmp_path / "rows.json")
    run.main(["kernels", "--resume", "--json", "rows.json"])
    assert [r.seconds for r in read_json(tmp_path / "rows.json")] == [2.0, 3.0]


@pytest.mark.slow
def test_erase_goes_on_where_it_was_stopped(tmp_path):
    """Rows with everything that the issue asks for; a row that is there is not measured again."""
    one = ["erase", "--quick", "--json", "rows.json", "--contestants", "esd_fast"]
    done = call(*one, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "rows.json").read_text())
    (row,) = table["rows"]
    for column in (
        "seconds",
        "samples_per_second",
        "unet_passes",
        "peak_memory_bytes",
        "UA",
        "IRA",
    ):
        assert row[column] is not None, column
    assert row["contestant"] == "esd_fast"
    assert {"commit", "versions", "date", "machine"} <= set(row)
    assert (tmp_path / "benchmark-results" / "erase.csv").exists()
    assert (tmp_path / "benchmark-results" / "erase.png").exists()
    both = call(*one, "reference", "--resume", folder=tmp_path)
    assert both.returncode == 0, both.stderr
    first, second = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert first["seconds"] == row["seconds"]
    assert second["contestant"] == "reference"
    assert second["unet_passes"] > first["unet_passes"]
