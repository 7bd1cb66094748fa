"""Who does which job when jobs fail and workers die, with workers that only say so."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esd_fast.config import EraseConfig
from esd_fast.fleet.cluster import Share
from esd_fast.fleet.dispatch import DEATHS, TRIES, dispatched
from esd_fast.fleet.jobs import Job
from esd_fast.fleet.outcomes import Failed, Lost, Made, Outcome, Unusable

MADE = Made(b"", {})


def jobs(count: int) -> list[Job]:
    return [Job(n, f"job {n}", EraseConfig(f"job {n}")) for n in range(count)]


class Told:
    """Workers that end what they are given, first come first served, as `script` says: of each job
    how its tries end (made, where it says no more), of a worker's number how all of its jobs do."""

    def __init__(self, size: int, script: dict[str | int, list[Outcome] | Outcome]) -> None:
        self.size, self.script = size, script
        self.working: dict[int, Job] = {}
        self.dead: set[int] = set()
        self.given: Counter[str] = Counter()
        self.renewed: Counter[int] = Counter()

    def give(self, worker: int, job: Job) -> None:
        assert worker not in self.working
        assert worker not in self.dead
        self.working[worker] = job
        self.given[job.file_name] += 1

    def wait(self) -> tuple[int, Outcome]:
        worker = next(iter(self.working))
        job = self.working.pop(worker)
        always = self.script.get(worker)
        outcomes = self.script.get(job.file_name)
        outcome: Outcome = MADE
        if isinstance(always, Outcome):
            outcome = always
        elif isinstance(outcomes, list) and outcomes:
            outcome = outcomes.pop(0)
        if isinstance(outcome, (Lost, Unusable)):
            self.dead.add(worker)
        return worker, outcome

    def renew(self, worker: int) -> None:
        assert worker in self.dead
        self.dead.remove(worker)
        self.renewed[worker] += 1


def ended(count: int, pool: Told) -> dict[str, Made | Failed]:
    pairs = list(dispatched(jobs(count), pool))
    assert len({job.file_name for job, _ in pairs}) == len(pairs) == count
    return {job.file_name: outcome for job, outcome in pairs}


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_each_job_once(size: int) -> None:
    pool = Told(size, {})
    assert ended(5, pool) == {f"job {n}": MADE for n in range(5)}
    assert set(pool.given.values()) == {1}


def test_a_job_that_fails_is_no_others_business() -> None:
    pool = Told(2, {"job 1": [Failed("sick")]})
    found = ended(4, pool)
    assert found.pop("job 1") == Failed("sick")
    assert list(found.values()) == [MADE] * 3
    assert pool.given["job 1"] == 1
    assert not pool.renewed


def test_a_dead_worker_is_started_again_and_its_job_retried_once() -> None:
    pool = Told(2, {"job 0": [Lost("killed")], "job 2": [Lost("killed"), Lost("out of memory")]})
    found = ended(5, pool)
    assert found.pop("job 2") == Failed("its worker died, twice: out of memory")
    assert list(found.values()) == [MADE] * 4
    assert pool.given == {"job 0": 2, "job 1": 1, "job 2": TRIES, "job 3": 1, "job 4": 1}
    assert pool.renewed.total() == 3
    assert not pool.dead


def test_a_worker_that_cannot_begin_takes_no_jobs_with_it() -> None:
    pool = Told(3, {1: Unusable("no model there")})
    assert list(ended(6, pool).values()) == [MADE] * 6
    pool = Told(2, {0: Unusable("no model there"), 1: Unusable("none here")})
    found = ended(3, pool)
    assert list(found.values()) == [Failed("no worker is left: none here")] * 3


def test_a_worker_that_always_dies_is_given_up() -> None:
    pool = Told(1, {0: Lost("killed")})
    found = ended(9, pool)
    assert found["job 0"] == Failed("its worker died, twice: killed")
    assert found["job 8"] == Failed("no worker is left: killed")
    assert pool.given.total() == DEATHS
    assert MADE in ended(9, Told(2, {0: Lost("killed")})).values()


OUTCOMES = st.sampled_from([MADE, Failed("sick"), Lost("killed"), Unusable("no model")])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.dictionaries(
        st.sampled_from([f"job {n}" for n in range(6)]), st.lists(OUTCOMES, max_size=3)
    ),
)
def test_whatever_happens_each_job_ends_once(size: int, script: dict) -> None:
    pool = Told(size, script)
    ended(6, pool)
    assert not pool.working
    assert max(pool.given.values()) <= TRIES + size  # one more for each worker that could not begin


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "expected"),
    [
        ([{"CPU": 2.0}], 2, "auto", Share(2, 1)),
        ([{"CPU": 2.0}], None, "auto", Share(1, 2)),
        ([{"CPU": 8.0}], 3, "auto", Share(3, 2)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], None, "auto", Share(2, 4)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 3, "cpu", Share(3, 4)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 4.0}], None, "auto", Share(6, 4, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0}], 1, "cuda", Share(1, 8, 1)),
        ([{"CPU": 2.0, "GPU": 4.0}], None, "auto", Share(4, 0, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}], None, "cpu", Share(1, 8)),
        ([{}, {"CPU": 4.0}], None, "auto", Share(1, 4)),
    ],
)
def test_shares(nodes: list, workers: int | None, device: str, expected: Share) -> None:
    assert Share.of(nodes, workers, device) == expected


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "said"),
    [
        ([{"CPU": 2.0}], 3, "auto", "--workers is 3; it must be at most 2, the cluster's CPUs"),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, "auto", "--workers is 3; .* 2, the cluster's GPUs"),
        ([{"CPU": 8.0}], None, "cuda", "--device is 'cuda'; .*no GPU"),
        ([], None, "auto", "at most 0, the cluster's CPUs"),
    ],
)
def test_more_than_there_is(nodes: list, workers: int | None, device: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Share.of(nodes, workers, device)
