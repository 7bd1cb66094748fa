"""`esd-fast fleet` on a stand-in for the cluster: one worker, in this process."""

import csv
import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import esd_fast
from esd_fast.cli import main
from esd_fast.config import EraseConfig
from esd_fast.fleet import cluster
from esd_fast.fleet.jobs import Job
from esd_fast.fleet.outcomes import Lost, Made, Outcome, Unusable
from esd_fast.fleet.worker import Worker

from . import pipelines
from .pipelines import GOLDEN, SHORT, read_pipeline, same_bits

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
MODEL = str(GOLDEN / "sd-ddim")
JOBS = """concept,erase_from,method,iterations,learning_rate,name
red apple,,,4,,
a fish,an animal,,4,,fish
bicycle,,esd-u,4,1e30,sick
a cat|a dog,,,2,,both
"""
OPTIONS = ["--num-inference-steps", "4", "--learning-rate", "1e-3", "--model", MODEL]
APPLE = "esd-red-apple-from-red-apple-esd-x.safetensors"


class Here:
    """A pool of workers that work when they are waited for. `dies`: jobs over which they do."""

    pools: list[Any] = []  # noqa: RUF012
    dies: tuple[str, ...] = ()
    interrupted_after: int | None = None

    def __init__(self, share: cluster.Share, kind: type[Worker], arguments: Any) -> None:
        self.size = share.workers
        self.start = lambda: kind(*arguments)
        self.workers = [self.start() for _ in range(self.size)]
        self.given: deque[tuple[int, Job]] = deque()
        self.done = 0
        Here.pools.append(self)

    def give(self, worker: int, job: Job) -> None:
        self.given.append((worker, job))

    def wait(self) -> tuple[int, Outcome]:
        if self.done == self.interrupted_after:
            raise KeyboardInterrupt
        self.done += 1
        worker, job = self.given.popleft()
        if job.file_name.removesuffix(".safetensors") in self.dies:
            return worker, Lost("killed")
        return worker, self.workers[worker].erase(job.config)

    def renew(self, worker: int) -> None:
        self.workers[worker] = self.start()


@contextmanager
def one_node(address: str | None) -> Iterator[list[dict[str, float]]]:
    assert address is None
    yield [{"CPU": 1.0}]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(cluster, "RayPool", Here)
    monkeypatch.setattr(cluster, "cluster", one_node)
    for name, value in (("pools", []), ("dies", ()), ("interrupted_after", None)):
        monkeypatch.setattr(Here, name, value)
    return Here


def fleet(folder: Path, text: str = JOBS, *options: str, name: str = "jobs.csv") -> int:
    (folder / name).write_text(text)
    return main(["fleet", str(folder / name), "--output", str(folder / "out"), *OPTIONS, *options])


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "out" / "fleet.csv").open(newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def statuses(folder: Path) -> dict[str, str]:
    return {name.split("-from")[0]: row["status"] for name, row in table(folder).items()}


def test_jobs_are_done_in_one_worker_to_the_bits_of_runs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet(tmp_path) == 1
    assert statuses(tmp_path) == {
        "esd-red-apple": "done",
        "fish": "done",
        "sick": "failed",
        "both": "done",
    }
    common = {**SHORT, "iterations": 4}
    for name, concept, settings in [
        (APPLE, "red apple", {}),
        ("fish.safetensors", "a fish", {"erase_from": "an animal"}),
        ("both.safetensors", ["a cat", "a dog"], {"iterations": 2}),
    ]:
        alone = esd_fast.erase(MODEL, concept, **common | settings)
        made = load_file(tmp_path / "out" / name)
        assert made.keys() == alone.tensors.keys()
        assert all(same_bits(tensor, alone.tensors[n]) for n, tensor in made.items())
    assert alone.manifest["losses"][-1] == float(table(tmp_path)["both"]["final_loss"])
    first = esd_fast.load(tmp_path / "out" / APPLE)
    assert first.file_name == APPLE
    assert int(table(tmp_path)[APPLE[:-12]]["passes"]) == first.manifest["unet_passes"]["total"]
    assert "the loss is nan at iteration 1" in table(tmp_path)["sick"]["reason"]
    said = json.loads((tmp_path / "out" / "fleet.json").read_text())
    assert (said["done"], said["failed"], said["there"], said["model"]) == (3, 1, 0, MODEL)
    assert [job["file"] for job in said["jobs"]][2:] == ["", "both.safetensors"]
    shown = capsys.readouterr().out
    assert "4 jobs: 3 done, 0 were there, 1 failed" in shown
    assert "the loss is nan" in shown
    (pool,) = Here.pools
    pipelines.assert_same_weights(
        pool.workers[0].model.pipeline, pipelines.weights(read_pipeline("sd-ddim", torch.float32))
    )


def test_what_is_there_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = JOBS.replace("1e30", "")
    Here.interrupted_after = 2
    assert fleet(tmp_path, whole) == 130
    assert sorted(statuses(tmp_path).values()) == ["done", "done", "not run", "not run"]
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == [
        APPLE, "fish.safetensors", "fleet.csv", "fleet.json",
    ]  # fmt: skip
    assert "the same command goes on" in capsys.readouterr().err
    was = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    Here.interrupted_after = None
    assert fleet(tmp_path, whole) == 0
    assert sorted(statuses(tmp_path).values()) == ["done", "done", "there", "there"]
    assert {file: file.stat().st_mtime_ns for file in was} == was
    before = table(tmp_path)
    # the same in another order, as lines, with what costs memory alone said otherwise: no worker
    lines = [
        {"concept": ["a cat", "a dog"], "iterations": 2, "name": "both", "vram": "8GB"},
        {"concept": "red apple", "iterations": 4, "collect_batch_size": 2},
    ]
    text = "\n".join(map(json.dumps, lines))
    assert fleet(tmp_path, text, "--preset", "fast", name="jobs.jsonl") == 0
    assert len(Here.pools) == 2
    assert set(statuses(tmp_path).values()) == {"there"}
    assert {n: r["seconds"] for n, r in table(tmp_path).items()}.items() <= {
        n: r["seconds"] for n, r in before.items()
    }.items()

    # another of the same name is refused, and replaced where that is said
    other = whole.replace("an animal,,4", "a thing,,4")
    capsys.readouterr()
    assert fleet(tmp_path, other) == 2
    told = capsys.readouterr().err
    assert f"line 3: {out / 'fish.safetensors'} is another erasure: erase_from 'an animal'" in told
    assert "files in the way: 1; nothing was started" in told
    assert {file: file.stat().st_mtime_ns for file in was} == was
    assert fleet(tmp_path, other, "--overwrite") == 0
    assert statuses(tmp_path) == {
        "esd-red-apple": "there", "fish": "done", "sick": "there", "both": "there",
    }  # fmt: skip
    assert esd_fast.load(out / "fish.safetensors").manifest["erase_from"] == "a thing"

    # and so are files that are none of a fleet
    (out / "sick.safetensors").write_bytes(b"\0" * 100)
    (out / APPLE).write_bytes((out / APPLE).read_bytes()[:-1])
    capsys.readouterr()
    assert fleet(tmp_path, other) == 2
    assert capsys.readouterr().err.count("no whole safetensors file") == 2


def test_another_model_in_the_place_of_the_first(tmp_path: Path) -> None:
    text = "concept,iterations\nred apple,1\n"
    assert fleet(tmp_path, text) == 0
    file = tmp_path / "out" / APPLE
    manifest = esd_fast.load(file).manifest
    assert manifest["base_digest"] != "0" * 16
    changed = esd_fast.load(file)
    changed.manifest["base_digest"] = "0" * 16
    changed.save(file)
    assert fleet(tmp_path, text + "a fish,1\n") == 1
    assert "another model (digest" in table(tmp_path)["esd-a-fish-from-a-fish-esd-x"]["reason"]
    assert not (tmp_path / "out" / "esd-a-fish-from-a-fish-esd-x.safetensors").exists()


def test_a_worker_of_another_model_than_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter("ab")
    monkeypatch.setattr(
        Worker, "erase", lambda *_: Made(b"erasure", {"base_digest": next(digests)})
    )
    assert fleet(tmp_path, "concept,name\ncat,a\ndog,b\n") == 1
    assert statuses(tmp_path) == {"a": "done", "b": "failed"}
    assert "digest b, that of the others a" in table(tmp_path)["b"]["reason"]


def test_a_job_whose_worker_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "erase", lambda *_: Made(b"erasure", {"base_digest": "a"}))
    Here.dies = ("b",)
    assert fleet(tmp_path, "concept,name\ncat,a\ndog,b\nbird,c\n") == 1
    assert statuses(tmp_path) == {"a": "done", "b": "failed", "c": "done"}
    assert table(tmp_path)["b"]["reason"] == "its worker died, twice: killed"


def test_a_worker_that_cannot_begin() -> None:
    config = EraseConfig("red apple", **SHORT)
    other = Worker(MODEL, config, 1, "0").erase(config)
    assert isinstance(other, Unusable)
    assert "is another model (digest" in other.reason
    nowhere = Worker("/nowhere/at/all", config, 1, None).erase(config)
    assert nowhere == Unusable("model '/nowhere/at/all' does not exist")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("concept,seed\ncat,x\ndog,-1\n", [], "2 lines cannot be run as they stand"),
        ("concept\ncat\n", ["--workers", "0"], "--workers is 0; it must be a whole number from 1"),
        ("concept\ncat\n", ["--device", "cuda:1"], "--device is 'cuda:1'; it must be auto, cpu"),
        ("concept\ncat\n", ["--model", "/nowhere/at/all"], "model '/nowhere/at/all' does not"),
        ("concept\ncat\n", ["--output", MODEL], "lies in the model's own folder"),
        ("concept\ncat\n", ["--iterations", "0"], "jobs.csv, line 2: iterations is 0; it must be"),
        ("concept\ncat\na\n", ["--iterations", "0"], "jobs.csv, every line: iterations is 0; it"),
        ("concept,seed\ncat,x\ndog,1\n", [], "1 line cannot be run as it stands"),
    ],
)
def test_bad_arguments_start_nothing(
    text: str, options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet(tmp_path, text, *options) == 2
    told = capsys.readouterr()
    assert said in told.err.splitlines()[-1]
    assert not told.out
    assert not Here.pools
    assert [file.name for file in tmp_path.iterdir()] == ["jobs.csv"]


def test_many_problems_are_not_all_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet(tmp_path, "concept,seed\n" + "cat,x\n" * 500 + "dog,y\n") == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 22
    assert shown[0].endswith("line 2: seed is 'x'; it must be a whole number")
    assert shown[20] == "... and 481 more"


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert fleet(tmp_path, "concept\ncat\n") == 1
    assert "a fleet runs on Ray: pip install 'esd-fast[fleet]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
