"""A job's work: the very erasure that the package makes, whoever watches, stops or draws meanwhile."""

import json
import threading

import pytest
from safetensors.torch import load_file

import esd_fast
from esd_fast.app import planning
from esd_fast.app.erasing import Erasing
from esd_fast.app.jobs import Cancelled, Job
from esd_fast.app.place import Place
from esd_fast.app.studio import Scene
from esd_fast.app.wishes import Wish
from esd_fast.demo import model_path

WAIT = 300  # seconds at most


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "COLUMNS", 1)
    made = Place.at(tmp_path / "work", [str(model_path())])
    yield made
    made.jobs.close(WAIT)


def job_of(place, wish, resume=None):
    parts = (wish, "me", place.offered, place.library, place.studio)
    return Job("me", "cat", Erasing(*parts, resume=resume))


def watched(job):
    """All that a watcher is shown, in a list that fills."""
    seen, tell = [], job.work.tell

    def telling(job, now):
        tell(job, now)
        seen.append(job.progress)

    job.work.tell = telling
    return seen


def delta(place, key):
    (file,) = (place.library.folder / key).glob("esd-*.safetensors")
    return load_file(file)


def same(one, other):
    return one.keys() == other.keys() and all(t.equal(other[n]) for n, t in one.items())


@pytest.mark.slow
def test_watched_and_drawn_meanwhile_it_is_the_same(place):
    """Pictures on the way are drawn with the UNet in training, others with the studio's in turn."""
    wish = Wish("cat", iterations=6, proof="pictures")
    job = job_of(place, wish)
    seen = watched(job)
    scene = Scene("embedded", "a cat", num_inference_steps=2)
    drawn = []
    drawing = threading.Thread(
        target=lambda: drawn.append(place.studio.draw(scene, [], 1.0, "me", False))
    )
    drawing.start()
    job.work(job)
    drawing.join(WAIT)
    assert drawn
    early = next(s.look for s in seen if s.look)
    assert 0 < early.step < 6  # somebody saw pictures on the way
    assert job.progress.look.step == 6  # and those of the end
    for row in (*early.rows, *job.progress.look.rows):
        assert len(row.before) == len(row.after) == 1
    plain = esd_fast.erase(None, "cat", iterations=6)
    assert same(delta(place, job.result), plain.tensors)
    assert list(job.progress.losses) == plain.manifest["losses"]
    # and in the studio it does what it does on the model
    after = place.studio.draw(scene, [job.result], 1.0, "me", False)
    again = place.studio.draw(scene, [job.result], 0.0, "me", False)
    assert (after.original[0] == again.erased[0]).all()
    assert (after.original[0] != after.erased[0]).any()


def test_stopped_keeps_what_it_has_and_goes_on_to_the_same_end(place):
    wish = Wish("cat", iterations=6, proof="none")
    job = job_of(place, wish)
    erasing, shown = job.work, job.work.tell

    def stopping(job, seen):
        shown(job, seen)
        if len(seen.losses) == 3:
            job.stop.set()

    erasing.tell = stopping
    with pytest.raises(Cancelled, match="Stopped after 3 of 6 steps, and kept"):
        job.work(job)
    (entry,) = place.library.entries("me")
    assert (entry.steps, entry.interrupted, entry.resumable) == (3, True, True)
    early = load_file(place.library.download(entry, "lora")[0])
    second = job_of(place, wish, resume=entry.folder)
    second.work(second)
    assert len(second.progress.losses) == 6
    assert not same(load_file(place.library.download(entry, "lora")[0]), early)
    (entry,) = place.library.entries("me")
    assert (entry.steps, entry.interrupted, entry.resumable) == (6, False, False)
    assert same(delta(place, entry.key), esd_fast.erase(None, "cat", iterations=6).tensors)


def test_stopped_before_the_first_step_nothing_is_left(place):
    job = job_of(place, Wish("cat", iterations=2, proof="none"))
    job.stop.set()
    with pytest.raises(Cancelled):
        job.work(job)
    assert not list(place.library.folder.iterdir())
    assert not place.studio.turns.line  # others may go on


def test_no_place_of_this_machine_goes_into_files(place):
    """The model is named by its label; here the folder of the embedded one, offered as another."""
    job = job_of(place, Wish("cat", model="model", iterations=1, proof="none"))
    job.work(job)
    folder = place.library.folder / job.result
    (file,) = folder.glob("esd-*.safetensors")
    for written in (file, folder / "manifest.json", folder / "report.json", folder / "report.html"):
        assert str(model_path()).encode() not in written.read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["model"] == "model"
    assert place.library.download(place.library.get(job.result, "me"), "lora")[0].is_file()


def test_plan_counts_what_the_run_then_does(place):
    wish = Wish("cat", iterations=5, proof="none")
    plan = planning.plan_of(wish, place.offered, place.studio, place.limits)
    plain = esd_fast.erase(None, "cat", iterations=5)
    done = plain.manifest["unet_passes"]
    assert (plan.collect_passes, plan.fit_passes) == (done["collect"], done["fit"])
    assert (plan.tensors, plan.weights) == (
        len(plain.tensors),
        sum(t.numel() for t in plain.tensors.values()),
    )
    assert plan.pace.collect_pass > 0
    assert plan.pace.fit_pass > 0
    # the model at hand is as it was: erasing on it gives the same
    model = place.studio.at_hand("embedded")
    assert same(esd_fast.erase(model.pipeline, "cat", iterations=5).tensors, plain.tensors)


def test_stacked_erasures_add_up(place):
    keys = []
    for concept in ("cat", "dog"):
        job = job_of(place, Wish(concept, iterations=2, proof="none"))
        job.work(job)
        keys.append(job.result)
    entries = [place.library.get(key, "me") for key in keys]
    model = place.studio.at_hand("embedded")
    stacked, notes = place.studio.stacked(model, entries, False)
    state = model.unet.state_dict()
    one, two = (delta(place, key) for key in keys)
    for name, tensor in stacked.tensors.items():
        assert (tensor - (one[name] + two[name] - state[name])).abs().max() < 1e-6
    assert "added up" in " ".join(notes)
