"""CUDA graphs without a card: their bookkeeping through the twin, which calls the same stages at each replay."""

import inspect
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esd_fast import EraseConfig, graphs
from esd_fast.checkpointing import blocks_of, checkpointed
from esd_fast.collect import Teacher, TeacherSamples, collect_all, collect_last, roll
from esd_fast.esd import encode_prompts, run
from esd_fast.fit import FitStep, Fitter, NonFiniteLoss
from esd_fast.graphed_steps import GraphedFitter, GuidedGraphs, RunGraphs
from esd_fast.graphs import WARM_UPS, CudaCapture, Graphed, Stage, Twin, copies_of, why_not
from esd_fast.models import load_model
from esd_fast.objective import Objective
from esd_fast.optimizers import make_optimizer
from esd_fast.parameters import TrainableSubset, only_trainable, trainable_names
from esd_fast.plan import Rollout, plan_rollouts
from esd_fast.schedules import scheduler_for

from . import pipelines
from .pipelines import SHAPE, SHORT, assert_same_weights, same_bits, weights

one_thread = pipelines.one_thread
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__:DeprecationWarning"
)  # diffusers' schedulers


class Fake(Twin):
    """The twin, that writes down what is asked of it, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.fail_at = fail_at  # of the stages that are recorded; -1: after the warm-up
        self.error = error or RuntimeError("operation not permitted\nwhen stream is capturing")

    def warm_up(self, stages: Stage) -> None:
        self.events.append("warm-up")
        super().warm_up(stages)
        if self.fail_at == -1:
            raise self.error

    def record(self, stage: Stage) -> Stage:
        if self.fail_at == self.events.count("record"):
            raise self.error
        self.events.append("record")
        return super().record(stage)

    def release(self) -> None:
        self.events.append("release")


# ------------------------------------------------------------------------------------- buffers and replays


class Sum:
    """Two stages over buffers: total += x, then count += 1; the state of each is made in the first."""

    def __init__(self, capture: Twin, made_late: bool = False) -> None:
        self.x, self.weight = torch.zeros(2), torch.zeros(2)
        self.state = {} if made_late else {"count": torch.zeros(())}
        self.total = torch.tensor([-0.0, math.nan])
        self.called: list[str] = []
        self.gave_up = 0
        self.graph = Graphed(
            capture,
            inputs={"x": self.x},
            stages={"add": self.add, "count": self.count},
            saved=lambda: copies_of(lambda: (self.total, *self.state.values())),
            storages=lambda: (self.weight,),
            given_up=self.give_up,
        )

    def add(self) -> None:
        self.called.append("add")
        self.total += self.x

    def count(self) -> None:
        self.called.append("count")
        self.state.setdefault("count", torch.zeros(())).add_(1)

    def give_up(self) -> None:
        self.gave_up += 1

    def step(self, value: float) -> None:
        self.graph.fill(x=torch.full((2,), value))
        self.graph.run("add")
        self.graph.run("count")


@pytest.mark.parametrize("made_late", [False, True])
def test_a_step_is_warmed_up_and_recorded_once_then_replayed(made_late: bool) -> None:
    fake = Fake()
    work = Sum(fake, made_late)
    work.total.zero_()
    for value in (1.0, 2.0, 4.0):
        work.step(value)
    assert fake.events == ["warm-up", "record", "record"]
    assert work.called == ["add", "count"] * (WARM_UPS + 3)
    assert work.graph.steps == work.state["count"].item() == 3  # the warm-up is no step
    assert work.total.tolist() == [7.0, 7.0]
    assert work.graph.why_not == ""


def test_warm_up_is_undone_bit_by_bit_before_the_first_replay() -> None:
    seen: list[Tensor] = []
    fake = Fake()
    work = Sum(fake)
    before, place = work.total.clone(), work.total.data_ptr()
    fake.record = lambda stage: seen.append(work.total.clone()) or stage  # type: ignore[method-assign]
    work.step(1.0)
    assert all(same_bits(x, before) for x in seen)  # -0 and NaN as they were
    assert work.total.data_ptr() == place


def test_an_input_that_was_not_filled_is_an_error() -> None:
    work = Sum(Twin())
    with pytest.raises(RuntimeError, match="not filled since the last step: x"):
        work.graph.run("add")
    work.step(1.0)
    with pytest.raises(RuntimeError, match="not filled since the last step: x"):
        work.graph.run("add")
    assert work.graph.steps == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(3), r"x is \(3,\) torch.float32; its buffer holds \(2,\) torch.float32"),
        (torch.zeros(1), r"x is \(1,\)"),  # copy_ would spread it
        (torch.zeros(2, dtype=torch.float64), "x is .* torch.float64; its buffer holds"),
    ],
)
def test_a_wrong_shape_or_dtype_is_an_error(value: Tensor, says: str) -> None:
    work = Sum(Twin())
    with pytest.raises(ValueError, match=says):
        work.graph.fill(x=value)
    with pytest.raises(ValueError, match="'y' is no input; there are x"):
        work.graph.fill(y=torch.zeros(2))
    with pytest.raises(RuntimeError, match="not filled"):
        work.graph.run("add")


def test_stages_have_their_order_and_a_step_may_be_given_up() -> None:
    work = Sum(Twin())
    with pytest.raises(RuntimeError, match="stage 'count' out of turn: next is 'add'"):
        work.graph.run("count")
    work.graph.fill(x=torch.ones(2))
    work.graph.run("add")
    work.step(1.0)  # the first one's "count" is left out
    with pytest.raises(RuntimeError, match="out of turn"):
        work.graph.run("count")
    assert work.state["count"] == 1
    with pytest.raises(ValueError, match="mean"):
        work.graph.run("mean")


def test_a_storage_that_moved_is_an_error_and_no_wrong_number() -> None:
    work = Sum(Twin())
    work.step(1.0)
    place, work.weight.data = work.weight.data, torch.ones(2)
    work.graph.fill(x=torch.ones(2))
    with pytest.raises(RuntimeError, match="1 of the tensors that were captured have moved"):
        work.graph.run("add")
    work.weight.data = place
    work.graph.run("add")


@pytest.mark.parametrize("fail_at", [-1, 0, 1])
def test_a_capture_that_fails_gives_way_to_the_stages(fail_at: int) -> None:
    plain, fake = Sum(Twin()), Fake(fail_at)
    work = Sum(fake)
    for value in (1.0, 2.0, 4.0):
        plain.step(value)
        work.step(value)
    assert same_bits(work.total, plain.total)
    assert work.state["count"] == 3
    assert work.gave_up == 1
    assert fake.events.count("warm-up") == 1  # not tried again
    assert work.graph.why_not == "capture failed: RuntimeError: operation not permitted"


def test_the_reason_is_what_failed_first() -> None:
    """torch.cuda.graph ends the capture on its way out; that fails in turn."""

    def record(_: Stage) -> Stage:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise ValueError("operation failed due to a previous error during capture")

    work = Sum(Twin())
    work.graph.capture.record = record  # type: ignore[method-assign]
    work.step(1.0)
    assert work.graph.why_not.endswith(
        "RuntimeError: operation not permitted when stream is capturing"
    )


def test_an_interrupted_warm_up_leaves_no_trace() -> None:
    work = Sum(Fake(-1, KeyboardInterrupt()))
    before = work.total.clone()
    with pytest.raises(KeyboardInterrupt):
        work.step(1.0)
    assert same_bits(work.total, before)


def test_nothing_is_held_after_the_release() -> None:
    import weakref

    work = Sum(Twin())
    work.step(1.0)
    gone = weakref.ref(work)
    graph = work.graph
    graph.release()
    del work
    assert gone() is None
    assert graph.steps == 1


# ------------------------------------------------------------------------------- where graphs are tried at all


class OnCard(nn.Module):
    """Says that it is on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def parameters(self, recurse: bool = True) -> Any:  # noqa: ARG002
        yield SimpleNamespace(device=torch.device("cuda", 0))


def test_why_graphs_are_not_tried() -> None:
    assert why_not("auto", OnCard()) == ""
    assert why_not("off", OnCard()) == "switched off"
    assert why_not("auto", nn.Linear(1, 1)) == "not on CUDA (cpu)"
    torch.set_autocast_enabled("cuda", True)
    try:
        assert "autocast" in why_not("auto", OnCard())
    finally:
        torch.set_autocast_enabled("cuda", False)
    hooked = OnCard()
    hooked.part.register_forward_hook(lambda *_: None)
    assert why_not("auto", hooked) == "hooks on part would not be called"
    offloaded = OnCard()
    offloaded._hf_hook = "accelerate's"
    assert why_not("auto", offloaded) == "hooks on the UNet would not be called"


def test_cuda_is_asked_as_pytorch_documents_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in their order, with the real signatures; what they do is for the gpu tests."""
    told: list[str] = []
    current = ["main"]

    class Stream(SimpleNamespace):
        def wait_stream(self, other: Any) -> None:
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    class Capturing:
        """Leaves its stream behind where the capture fails, as torch.cuda.graph does."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            given = signature.bind(None, *args, **settings).arguments
            assert given["pool"] == "pool"
            self.stream = given["stream"]

        def __enter__(self) -> None:
            told.append("capture")
            self.before, current[0] = current[0], self.stream.name

        def __exit__(self, kind: object, *_: object) -> None:
            told.append("end")
            if kind:
                raise RuntimeError("invalidated")
            current[0] = self.before

    class Generator:
        """The device's own, which a failed capture leaves unusable."""

        def clone_state(self) -> str:
            return "before"

        def graphsafe_set_state(self, state: str) -> None:
            told.append(f"random numbers as {state}")

    signature = inspect.signature(torch.cuda.graph.__init__)
    card = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(name="side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(name=current[0]))
    monkeypatch.setattr(torch.cuda, "stream", stream_that_restores(current))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, Generator()))
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    capture = CudaCapture(card)
    capture.warm_up(lambda: told.append(f"stages on {current[0]}"))
    replay = capture.record(lambda: told.append(f"stage on {current[0]}"))
    replay()
    assert told == [
        "side waits for main",
        *["stages on side"] * 3,
        "main waits for side",
        *("capture", "stage on side", "end", "replay"),
    ]
    with pytest.raises(RuntimeError, match="invalidated"):
        capture.record(lambda: 1 / 0)
    assert current == ["main"]
    assert told[-2:] == ["end", "random numbers as before"]


def stream_that_restores(current: list[str]) -> Any:
    """torch.cuda.stream: whatever happens within, the stream before comes back."""

    @contextmanager
    def stream(chosen: Any) -> Any:
        before, current[0] = current[0], chosen.name
        try:
            yield
        finally:
            current[0] = before

    return stream


# ------------------------------------------------------------------------------------------- whole erasures


def twins() -> RunGraphs:
    return RunGraphs(Twin(), Twin())


def run_with(
    run_graphs: RunGraphs | None,
    config: EraseConfig,
    pipe_name: str = "sd-ddim",
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> tuple[Any, list[FitStep]]:
    steps: list[FitStep] = []
    model = load_model(pipelines.pipeline(pipe_name, dtype), config)
    return run(model, config, graphs=run_graphs, on_step=steps.append, **more), steps


def assert_same_run(ours: tuple[Any, list[FitStep]], own: tuple[Any, list[FitStep]]) -> None:
    (a, a_steps), (b, b_steps) = ours, own
    assert a.manifest["losses"] == b.manifest["losses"]
    assert a.tensors.keys() == b.tensors.keys()
    assert all(same_bits(a.tensors[n], b.tensors[n]) for n in a.tensors)
    for x, y in zip(a_steps, b_steps, strict=True):
        assert same_bits(x.noise_pred_student, y.noise_pred_student)
        for name, value in vars(y.samples).items():
            mine = getattr(x.samples, name)
            assert (mine is None) == (value is None)
            assert value is None or torch.equal(mine, value), name


@pytest.mark.parametrize("erase_from", [None, "a fish"])
@pytest.mark.parametrize("preset", ["fast", "reference", "paper", "paper-diffusers"])
def test_replayed_and_eager_runs_agree_in_every_bit(preset: str, erase_from: str | None) -> None:
    settings = SHORT | {"batch_size": 2, "erase_from": erase_from}
    config = EraseConfig.from_preset(preset, "cat", **settings)
    ours = run_with(twins(), config)
    assert_same_run(ours, run_with(None, config))
    path = ours[0].manifest["paths_taken"]["cuda_graphs"]
    collect, fit = path.split("; ")
    assert collect.startswith("collect: yes (1 captured, ")
    assert fit == "fit: yes (1 captured, 4 steps replayed)"


@pytest.mark.parametrize("pipe_name", ["sd-pndm", "sd-v-ddim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_each_dtype(pipe_name: str, dtype: torch.dtype) -> None:
    config = EraseConfig(concept="cat", batch_size=2, **SHORT)
    ours = run_with(twins(), config, pipe_name, dtype)
    assert_same_run(ours, run_with(None, config, pipe_name, dtype))


def test_with_a_kept_vocabulary() -> None:
    """Masters that are no parameters' own values: they start at zero."""
    config = EraseConfig(concept="cat", keep_vocabulary=1.0, **SHORT)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "words": ["cat", "dog", "house"]}
    ours = run_with(twins(), config, **given)
    assert ours[0].manifest["kept_vocabulary"]["tensors"]
    assert_same_run(ours, run_with(None, config, **given))


def test_chunks_use_one_capture_and_the_smaller_last_one_its_own() -> None:
    collect, fit = Fake(), Fake()
    config = EraseConfig(
        concept="cat", iterations=13, batch_size=2, num_inference_steps=5, collect_batch_size=2
    )  # 26 samples: 6 trajectories of 5 states, in chunks of 2; one more for a last chunk of 1
    scheduler = scheduler_for(pipelines.pipeline().scheduler, config)
    planned = plan_rollouts(config, scheduler.timesteps, SHAPE)
    rollouts = [*planned, planned[0]][: 2 * (len(planned) // 2) + 1]
    model = load_model(pipelines.pipeline(), config)
    erasure = run(model, config, rollouts=rollouts, graphs=RunGraphs(collect, fit))
    assert len(rollouts) % 2
    assert collect.events == ["warm-up", "record"] * 2 + ["release"] * 2
    assert fit.events == ["warm-up", "record", "record", "release"]
    chunks = len(rollouts) // 2 + 1
    assert erasure.manifest["paths_taken"]["cuda_graphs"] == (
        f"collect: yes (2 captured, {5 * chunks} steps replayed); "
        "fit: yes (1 captured, 13 steps replayed)"
    )


@pytest.mark.parametrize(("collect", "fit"), [(0, None), (None, -1), (None, 0), (0, 1)])
def test_a_run_goes_on_where_capture_fails(collect: int | None, fit: int | None) -> None:
    config = EraseConfig(concept="cat", collect_batch_size=1, **SHORT | {"iterations": 8})
    ours = run_with(RunGraphs(Fake(collect), Fake(fit)), config)
    assert_same_run(ours, run_with(None, config))
    reason = "no (capture failed: RuntimeError: operation not permitted)"
    yes = ["yes (1 captured, 8 steps replayed)"] * 2
    told = [y if at is None else reason for y, at in zip(yes, (collect, fit), strict=True)]
    path = ours[0].manifest["paths_taken"]["cuda_graphs"]
    assert path == f"collect: {told[0]}; fit: {told[1]}"


def test_on_the_cpu_or_switched_off_nothing_is_captured() -> None:
    config = EraseConfig(concept="cat", **SHORT)
    path = run_with(None, config)[0].manifest["paths_taken"]["cuda_graphs"]
    assert path == "collect: no (not on CUDA (cpu)); fit: no (not on CUDA (cpu))"
    config = EraseConfig(concept="cat", cuda_graphs="off", **SHORT)
    path = run_with(None, config)[0].manifest["paths_taken"]["cuda_graphs"]
    assert path == "collect: no (switched off); fit: no (switched off)"


def test_a_scheduler_without_a_table_is_called_eagerly() -> None:
    config = EraseConfig(concept="cat", **SHORT)
    pipe = pipelines.pipeline()
    pipe.scheduler.register_to_config(clip_sample=True)
    erasure = run(load_model(pipe, config), config, graphs=twins())
    path = erasure.manifest["paths_taken"]["cuda_graphs"]
    assert path.startswith("collect: no (diffusers' own step (a replay differs")
    assert path.endswith("; fit: yes (1 captured, 4 steps replayed)")


# ------------------------------------------------------------------------------------------------- collect


def teacher(run_graphs: GuidedGraphs | None, unet: nn.Module | None = None) -> Teacher:
    config = EraseConfig(concept="cat", num_inference_steps=5)
    pipe = pipelines.pipeline()
    pipe.unet = unet or pipe.unet
    model = load_model(pipe, config)
    prompts = encode_prompts(model, config, 64)
    return Teacher(
        unet=model.unet,
        scheduler=scheduler_for(pipe.scheduler, config),
        prompts=prompts,
        rolled="concept",
        asked=tuple(prompts.by_name),
        num_inference_steps=5,
        guidance_scale=3.0,
        graphs=run_graphs,
    )


def rollout(seed: int, batch: int = 2, side: int = 8, **settings: Any) -> Rollout:
    noise = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))
    return Rollout(noise, **{"steps": 5} | settings)


def assert_same_samples(ours: TeacherSamples, own: TeacherSamples) -> None:
    for name, value in vars(own).items():
        mine = getattr(ours, name)
        assert (mine is None) == (value is None)
        assert value is None or torch.equal(mine, value), name


def test_one_capture_for_each_batch_and_resolution() -> None:
    fake = Fake()
    guided = GuidedGraphs(fake)
    asked, plain = teacher(guided), teacher(None)
    shapes = [(2, 8), (1, 8), (2, 16), (2, 8), (1, 8), (2, 16), (2, 8)]
    kept = []
    for seed, (batch, side) in enumerate(shapes):
        kept.append(collect_all(asked, rollout(seed, batch, side), lambda _: None))
    for seed, (batch, side) in enumerate(shapes):  # copies: later chunks overwrote no earlier one
        own = collect_all(plain, rollout(seed, batch, side), lambda _: None)
        assert_same_samples(kept[seed], own)
    assert fake.events == ["warm-up", "record"] * 3
    assert sorted(graph.steps for graph in guided.graphs) == [10, 10, 15]


def test_rollouts_of_every_length_use_one_capture() -> None:
    fake = Fake()
    asked, plain = teacher(GuidedGraphs(fake)), teacher(None)
    lengths = [3, 0, 5, 1, 3]
    kept = []
    for seed, steps in enumerate(lengths):
        kept.append(collect_last(asked, rollout(seed, steps=steps, query=1.0), lambda _: None))
    for seed, steps in enumerate(lengths):
        own = collect_last(plain, rollout(seed, steps=steps, query=1.0), lambda _: None)
        assert_same_samples(kept[seed], own)
    assert fake.events == ["warm-up", "record"]


def test_a_trajectory_that_overflowed_does_not_spoil_the_next() -> None:
    asked, plain = teacher(GuidedGraphs(Twin())), teacher(None)
    broken = rollout(0)
    broken.noise.fill_(math.inf)
    collect_all(asked, broken, lambda _: None)
    ours = collect_all(asked, rollout(1), lambda _: None)
    assert_same_samples(ours, collect_all(plain, rollout(1), lambda _: None))


def test_a_graph_reads_a_students_weights_where_they_lie() -> None:
    """Training writes in place, so a graph sees it; the teacher's weights come by a swap of
    pointers, which a graph would not see: it says so."""
    unet = pipelines.pipeline().unet
    subset = TrainableSubset.of(unet, trainable_names(unet, "esd-x"))
    asked, plain = teacher(GuidedGraphs(Twin()), unet), teacher(None, unet)
    places = [p.data_ptr() for p in unet.parameters()]
    first = collect_all(asked, rollout(0), lambda _: None)
    optimizer = torch.optim.Adam(subset.masters.values(), lr=1e-2)
    for parameter in subset.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    subset.step(optimizer)
    with subset.teacher():  # between rollouts, as for the questions
        assert [p.data_ptr() for p in unet.parameters()] != places
        with pytest.raises(RuntimeError, match="captured have moved"):
            collect_all(asked, rollout(0), lambda _: None)
    assert [p.data_ptr() for p in unet.parameters()] == places
    ours = collect_all(asked, rollout(0), lambda _: None)
    assert not torch.equal(ours.latents, first.latents)
    assert_same_samples(ours, collect_all(plain, rollout(0), lambda _: None))
    subset.restore()
    assert_same_samples(collect_all(asked, rollout(0), lambda _: None), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_step_and_a_restore_move_no_weight_in_memory(dtype: torch.dtype) -> None:
    unet = pipelines.pipeline("sd-ddim", dtype).unet
    places = [p.data_ptr() for p in unet.parameters()]
    fitter = fitter_on(unet, None)
    with only_trainable(unet, fitter.subset):
        for seed in range(2):
            fitter.step(some_samples(seed, dtype=dtype))
    fitter.subset.restore()
    assert [p.data_ptr() for p in unet.parameters()] == places


def test_a_step_too_many_is_an_error() -> None:
    trajectory = teacher(GuidedGraphs(Twin())).trajectory(rollout(0), ("null", "concept"))
    with torch.no_grad():
        roll(trajectory, lambda _: None)
        with pytest.raises(IndexError):
            trajectory.step(trajectory.timesteps[-1])


# ----------------------------------------------------------------------------------------------------- fit


def some_samples(seed: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> TeacherSamples:
    g = torch.Generator().manual_seed(seed)
    latents, null, concept = (torch.randn(batch, *SHAPE, generator=g).to(dtype) for _ in range(3))
    timesteps = torch.randint(1000, (batch,), generator=g)
    return TeacherSamples(latents, timesteps, null, concept)


def fitter_on(unet: nn.Module, capture: Twin | None, method: str = "esd-x", **more: Any) -> Fitter:
    subset = TrainableSubset.of(unet, trainable_names(unet, method))
    config = EraseConfig(concept="cat")
    prompts = encode_prompts(load_model(pipelines.pipeline(), config), config, 64)
    dtype = next(unet.parameters()).dtype
    conditioning = type(prompts["concept"])(prompts["concept"].encoder_hidden_states.to(dtype))
    capturable = capture is not None and capture.capturable
    optimizer = make_optimizer("adam", subset.masters.values(), 1e-3, capturable=capturable)
    arguments = (unet, subset, conditioning, Objective("concept", 2.0), optimizer)
    if capture is None:
        return Fitter(*arguments)
    return GraphedFitter(*arguments, capture=capture, **more)


def fitted(capture: Twin | None, batches: list[int], checkpoint: bool = False, **more: Any) -> Any:
    unet = pipelines.pipeline().unet
    fitter = fitter_on(unet, capture, **more)
    chosen = list(blocks_of(unet)) if checkpoint else []
    with only_trainable(unet, fitter.subset), checkpointed(unet, chosen):
        steps = [fitter.step(some_samples(i, batch)) for i, batch in enumerate(batches)]
    return unet, fitter, steps


@pytest.mark.parametrize("checkpoint", [False, True])
def test_batches_of_another_size_are_captured_in_the_midst_of_training(checkpoint: bool) -> None:
    """What the second warm-up has to put back is no start: moments, step counts, moved weights."""
    fake = Fake()
    batches = [2, 2, 1, 2, 1]
    unet, fitter, steps = fitted(fake, batches, checkpoint)
    plain, own, own_steps = fitted(None, batches, checkpoint)
    assert fake.events == ["warm-up", "record", "record"] * 2
    assert_same_weights(unet, weights(plain))
    assert [s.loss for s in steps] == [s.loss for s in own_steps]
    for a, b in zip(fitter.optimizer.state.values(), own.optimizer.state.values(), strict=True):
        assert a["step"] == b["step"] == 5
        assert same_bits(a["exp_avg"], b["exp_avg"])
        assert same_bits(a["exp_avg_sq"], b["exp_avg_sq"])


def test_what_warm_up_moved_is_back_before_the_first_replay() -> None:
    unet = pipelines.pipeline("sd-ddim", torch.bfloat16).unet
    fake, moved = Fake(), []
    fitter = fitter_on(unet, fake)
    start = weights(unet)
    masters = {n: m.detach().clone() for n, m in fitter.subset.masters.items()}
    warm_up = fake.warm_up

    def watched_warm_up(stages: Stage) -> None:
        warm_up(stages)
        moved.extend(n for n, m in fitter.subset.masters.items() if not torch.equal(m, masters[n]))

    def record(stage: Stage) -> Stage:
        assert_same_weights(unet, start)
        assert all(same_bits(m, masters[n]) for n, m in fitter.subset.masters.items())
        for state in fitter.optimizer.state.values():
            assert all(not value.any() for value in state.values())
        return stage

    fake.warm_up, fake.record = watched_warm_up, record  # type: ignore[method-assign]
    with only_trainable(unet, fitter.subset):
        fitter.step(some_samples(0, dtype=torch.bfloat16))
    assert [graph.why_not for graph in fitter.graphs] == [""]  # no assertion failed in there
    assert moved  # there was something to put back


def test_warm_up_leaves_the_loss_scale_of_float16() -> None:
    steps, scales = [], []
    for capture in (Fake(), None):
        unet = pipelines.pipeline("sd-ddim", torch.float16).unet
        fitter = fitter_on(unet, capture)
        fitter.scaler.set_growth_interval(3)
        with only_trainable(unet, fitter.subset):
            steps.append([fitter.step(some_samples(i, dtype=torch.float16)).loss for i in range(4)])
        scales.append(fitter.scaler.state_dict())
    assert steps[0] == steps[1]
    assert scales[0] == scales[1]
    assert scales[0]["scale"] != 2.0**16  # it has grown or shrunk, at the same steps


def test_a_watcher_keeps_what_the_next_step_does_not_overwrite() -> None:
    _, fitter, steps = fitted(Twin(), [2, 2])
    _, _, own = fitted(None, [2, 2])
    assert all(
        same_bits(a.noise_pred_student, b.noise_pred_student)
        for a, b in zip(steps, own, strict=True)
    )
    buffers = [x.data_ptr() for x in vars(fitter.running.samples).values() if x is not None]
    for step in steps:
        handed = [
            step.noise_pred_student,
            *(x for x in vars(step.samples).values() if x is not None),
        ]
        assert not {x.data_ptr() for x in handed} & {*buffers, fitter.running.student.data_ptr()}


def test_unwatched_steps_are_not_copied() -> None:
    _, fitter, (first, second) = fitted(Twin(), [2, 2], watched=False)
    assert first.noise_pred_student is second.noise_pred_student is fitter.running.student


def test_a_run_says_whether_it_is_watched() -> None:
    config = EraseConfig(concept="cat", **SHORT)
    for on_step in (None, lambda _: None):
        run_graphs = twins()
        run(load_model(pipelines.pipeline(), config), config, graphs=run_graphs, on_step=on_step)
        assert [fitter.watched for fitter in run_graphs.fitters] == [on_step is not None]


@pytest.mark.parametrize("at", [0, 1])
def test_a_loss_that_is_no_number_stops_before_any_weight_moved(at: int) -> None:
    unet = pipelines.pipeline().unet
    fitter = fitter_on(unet, Twin())
    samples = [some_samples(0), some_samples(1)]
    samples[at].noise_pred_concept[0, 0, 0, 0] = math.nan
    with only_trainable(unet, fitter.subset):
        for good in samples[:at]:
            fitter.step(good)
        before = weights(unet)
        with pytest.raises(NonFiniteLoss, match=f"at iteration {at}, timestep"):
            fitter.step(samples[at])
        assert_same_weights(unet, before)
        for state in fitter.optimizer.state.values():
            assert state["step"] == at
            assert state["exp_avg"].isfinite().all()


def test_where_capture_fails_the_optimizer_is_the_plain_one() -> None:
    _, fitter, _ = fitted(Fake(0), [2, 2])
    assert not any(group["capturable"] for group in fitter.optimizer.param_groups)
    assert all(state["step"] == 2 for state in fitter.optimizer.state.values())
    assert all(state["step"].device.type == "cpu" for state in fitter.optimizer.state.values())
    assert fitter.running is None  # no copies for nothing


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_capture_that_stops_within_the_update(
    dtype: torch.dtype, max_grad_norm: float | None
) -> None:
    """Recording runs a stage's Python: what a half-run update leaves there is cleared away."""

    class Stops(Twin):
        def record(self, stage: Stage) -> Stage:
            step, fitter.optimizer.step = fitter.optimizer.step, stop
            try:
                stage()
            finally:
                fitter.optimizer.step = step
            return stage

    def stop() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    moved = []
    for capture in (Stops(), None):
        unet = pipelines.pipeline("sd-ddim", dtype).unet
        fitter = fitter_on(unet, capture)
        fitter.max_grad_norm = max_grad_norm
        with only_trainable(unet, fitter.subset):
            steps = [fitter.step(some_samples(i, dtype=dtype)) for i in range(3)]
        moved.append((weights(unet), fitter.scaler.state_dict(), [s.loss for s in steps]))
        if capture:
            assert "not permitted" in fitter.graphs[0].why_not
    assert moved[0][1:] == moved[1][1:]
    assert all(same_bits(moved[0][0][n], moved[1][0][n]) for n in moved[1][0])


def test_the_optimizer_is_capturable_where_capture_is_real() -> None:
    class Real(Twin):
        capturable = True

    fitter = fitter_on(pipelines.pipeline().unet, Real())
    assert all(group["capturable"] for group in fitter.optimizer.param_groups)
    assert CudaCapture.capturable
    assert graphs.WARM_UPS == 3
