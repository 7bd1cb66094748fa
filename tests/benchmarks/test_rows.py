"""Rows to CSV and JSON and back; what the erase suite concludes from them."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from rows import COLUMNS, Row, duration, read_json, show, write_csv, write_json
from scipy.stats import ttest_rel
from suites import erase

ROW = Row("erase", "learning_rate=0.001", "esd_fast", seconds=1.5, unet_passes=800, UA=1.0)


def test_rows_survive_json_and_say_where_they_come_from(tmp_path):
    rows = [ROW, replace(ROW, contestant="reference", concept="cat", seed=2)]
    write_json(rows, {"commit": "abc", "versions": {"torch": "2"}}, tmp_path / "rows.json")
    assert read_json(tmp_path / "rows.json") == rows
    table = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert table[1]["commit"] == "abc"
    assert table[1]["versions"] == {"torch": "2"}
    assert table[1]["IRA"] is None


def test_csv_has_every_column_and_empty_cells(tmp_path):
    write_csv([ROW], tmp_path / "deep" / "rows.csv")
    (read,) = csv.DictReader((tmp_path / "deep" / "rows.csv").read_text().splitlines())
    assert tuple(read) == COLUMNS
    assert read["seconds"] == "1.5"
    assert read["IRA"] == ""


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "rows.json"
    write_json([ROW], {}, file)
    with pytest.raises(TypeError):
        write_json([ROW], {"commit": object()}, file)
    assert read_json(file) == [ROW]
    assert [f.name for f in tmp_path.iterdir()] == ["rows.json"]


def test_the_table_on_screen_shows_what_was_measured(capsys):
    show([ROW, replace(ROW, contestant="reference", seconds=0.0021)], title="erase")
    shown = capsys.readouterr().out
    for text in ("esd_fast", "reference", "1.50 s", "2.10 ms", "800", "100.0%"):
        assert text in shown
    assert "IRA" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(61, "61.00 s"), (0.25, "250.00 ms"), (3e-6, "3.0 us")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def pairs(ours, theirs):
    return [
        replace(ROW, contestant=name, concept="cat", seed=i, UA=ua, IRA=ua, CRA=ua, **cost)
        for name, values, cost in (
            ("esd_fast", ours, {"seconds": 2.0, "unet_passes": 800, "peak_memory_bytes": 90}),
            (
                "reference",
                theirs,
                {"seconds": 30.0, "unet_passes": 10_400, "peak_memory_bytes": 100},
            ),
        )
        for i, ua in enumerate(values)
    ]


def test_verdict_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(0.8, 1, 15), rng.uniform(0.8, 1, 15)
    found = erase.verdict(pairs(ours, theirs))
    assert found.runs == 15
    assert (found.passes, found.faster, found.memory) == (13.0, 15.0, 0.9)
    mean, low = found.differences["UA"]
    assert mean == pytest.approx(np.mean(ours - theirs))
    assert low == pytest.approx(ttest_rel(ours, theirs).confidence_interval(0.95).low)


def test_verdict_pairs_by_concept_and_seed_and_says_what_missed():
    rows = pairs([0.9, 0.9, 0.9], [0.95, 0.95])
    found = erase.verdict(rows)
    assert found.runs == 2
    lines = "\n".join(found.lines())
    assert lines.count("MISSED") == 3  # UA, IRA and CRA are five points worse
    assert "13.0x fewer UNet passes (target 12x: met)" in lines
    assert erase.verdict(rows[:1]) is None


def test_preserving_has_a_target_of_its_own():
    rows = pairs([0.9, 0.9], [0.9, 0.9])
    kept = [
        replace(r, contestant=erase.PRESERVED, unet_passes=1400)
        for r in rows
        if r.contestant == "esd_fast"
    ]
    plain, preserved = erase.verdicts([*rows, *kept])
    assert (plain.ours, preserved.ours) == ("esd_fast", erase.PRESERVED)
    assert preserved.passes == 10400 / 1400
    assert "7.4x fewer UNet passes (target 5x: met)" in preserved.lines()


def test_best_rate_of_a_sweep(tmp_path):
    rows = [
        replace(ROW, contestant=who, case=f"learning_rate={rate:g}", UA=ua, IRA=kept, CRA=kept)
        for who, rate, ua, kept in (
            ("esd_fast", 3e-4, 0.2, 1.0),
            ("esd_fast", 1e-3, 1.0, 0.9),
            ("esd_fast", 1e-3, 0.8, 0.9),
            ("reference", 1e-4, 1.0, 0.9),
            ("reference", 3e-4, 1.0, 0.5),
        )
    ]
    write_json(rows[:3], {}, tmp_path / "esd_fast.json")
    write_json(rows[3:], {}, tmp_path / "reference.json")
    assert erase.swept_rates(tmp_path) == {"esd_fast": 1e-3, "reference": 1e-4}
    assert erase.swept_rates(tmp_path / "missing") == {}
    equals = [
        replace(ROW, contestant="esd_fast", case=f"learning_rate={r:g}", UA=1.0, IRA=1.0, CRA=1.0)
        for r in erase.SWEEP_RATES["esd_fast"]
    ]
    write_json(equals, {}, tmp_path / "esd_fast.json")
    assert erase.swept_rates(tmp_path)["esd_fast"] == erase.SWEEP_RATES["esd_fast"][1]
    assert set(erase.best_rates()) == {*erase.SWEEP_RATES, erase.PRESERVED}
    assert set(erase.ENTRIES) == set(erase.best_rates())
