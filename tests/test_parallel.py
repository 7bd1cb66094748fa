"""Two processes are one: to rounding in what they compute, and in whole in what they write, say and end by."""

import contextlib
import io
import math
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

import esd_fast
from esd_fast import EraseInterrupted, esd
from esd_fast.cli import main, parser
from esd_fast.collecting import collect_samples
from esd_fast.commands.launching import Place, place_of, placed
from esd_fast.commands.repeating import Repeated
from esd_fast.commands.train import config_of
from esd_fast.config import EraseConfig
from esd_fast.fit import Fitter
from esd_fast.graphed_steps import RunGraphs
from esd_fast.graphs import Twin
from esd_fast.models import load_model
from esd_fast.parallel import Ranks, buckets, joined
from esd_fast.plan import Rollout, share_of
from esd_fast.repeating import Recorded
from esd_fast.run_state import checkpoints_in, newest_state

from . import pipelines
from .pipelines import GOLDEN, assert_same_weights, weights

one_thread = pipelines.one_thread

# The rates are those of the published recipes.
SHORT: dict[str, Any] = {"iterations": 3, "num_inference_steps": 4, "learning_rate": 1e-5}
PRESERVING = {"preserve": ["a fish"], "preserve_weight": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "fast": {"learning_rate": 5e-5, "keep_vocabulary": 1.0},
    "reference": {"preset": "reference"},
    "preserve": {
        "concept": ["cat", "red apple"],
        "concept_weights": [1.0, 0.5],
        "max_grad_norm": 0.01,
        **PRESERVING,
    },
}
# What is preserved is off by rounding alone before the first step, and so is its gradient there: in
# float32 one process is as far from float64 as two are. The filter leaves components of about that
# size and no other, which Adam divides by their own size.
BY_GRADIENTS = {"learning_rate": 5e-5, "keep_vocabulary": 1.0, **PRESERVING}
DTYPE = torch.bfloat16
UNEVEN = 3  # rows to a batch of two processes
STOP = 2  # the step after which runs are stopped


def erase(pipe: Any = None, **settings: Any) -> Any:
    chosen = {"concept": "cat", "preset": "fast", "device": "cpu", **SHORT, **settings}
    return esd_fast.erase(pipe or pipelines.pipeline(), **chosen)


def noted(**settings: Any) -> tuple[Any, list[list[torch.Tensor]]]:
    """An erasure, and what its optimizer was given at each step: averaged, filtered, clipped."""
    given: list[list[torch.Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        given.append([tensor.grad.clone() for group in groups for tensor in group["params"]])

    hook = register_optimizer_step_pre_hook(note)
    try:
        return erase(**settings), given
    finally:
        hook.remove()


def collect(dtype: torch.dtype = DTYPE, **settings: Any) -> dict[str, torch.Tensor]:
    """One trajectory at a time: the same forwards, whoever runs them."""
    chosen = {"concept": ["cat", "red apple"], "preserve": ["a fish"], **SHORT, "iterations": 7}
    stored = collect_samples(
        pipelines.pipeline(dtype=dtype), collect_batch_size=1, **chosen, **settings
    )
    return {name: lazy.read().clone() for name, lazy in stored.tensors.items()}


def run_of(ranks: Ranks | None, batch_size: int, graphs: RunGraphs | None = None) -> Any:
    config = EraseConfig(concept="cat", batch_size=batch_size, device="cpu", **SHORT)
    model = load_model(pipelines.pipeline(), config)
    return esd.run(model, config, ranks=ranks, graphs=graphs).tensors


# --- what each of the two does --------------------------------------------------------------------------


def process(rank: int, folder: Path, ports: list[int], meet: Any) -> None:
    torch.set_num_threads(1)
    warnings.resetwarnings()  # a fork has pytest's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    for name, settings in CASES.items():
        erasure, given = noted(**settings)
        found[name] = erasure.tensors, erasure.manifest, given
    found["by gradients"] = noted(**BY_GRADIENTS)[1]
    found["samples"] = collect()
    with joined() as ranks:
        found["uneven"] = run_of(ranks, UNEVEN)
        found["eager"] = run_of(ranks, 2)
        found["twin"] = run_of(ranks, 2, RunGraphs(Twin(), Twin()))
    found["sick"] = sick(rank)
    found["unlike"] = failed(lambda: erase(seed=rank))
    found["stepped down"] = out_of_memory(rank)
    found["stopped"] = stopped(rank, folder / "checkpoints")
    found["resumed"] = erase(resume=folder / "checkpoints").tensors
    dist.destroy_process_group()
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
    )
    model = ["--model", str(GOLDEN / "sd-ddim"), "--pictures", "0"]
    short = ["--iterations", "2", "--num-inference-steps", "3"]
    what = ["train", "--concept", "cat", *short, "--output", str(folder / "out")]

    def both_say(name: str, *arguments: str) -> None:
        meet.wait(120)  # the store of the command before is gone
        os.environ["MASTER_PORT"] = str(ports.pop())
        found[name] = said(arguments)
        if dist.is_initialized():  # it failed, and a process would end here
            dist.destroy_process_group()

    both_say("command", *what, *model)
    again = ["--manifest", str(folder / "out"), "--output", str(folder / "again")]
    both_say("command again", "train", *again)
    both_say("both wrong", *what, *model)
    both_say(
        "one wrong",
        *what,
        "--overwrite",
        *(["--model", str(folder / "nowhere.ckpt")] if rank else model),
    )
    torch.save(found, folder / f"{rank}.pt")


def failed(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:  # noqa: BLE001 -- which one is the question
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sick(rank: int) -> tuple[str, bool]:
    """The loss of process 1 is no number; whether the model is as it was."""
    backward = Fitter.backward

    def broken(self: Fitter, samples: Any) -> Any:
        loss, student = backward(self, samples)
        return (loss * torch.nan if len(self.losses) == STOP and rank == 1 else loss), student

    pipe = pipelines.pipeline()
    start = weights(pipe)
    Fitter.backward = broken  # type: ignore[method-assign]
    try:
        why = failed(lambda: erase(pipe))
    finally:
        Fitter.backward = backward  # type: ignore[method-assign]
    assert_same_weights(pipe, start)
    return why


def out_of_memory(rank: int) -> Any:
    """Process 1 runs out of it once, while it collects."""
    passes = []

    def watch(progress: Any) -> None:
        passes.append(progress)
        if rank == 1 and len(passes) == STOP:
            raise torch.OutOfMemoryError("simulated")

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        erasure = erase(on_progress=watch)
    return erasure.tensors, erasure.manifest["paths_taken"]["checkpointing"]


def stopped(rank: int, folder: Path) -> Any:
    """Process 1 is sent SIGTERM."""

    def stop(step: Any) -> None:
        if rank == 1 and step.iteration + 1 == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        erase(checkpoints=folder, on_step=stop)
    except EraseInterrupted as caught:
        return len(caught.erasure.manifest["losses"]), caught.checkpoint
    return None


def said(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Of a command: its exit code, and what it told."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main([*arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), error.getvalue()


# --- what came of it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What the two found, by rank; they ran once."""
    folder = tmp_path_factory.mktemp("both")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(4)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in free]
    # forked, two need not import all anew, for many times the seconds of what they do; where there is
    # CUDA torch forbids it, once this process has been backward
    cheap = sys.platform == "linux" and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if cheap else "spawn")
    pipelines.pipeline()  # read once for all
    shared = folder, ports, context.Barrier(2)
    processes = [context.Process(target=process, args=(r, *shared)) for r in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
        each.kill()
    assert [each.exitcode for each in processes] == [0, 0]
    return folder, [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(2)]


def farthest(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == truth.keys()
    return max((ours[n] - truth[n]).abs().max().item() for n in truth)


def assert_near(ours: list[list[torch.Tensor]], truth: list[list[torch.Tensor]]) -> None:
    """Gradients of every step to 1e-6; the largest are of 1e-3 at least."""
    assert len(ours) == len(truth) == SHORT["iterations"]
    for step, wanted in zip(ours, truth, strict=True):
        apart = [(a - b).abs().max().item() for a, b in zip(step, wanted, strict=True)]
        assert max(apart) < 1e-6
        assert max(gradient.abs().max().item() for gradient in wanted) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_two_of_one_are_one_of_two(both: Any, name: str) -> None:
    """To 1e-6 in every weight, where the weights moved by more."""
    (ours, told, given), (theirs, told_too, _) = (found[name] for found in both[1])
    alone, given_alone = noted(**{**CASES[name], "batch_size": 2})
    assert farthest(ours, theirs) == 0
    assert_near(given, given_alone)
    if longest := CASES[name].get("max_grad_norm"):  # the clipping clips
        norms = [math.hypot(*(g.norm().item() for g in step)) for step in given]
        assert norms == pytest.approx([longest] * len(norms), rel=1e-4)
    assert farthest(ours, alone.tensors) < 1e-6
    start = weights(pipelines.pipeline())
    assert farthest(ours, {n: start[n] for n in ours}) > 1e-5
    for manifest in (told, told_too):
        assert manifest["losses"] == pytest.approx(alone.manifest["losses"], rel=1e-5)
        assert manifest["unet_passes"] == alone.manifest["unet_passes"]
        assert manifest["world_size"] == 2
        assert manifest["global_batch_size"] == manifest["config"]["batch_size"] == 2


def test_gradients_of_two_are_those_of_one(both: Any) -> None:
    """Filtered ones of what is preserved, which Adam makes weights of that are farther apart."""
    given = noted(**{**BY_GRADIENTS, "batch_size": 2})[1]
    for found in both[1]:
        assert_near(found["by gradients"], given)


def test_samples_come_in_the_order_of_one(both: Any) -> None:
    """An odd number of trajectories, of two concepts, and of what is preserved."""
    alone = collect(batch_size=2)
    for found in both[1]:
        ours = found["samples"]
        assert ours.keys() == alone.keys()
        assert all(torch.equal(ours[n], alone[n]) for n in alone)


def test_shares_that_differ_count_by_their_size(both: Any) -> None:
    assert farthest(both[1][0]["uneven"], run_of(None, UNEVEN)) < 1e-6


def test_what_is_captured_averages_nothing(both: Any) -> None:
    for found in both[1]:
        assert farthest(found["twin"], found["eager"]) == 0


def test_a_sick_number_stops_both(both: Any) -> None:
    first, second = (found["sick"] for found in both[1])
    assert first == "PeerFailed: process 1 failed"
    assert second.startswith(f"NonFiniteLoss: the loss is nan at iteration {STOP}")


def test_unlike_settings_are_refused_by_both(both: Any) -> None:
    for found in both[1]:
        assert found["unlike"].startswith("ValueError: process 1 has another seed than process 0")


def test_both_step_down(both: Any) -> None:
    for found in both[1]:
        ours, how = found["stepped down"]
        assert "memory ran out" in how
        assert farthest(ours, found["eager"]) < 1e-6


def test_a_signal_to_one_stops_both_and_both_go_on(both: Any) -> None:
    """To the bits of a run without a stop; one process alone to its rounding."""
    folder, (first, second) = both
    assert first["stopped"] == (STOP, folder / "checkpoints" / f"checkpoint-{STOP:08d}.safetensors")
    assert second["stopped"] == (STOP, None)
    (checkpoint,) = checkpoints_in(folder / "checkpoints")
    assert newest_state(checkpoint).world_size == 2
    for found in (first, second):
        assert farthest(found["resumed"], first["eager"]) == 0
    alone = erase(resume=checkpoint, batch_size=2)
    assert farthest(alone.tensors, first["eager"]) < 1e-6
    assert alone.manifest["world_size"] == 1


def test_one_writes_and_speaks(both: Any) -> None:
    folder, (first, second) = both
    code, out, error = first["command"]
    assert code == 0
    assert '"cat" erased' in out
    assert "fit" in error  # the bar
    assert second["command"] == (0, "", "")
    files = {path.name for path in (folder / "out").iterdir()}
    assert {"manifest.json", "report.html"} < files
    assert len([name for name in files if name.startswith("esd-")]) == 1
    assert Recorded(folder / "out", {"world_size": 2}).processes == 2
    code, out, _ = first["command again"]
    assert code == 0
    assert "the same bits as" in out
    assert second["command again"] == (0, "", "")


def test_an_error_is_said_once(both: Any) -> None:
    _, (first, second) = both
    for found, name in ((first, "both wrong"), (second, "one wrong")):
        code, out, error = found[name]
        assert (code, out) == (2, "")
        assert error.startswith("esd-fast: ")
        assert error.count("\n") == 1
    assert "holds the results of a run" in first["both wrong"][2]
    assert "nowhere" in second["one wrong"][2]
    assert second["both wrong"] == (1, "", "")
    code, _, error = first["one wrong"]
    assert code == 1
    assert "esd-fast: " not in error


# --- bookkeeping, in this process alone ---------------------------------------------------------------------


def test_every_trajectory_has_one_process() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = (1, 3, 2, 1, 5)
    rollouts = [
        Rollout(
            torch.randn(b, 4, 2, 2, generator=generator),
            i,
            concepts=tuple(range(10 * i, 10 * i + b)),
        )
        for i, b in enumerate(batches)
    ]
    assert share_of(rollouts, 0, 1) is rollouts
    for size in (2, 3, 4, 20):
        shares = [share_of(rollouts, rank, size) for rank in range(size)]
        counts = [sum(len(r.noise) for r in share) for share in shares]
        assert sum(counts) == sum(batches)
        assert max(counts) - min(counts) <= 1
        rows = {k: r.noise[j] for s in shares for r in s for j, k in enumerate(r.concepts)}
        for rollout in rollouts:
            for row, concept in zip(rollout.noise, rollout.concepts, strict=True):
                assert torch.equal(rows[concept], row)


def test_one_process_says_nothing() -> None:
    ranks, error = Ranks(), RuntimeError()
    assert ranks.agree(3.0) == ([3.0], False)
    assert ranks.mean(0.1, 3) == (0.1, 3)
    assert ranks.everyones("x") == ["x"]
    gradient = torch.ones(2)
    ranks.average([gradient], 0.5)
    ranks.tell(error)
    assert gradient.tolist() == [1, 1]
    with joined() as alone:
        assert alone == Ranks()


def test_buckets_hold_all_in_order() -> None:
    tensors = [torch.zeros(n) for n in (3, 4, 9, 1, 1, 8)]
    found = list(buckets(tensors, most=8))
    assert [[t.numel() for t in bucket] for bucket in found] == [[3, 4], [9], [1, 1], [8]]


def test_which_process_this_is() -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert place_of({}) == place_of({"WORLD_SIZE": "8"}) == Place()
    assert place_of({**launched, "RANK": "0", "WORLD_SIZE": "1"}) == Place()
    assert place_of(launched) == Place(3, 4, 3, 4)
    here = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place_of({**launched, **here}) == Place(3, 4, 1, 2)
    wrong = (
        ("RANK", "x"),
        ("RANK", "4"),
        ("WORLD_SIZE", "-1"),
        ("MASTER_ADDR", ""),
        ("LOCAL_RANK", "4"),
    )
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"^{name} is '?{value}"):
            place_of({**launched, name: value})


def test_the_batch_of_all_and_of_each() -> None:
    config = EraseConfig(concept="cat", batch_size=3)
    assert Ranks(0, 2).whole(config).batch_size == 6
    assert Ranks(1, 2).own(config).batch_size == 2
    with pytest.raises(ValueError, match="batch is 3 in all and there are 4 processes"):
        Ranks(0, 4).check_batch(config)
    command = ["train", "--concept", "cat"]
    preset = config_of(parser().parse_args(command)).batch_size
    given = [*command, "--batch-size", "5"]
    assert config_of(parser().parse_args(command), processes=2).batch_size == 2 * preset
    assert config_of(parser().parse_args(given), processes=2).batch_size == 10
    for bad in ("0", "6000"):
        with pytest.raises(ValueError, match=f"--batch-size is {bad}"):
            config_of(parser().parse_args([*command, "--batch-size", bad]), processes=2)


def test_a_run_done_again_says_what_will_differ(capsys: Any) -> None:
    config = EraseConfig(concept="cat", batch_size=2)
    run = Recorded(Path("m.json"), {"world_size": 2})
    arguments = parser().parse_args(["train", "--manifest", "m.json"])
    again = config_of(arguments, repeated=Repeated(run, config, None, False))
    assert again.batch_size == 2
    told = capsys.readouterr().err
    assert "made by 2 processes, now 1: the same batches, rounded otherwise" in told


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_device_for_each(device: str) -> None:
    config = EraseConfig(concept="cat", batch_size=2, device=device)
    with pytest.raises(ValueError, match=f"--device is '{device}'"):
        placed(config, Ranks(0, 2), device)
    assert placed(config, Ranks(), device) is config
    assert placed(replace(config, device="cpu"), Ranks(1, 2), "cpu").device == "cpu"
