"""A fleet on Ray itself: a cluster of two CPUs on this machine, two workers, one of which is killed."""

import csv
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import esd_fast
from esd_fast.cli import main
from esd_fast.fleet.cluster import cluster

from . import pipelines
from .pipelines import GOLDEN, SHORT, same_bits

one_thread = pipelines.one_thread
MODEL = str(GOLDEN / "sd-ddim")
LONG = 12  # iterations: there is time to kill the worker meanwhile
CONCEPTS = {"red apple": 4, "a fish": LONG, "bicycle": LONG, "a cat": LONG}
OPTIONS = ["--num-inference-steps", "4", "--learning-rate", "1e-3", "--model", MODEL]
pytestmark = [
    # not imported here: it reads where it may listen when it is imported
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Ray leaves its log files and sockets to the interpreter
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a fleet was run, with a job that cannot be done; a worker was killed meanwhile."""
    home = tmp_path_factory.mktemp("fleet")
    rows = [f"{concept},{steps},,{concept}\n" for concept, steps in CONCEPTS.items()]
    rows.insert(1, "sick,4,1e30,sick\n")
    (home / "jobs.csv").write_text("concept,iterations,lr,name\n" + "".join(rows))
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(home / "out", killed), daemon=True)
    with cluster(cores=2):
        killer.start()
        assert fleet(home) == 1
        killer.join()
        assert len(killed) == 1
        assert not listening_elsewhere()
        yield home


def fleet(home: Path) -> int:
    arguments = ["--workers", "2", "--output", str(home / "out"), *OPTIONS]
    return main(["fleet", str(home / "jobs.csv"), *arguments])


def kill_a_worker(output: Path, killed: list[int]) -> None:
    """Once it is at a second job; none if nothing is there in time."""
    until = time.monotonic() + 300
    while not killed and time.monotonic() < until:
        time.sleep(0.02)
        if any(output.glob("*.safetensors")):
            for process in processes("ray::Worker.erase")[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)


def processes(title: str) -> list[int]:
    """Of this process's session that call themselves `title`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has ended
            continue
        if told.startswith(title):
            found.append(int(process.name))
    return found


def listening_elsewhere() -> list[str]:
    """Of what listens for this process on other addresses than 127.0.0.1."""
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    mine = {str(link.readlink()) for link in links}
    lines = [
        line.split()
        for file in ("tcp", "tcp6")
        for line in Path("/proc/net", file).read_text().splitlines()[1:]
    ]
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:")
    listening = [x for x in lines if x[3] == "0A" and f"socket:[{x[9]}]" in mine]
    return [x[1] for x in listening if not x[1].startswith(loopback)]


def table(home: Path) -> dict[str, dict[str, str]]:
    with (home / "out" / "fleet.csv").open(newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def test_every_job_has_the_bits_of_a_run_alone(folder: Path) -> None:
    rows = table(folder)
    assert rows.pop("sick")["reason"].startswith("the loss is nan")
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len(rows) == len(CONCEPTS)
    for concept, iterations in CONCEPTS.items():
        alone = esd_fast.erase(MODEL, concept, **{**SHORT, "iterations": iterations})
        made = esd_fast.load(folder / "out" / f"{concept.replace(' ', '-')}.safetensors")
        assert made.manifest["threads"] == torch.get_num_threads() == 1
        assert made.manifest["base_digest"] == alone.manifest["base_digest"]
        assert made.tensors.keys() == alone.tensors.keys()
        assert all(same_bits(made.tensors[n], tensor) for n, tensor in alone.tensors.items())


def test_what_is_there_needs_no_worker(folder: Path) -> None:
    file = folder / "out" / "a-fish.safetensors"
    was = file.stat().st_mtime_ns
    (folder / "jobs.csv").write_text(f"concept,iterations,name\na fish,{LONG},a fish\n")
    assert fleet(folder) == 0
    assert table(folder)["a-fish"]["status"] == "there"
    assert file.stat().st_mtime_ns == was
    assert load_file(file)
