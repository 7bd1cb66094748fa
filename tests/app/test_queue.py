"""One job at a time, each its browser's own; the device goes round."""

import threading
import time

import pytest

from esd_fast.app.jobs import Cancelled, JobQueue, QueueFullError
from esd_fast.app.turns import Turns

WAIT = 30  # seconds at most


@pytest.fixture
def queue():
    made = JobQueue(each=2, all_together=3, told=lambda error: f"told: {error}")
    yield made
    made.close(WAIT)


def until(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Held:
    """Work that goes on until it is let go, or cancelled."""

    def __init__(self):
        self.go, self.at_work = threading.Event(), 0

    def __call__(self, job):
        self.at_work += 1
        while not self.go.wait(0.005):
            if job.cancelled:
                raise Cancelled("kept")
        job.result = "there"


def test_one_at_a_time_in_order(queue):
    first, second = Held(), Held()
    one, two = queue.submit("me", "one", first), queue.submit("you", "two", second)
    until(lambda: one.state == "running")
    assert two.state == "waiting"
    assert [queue.ahead(one), queue.ahead(two)] == [0, 1]
    assert not second.at_work
    first.go.set()
    until(lambda: two.state == "running")
    assert (one.state, one.result) == ("finished", "there")
    assert queue.ahead(two) == 0
    second.go.set()
    until(lambda: two.state == "finished")


def test_browsers_see_and_cancel_their_own_alone(queue):
    work = Held()
    mine, other = queue.submit("me", "mine", work), queue.submit("you", "other", work)
    assert queue.of("me") == [mine]
    assert queue.of("you") == [other]
    assert queue.of("nobody") == []
    assert not queue.cancel("me", other.key)
    assert other.state == "waiting"
    assert not other.cancelled
    assert queue.cancel("you", other.key)
    assert other.state == "stopped"
    until(lambda: mine.state == "running")
    assert queue.cancel("me", mine.key)
    until(lambda: mine.state == "stopped")
    assert mine.message == "kept"
    assert not queue.cancel("me", mine.key)  # it is done
    assert work.at_work == 1


def test_a_failure_is_told_and_the_next_runs(queue):
    def fail(job):
        raise OSError(f"{job.title} is broken")

    bad, good = queue.submit("me", "this", fail), queue.submit("me", "good", lambda _: None)
    until(lambda: good.state == "finished")
    assert (bad.state, bad.message) == ("failed", "told: this is broken")


def test_too_many_are_refused(queue):
    work = Held()
    queue.submit("me", "a", work)
    queue.submit("me", "b", work)
    with pytest.raises(QueueFullError, match="you have 2"):
        queue.submit("me", "c", work)
    queue.submit("you", "c", work)
    with pytest.raises(QueueFullError, match="3 jobs wait"):
        queue.submit("third", "d", work)


def test_close_waits_until_work_is_put_away():
    queue, put_away = JobQueue(), []

    def work(job):
        job.stop.wait(WAIT)
        time.sleep(0.05)
        put_away.append(job)

    running = queue.submit("me", "a", work)
    waiting = queue.submit("me", "b", work)
    until(lambda: running.state == "running")
    queue.close(WAIT)
    assert put_away == [running]
    assert waiting.state == "stopped"
    with pytest.raises(QueueFullError):
        queue.submit("me", "c", work)


def test_turns_go_round():
    """Whoever waits when the holder gives way goes first, all of them, and one at a time."""
    turns, order, inside = Turns(), [], []

    def take(name):
        with turns.turn():
            inside.append(name)
            assert len(inside) == 1
            order.append(name)
            inside.clear()

    with turns.turn():
        turns.give_way()  # nobody waits: it goes on
        waiting = [threading.Thread(target=take, args=(name,)) for name in "ab"]
        for number, thread in enumerate(waiting):
            thread.start()
            until(lambda n=number: len(turns.line) == n + 2)
        order.append("holder")
        turns.give_way()
        order.append("holder again")
    for thread in waiting:
        thread.join(WAIT)
    assert order == ["holder", "a", "b", "holder again"]
