"""The suites kernels and step: their contestants do the same work, and the quick form gives sane rows."""

import dataclasses

import floor
import pytest
import torch
from diffusers import UNet2DConditionModel
from measure import Settings
from rows import Row
from suites import cpu, kernels, step

from esd_fast import ops
from esd_fast.graphs import WARM_UPS, Twin
from esd_fast.parameters import trainable_names

# diffusers' Euler scheduler hands tensors to NumPy in a way that NumPy will not take for ever
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

QUICK = Settings(quick=True)


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> bool:
    difference = (ours.double() - truth.double()).norm()
    return bool(difference <= tolerance * truth.double().norm())


def sane(rows: list[Row]) -> None:
    for row in rows:
        assert row.note or row.seconds, row
        if row.seconds_p10:  # a floor is a sum of medians
            assert 0 < row.seconds_p10 <= row.seconds <= row.seconds_p90
        if row.seconds:
            assert row.seconds > 0
            assert row.over_floor > 0
            assert row.repeats >= 1


def draw(suite: object, rows: list[Row]) -> object:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(layout="constrained")
    suite.plot(rows, figure)
    figure.canvas.draw()
    return figure


# --- kernels ------------------------------------------------------------------------------------------


def test_every_operator_is_measured():
    measured = {operator.op or name for name, operator in kernels.OPERATORS.items()}
    assert measured == set(ops.paths("cpu"))


@pytest.mark.parametrize("name", kernels.OPERATORS)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_the_operator_and_plain_torch_compute_the_same(name, dtype):
    operator = kernels.OPERATORS[name]
    case = kernels.Case(name, (2, 4, 8, 8), dtype, "cpu")
    ours, eager = case.call(operator.ours)(), case.call(operator.eager)()
    gradients = {"guidance_loss": 1, "guided_step": 0, "group_norm_silu": 1, "geglu": 1}
    assert len(ours) == 1 + gradients[operator.op or name]
    assert [x.shape for x in ours] == [x.shape for x in eager]
    for x, y in zip(ours, eager, strict=True):
        assert x.dtype == y.dtype
        assert close(x, y, 8 * torch.finfo(y.dtype).eps)


def test_bytes_of_counts_each_tensor_once():
    x, y = torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16)
    assert kernels.bytes_of((x, x, 1.0), (y,)) == 40 + 20


def test_guidance_loss_reads_three_and_writes_one():
    case = kernels.Case("guidance_loss", (2, 4, 8, 8), torch.bfloat16, "cpu")
    assert case.least_bytes() == 4 * (2 * 4 * 8 * 8) * 2 + 4  # the loss is a float32


def test_norms_and_geglu_read_their_argument_again_for_the_gradient():
    case = kernels.Case("geglu", (2, 4, 16), torch.bfloat16, "cpu")
    assert case.least_bytes() == 2 * 4 * 2 * (16 + 8 + 16 + 16 + 8)  # x, y, of x; x, of y
    case = kernels.Case("group_norm_silu", (2, 4, 8, 8), torch.float32, "cpu")
    assert case.least_bytes() == 4 * (2 * 4 * 8 * 8 * 5 + 2 * 4 + 2 * 4)  # weight and bias, twice


def test_guided_step_reads_two_predictions_and_the_latents_and_writes_two_inputs():
    case = kernels.Case("guided_step", (2, 4, 8, 8), torch.bfloat16, "cpu")
    assert case.least_bytes() == 2 * 4 * 8 * 8 * (2 * 2 + 4 + 2 * 2)


def test_a_forced_way_is_forced_for_the_call_alone():
    def skipped() -> dict[str, str]:
        return ops.path_of("guidance_loss").skipped

    before = skipped()
    assert kernels.through("torch", skipped) == {}  # nothing else was tried
    assert skipped() == before
    with pytest.raises(ValueError, match="way='fast': use torch, native, triton"):
        kernels.through("fast", skipped)


@pytest.mark.slow
def test_kernels_quick():
    rows = list(kernels.run(QUICK))
    sane(rows)
    for name, operator in kernels.OPERATORS.items():
        for dtype in ("float32", "bfloat16"):
            of_it = [r for r in rows if r.case.rpartition(" ")[0] == name]
            mine = {r.contestant: r for r in of_it if r.dtype == dtype}
            # what torch runs and what the native module runs are there once each, or a reason is
            assert {"copy", "eager", "esd_fast"} < set(mine)
            assert len(mine) == 4
            assert mine["copy"].over_floor == 1
            assert mine["esd_fast"].note == ops.path_of(operator.op or name).name
            assert all(r.seconds is None for r in mine.values() if "not built" in r.note)
    assert draw(kernels, rows).axes


def test_kernels_are_captured_once_and_replayed():
    calls = []
    contestants = kernels.replayed({"one": lambda: calls.append(1)}, "cpu", Twin())
    for _ in range(2):
        contestants["one"]()
    assert len(calls) == WARM_UPS + 2
    assert kernels.replayed(contestants, "cpu") is contestants


# --- step ---------------------------------------------------------------------------------------------


def job(family: str) -> step.Job:
    return step.Job(family, 64, "cpu", torch.float32, quick=True)


@pytest.mark.parametrize("family", step.FAMILIES)
def test_guided_steps_are_the_same(family):
    work = step.work_on(step.built(job(family)), job(family))
    ours, eager = step.guided_esd_fast(work), step.guided_eager(work)
    replayed = step.guided_graphs(work, Twin())
    fused = step.packed(lambda its: step.guided_graphs(its, Twin()))(work)
    for _ in range(3):
        expected = eager()
        assert close(ours(), expected, 1e-4)
        assert close(replayed(), expected, 1e-4)
        assert close(fused(), expected, 1e-4)
    assert fused.note == replayed.note
    assert replayed.note == "CUDA graphs: yes (1 captured, 3 steps replayed)"


@pytest.mark.skipif(not step.packed_on(job("sd1")), reason="no oneDNN")
def test_packed_steps_are_the_same():
    work = step.work_on(step.built(job("sd1")), job("sd1"))
    guided = [step.STEPS["guided step"][name](work) for name in ("packed", "eager")]
    for _ in range(3):
        ours, eager = (one() for one in guided)
        assert close(ours, eager, 1e-4)
    packed, plain = (step.STEPS["fit step"][name](work)() for name in ("packed", "esd_fast"))
    assert packed.loss == pytest.approx(plain.loss, rel=1e-5)
    # what is counted is the same arithmetic, wherever it runs
    flops = [floor.record(one).flops for one in guided]
    keys_and_values = flops[1] - flops[0]  # kept from the first step
    assert 0 < keys_and_values < 0.1 * flops[1]


@pytest.mark.slow
def test_cpu_quick(monkeypatch):
    monkeypatch.setattr(cpu, "CONTESTANTS", cpu.CONTESTANTS[1::3])
    monkeypatch.setattr(step, "available_memory", lambda: 0)  # quick asks nothing
    rows = list(cpu.run(QUICK))
    sane(rows)
    # every kind of work has been found by its names
    profile = [f"profile: {what}" for what in (*cpu.WORK, "the rest")]
    contestants = ["eager", "packed, pages kept", "floor"]
    guided = [*contestants, *(p for p in profile if p != "profile: optimizer")]
    assert [r.contestant for r in rows] == [*guided, *contestants, *profile]
    assert all("s of processor time" in r.note for r in rows if r.contestant in contestants[:2])
    assert len(draw(cpu, rows).axes) == 2


@pytest.mark.parametrize("family", step.FAMILIES)
def test_fit_steps_are_the_same(family):
    unet = step.built(job(family))
    work = step.work_on(unet, job(family))
    start = {name: p.detach().clone() for name, p in work.trained().items()}
    ours = step.fit_esd_fast(work)()
    moved = {name: p.detach().clone() for name, p in work.trained().items()}
    for name, parameter in work.trained().items():
        parameter.data.copy_(start[name])
    assert step.fit_eager(work)() == pytest.approx(ours.loss, rel=1e-5)
    changed = 0
    for name, parameter in work.trained().items():
        assert close(parameter - start[name], moved[name] - start[name], 0.05), name
        changed += not torch.equal(parameter, start[name])
    assert changed == len(start) > 0
    assert all("attn2" in name for name in start)


def test_replayed_fit_steps_are_the_same():
    losses, moved = [], []
    for make in (step.fit_esd_fast, lambda work: step.fit_graphs(work, Twin())):
        work = step.work_on(step.built(job("sd1")), job("sd1"))
        run = make(work)
        losses.append([run().loss for _ in range(3)])
        moved.append({name: p.detach().clone() for name, p in work.trained().items()})
    assert losses[0] == losses[1]
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert run.note == "CUDA graphs: yes (1 captured, 3 steps replayed)"


# upstream's own numbers: parameters, those of esd-x, and multiplications of one forward
@pytest.mark.parametrize(
    ("family", "pixels", "parameters", "trained", "products"),
    [
        ("sd1", 512, 859.5e6, 43.96e6, 401.6e9),
        ("sd2", 512, 865.9e6, None, None),
        ("sdxl", 1024, 2567e6, 545.7e6, 3381e9),
    ],
)
def test_full_size_is_the_published_size(family, pixels, parameters, trained, products):
    """On the meta device: nothing is computed."""
    meta = step.Job(family, pixels, "meta", torch.float32, quick=False)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**meta.unet_config)
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    assert sum(sizes.values()) == pytest.approx(parameters, rel=1e-3)
    if trained:
        names = trainable_names(unet, "esd-x")
        assert sum(sizes[n] for n in names) == pytest.approx(trained, rel=1e-3)
    if products:
        work = step.work_on(unet, meta)
        one = (work.samples.latents, work.samples.timesteps, work.prompts["concept"])
        with torch.no_grad():
            recorder = floor.record(lambda: step.asked_plainly(unet, *one))
        assert recorder.flops / 2 == pytest.approx(products, rel=2e-3)


@pytest.mark.slow
def test_step_quick():
    rows = list(step.run(QUICK))
    sane(rows)
    contestants = [4 + len(step.packed_on(one)) for one in step.jobs(QUICK)]
    assert len(rows) == len(step.STEPS) * sum(contestants)
    graphs = [r for r in rows if r.contestant == "graphs"]
    assert {(r.seconds, r.note) for r in graphs} == {(None, "n/a: CUDA graphs on cpu")}
    for kind in step.STEPS:
        floors = {r.case: r.seconds for r in rows if r.contestant == "floor"}
        measured = [r for r in rows if r.contestant in ("esd_fast", "eager")]
        for row in (r for r in measured if r.case.endswith(kind)):
            assert row.over_floor == pytest.approx(row.seconds / floors[row.case])
            assert row.unet_passes == 2
            assert row.tflops > 0
            assert row.samples_per_second == pytest.approx(1 / row.seconds)
            assert row.first_seconds > 0
    done = dataclasses.replace(QUICK, done=tuple(rows))
    assert list(step.run(done)) == []
    assert len(draw(step, rows).axes) == 2


@pytest.mark.parametrize("contestant", ["esd_fast", "eager"])
def test_alone(contestant):
    found = step.all_alone(job("sd1"), contestant, torch.get_num_threads())
    assert list(found) == list(step.STEPS)
    for of_kind in found.values():
        assert of_kind.peak_memory_bytes >= of_kind.loaded_memory_bytes > 0
        assert of_kind.first_seconds > 0


def test_too_little_memory_is_said_before(monkeypatch):
    monkeypatch.setattr(step, "available_memory", lambda: 2**30)
    full = dataclasses.replace(job("sdxl"), quick=False, dtype=torch.bfloat16)
    rows = list(step.measure_job(full, ("esd_fast", "eager")))
    assert [r.seconds for r in rows] == [None] * 4
    assert all("needs about" in r.note for r in rows)


def test_running_out_of_memory_loses_only_what_is_missing(monkeypatch):
    one = job("sd1")

    def measured(*_: object):
        yield Row("step", one.case("guided step"), "eager", seconds=1.0)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore words")

    monkeypatch.setattr(step, "measured", measured)
    there, *missing = step.measure_job(one, ("esd_fast", "eager"))
    assert there.seconds == 1
    assert [r.case for r in missing] == [one.case("fit step")] * 2
    assert [r.contestant for r in missing] == ["esd_fast", "eager"]
    assert all(r.note.endswith("Tried to allocate 1 GiB.") for r in missing)
