"""run.py's command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import run

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
