"""The clock and the memory meter."""

import mmap

import measure
import numpy as np
import pytest
import torch
from measure import Settings, Timing, in_fresh_process, interleaved, machine, peak, reset_peak


def test_contestants_take_turns():
    calls: list[str] = []
    timings = interleaved(
        {name: lambda name=name: calls.append(name) for name in "ABC"}, "cpu", repeats=3
    )
    assert "".join(calls) == "ABC" + "ABC" + "CBA" + "ABC"
    assert all(len(t.seconds) == 3 for t in timings.values())


def test_inner_calls_make_one_measurement():
    calls: list[int] = []
    timings = interleaved({"A": lambda: calls.append(0)}, "cpu", repeats=2, inner=5)
    assert len(calls) == 1 + 2 * 5
    assert len(timings["A"].seconds) == 2


def test_columns_are_median_and_quantiles():
    seconds = tuple(np.random.default_rng(0).uniform(size=11).tolist())
    columns = Timing(seconds, first=9.0).columns()
    assert columns["seconds"] == sorted(seconds)[5]
    assert columns["seconds_p10"] == pytest.approx(sorted(seconds)[1])
    assert columns["seconds_p90"] == pytest.approx(sorted(seconds)[9])
    assert (columns["repeats"], columns["first_seconds"]) == (11, 9.0)


def test_peak_is_of_the_measured_part_alone():
    def come_and_go(size):
        """Pages of their own: what malloc frees it may have kept."""
        with mmap.mmap(-1, size) as pages:
            pages.write(b"x" * size)

    come_and_go(160 * 2**20)
    held = reset_peak("cpu")
    assert peak("cpu") - held < 50 * 2**20
    come_and_go(120 * 2**20)
    assert peak("cpu") - held > 110 * 2**20


@pytest.mark.slow
def test_a_fresh_process_does_not_inherit_memory():
    mine = torch.ones(100 * 2**20)  # 400 MiB
    theirs = in_fresh_process(measure.peak, "cpu")
    assert theirs < peak("cpu") - mine.nbytes / 2


def test_machine_says_what_a_reader_needs(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/home/me/benchmarks/run.py", "step", "--output", "/home/me/x"]
    )
    about = machine("cpu")
    assert about["command"] == "python run.py step --output x"
    assert about["versions"]["torch"] == torch.__version__
    assert {"commit", "date", "command", "machine", "threads"} <= set(about)
    assert "cores" in about["machine"]


def test_settings_are_plain():
    assert Settings().device == "cpu"
