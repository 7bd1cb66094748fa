"""A run that was stopped, anywhere and by anything, goes on to the bits of one that was not."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import esd_fast
from esd_fast import EraseInterrupted, Progress, ops, run_state, tensor_files
from esd_fast.cli import main
from esd_fast.erasure import Erasure
from esd_fast.fit import NonFiniteLoss
from esd_fast.interrupts import held_back
from esd_fast.parameters import TrainableSubset, trainable_names
from esd_fast.run_state import STATE_KEY, CheckpointError, checkpoints_in, config_in, newest_state

from . import pipelines
from .pipelines import assert_same_weights, same_bits

one_thread = pipelines.one_thread


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a foreground process; where a shell started this one in the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


SHORT: dict[str, Any] = {
    "iterations": 5,
    "num_inference_steps": 4,
    "learning_rate": 1e-3,
    "batch_size": 2,
}
STEPS = 40  # of the runs that are killed
POLICIES: dict[str, dict[str, Any]] = {
    "fast": {},
    "reference": {"preset": "reference"},
    "paper": {"preset": "paper"},
    "paper-diffusers": {"preset": "paper-diffusers"},
    "concepts": {"concept": ["cat", "red apple"], "concept_weights": [1.0, 0.5]},
    "concepts-paper": {"concept": ["cat", "red apple"], "preset": "paper"},
    "erase-from": {"erase_from": "a fish", "max_grad_norm": 0.1},
    "keep-vocabulary": {"keep_vocabulary": 1.0},
    "preserve": {"preserve": ["a fish", "bicycle"], "erase_from": "animal"},
}


def erase(folder: Path | None = None, pipe: Any = None, **settings: Any) -> Erasure:
    chosen = {"concept": "cat", "preset": "fast", **SHORT, **settings}
    return esd_fast.erase(pipe or pipelines.pipeline(), checkpoints=folder, **chosen)


KNOWN: dict[str, Erasure] = {}


def straight(**settings: Any) -> Erasure:
    """Without a stop; made once."""
    key = repr(sorted(settings.items()))
    if key not in KNOWN:
        KNOWN[key] = erase(**settings)
    return KNOWN[key]


def stopping_at(step: int) -> Any:
    def stop(taken: Any) -> None:
        if taken.iteration + 1 == step:
            raise KeyboardInterrupt

    return stop


def stopped(folder: Path, step: int, **settings: Any) -> EraseInterrupted:
    with pytest.raises(EraseInterrupted) as interrupted:
        erase(folder, on_step=stopping_at(step), **settings)
    return interrupted.value


def assert_same(ours: Erasure, truth: Erasure) -> None:
    assert ours.tensors.keys() == truth.tensors.keys()
    assert all(same_bits(t, truth.tensors[n]) for n, t in ours.tensors.items())
    for told in ("losses", "unet_passes", "skipped_steps"):
        assert ours.manifest[told] == truth.manifest[told]
    assert ours.manifest["interrupted"] is False


# --------------------------------------------------------------------------------- N + M steps are N+M straight


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy(policy: str, tmp_path: Path) -> None:
    settings, step = POLICIES[policy], 3
    interruption = stopped(tmp_path, step, **settings)
    assert interruption.checkpoint == tmp_path / f"checkpoint-{step:08d}.safetensors"
    assert len(interruption.erasure.manifest["losses"]) == step
    ours = erase(resume=tmp_path, **settings)
    assert_same(ours, straight(**settings))
    assert ours.manifest["resumed_at"] == [step]


@pytest.mark.parametrize("name", ["adam", "adamw", "adam8bit", "adamw8bit"])
@pytest.mark.parametrize("method", ["esd-x", "esd-u"])
def test_each_optimizer(name: str, method: str, tmp_path: Path) -> None:
    """esd-u: convolutions too, whose moments lie as their weights do."""
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    settings = {"optimizer": name, "train_method": method}
    stopped(tmp_path, 3, **settings)
    ours = erase(resume=tmp_path, **settings)
    assert_same(ours, straight(**settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_weights_of_less_than_their_masters(
    dtype: torch.dtype, preset: str, tmp_path: Path
) -> None:
    def run(folder: Path | None = None, **more: Any) -> Erasure:
        pipe = pipelines.pipeline(dtype=dtype)
        return erase(folder, pipe, preset=preset, **more)

    with pytest.raises(EraseInterrupted):
        run(tmp_path, on_step=stopping_at(2))
    assert_same(run(resume=tmp_path), run())


def test_the_loss_scale_and_its_skipped_steps(tmp_path: Path) -> None:
    far = {"negative_guidance": 3e4, "iterations": 9}

    def run(folder: Path | None = None, **more: Any) -> Erasure:
        return erase(folder, pipelines.pipeline(dtype=torch.float16), **far | more)

    truth = run()
    assert truth.manifest["skipped_steps"] > 3  # steps of both runs are skipped
    with pytest.raises(EraseInterrupted):
        run(tmp_path, on_step=stopping_at(3))
    assert newest_state(tmp_path).skipped_in_a_row == 3
    assert_same(run(resume=tmp_path), truth)


@pytest.mark.parametrize("pipe_name", ["sd-pndm", "sd-v-ddim"])
def test_stopped_after_every_single_step(pipe_name: str, tmp_path: Path) -> None:
    settings = {"iterations": 4, "preset": "paper-diffusers"}
    stopped(tmp_path, 1, pipe=pipelines.pipeline(pipe_name), **settings)
    for step in (2, 3):
        pipe = pipelines.pipeline(pipe_name)
        stopped(tmp_path, step, pipe=pipe, resume=tmp_path, **settings)
    ours = erase(resume=tmp_path, pipe=pipelines.pipeline(pipe_name), **settings)
    assert ours.manifest["resumed_at"] == [1, 2, 3]
    assert_same(ours, erase(pipe=pipelines.pipeline(pipe_name), **settings))


def collecting_anew(folder: Path, **settings: Any) -> tuple[Erasure, int]:
    passes: list[Progress] = []
    ours = erase(resume=folder, on_progress=passes.append, **settings)
    return ours, sum(p.phase == "collect" for p in passes)


@pytest.mark.parametrize("preset", ["fast", "reference"])
def test_stopped_within_collecting_it_collects_again(preset: str, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(EraseInterrupted):
        erase(tmp_path, preset=preset, on_progress=stop)
    ours, asked = collecting_anew(tmp_path, preset=preset)
    assert_same(ours, straight(preset=preset))
    assert asked > 0


def test_what_was_collected_is_not_collected_again(tmp_path: Path) -> None:
    stopped(tmp_path, 1)
    assert collecting_anew(tmp_path)[1] == 0


def test_speed_and_memory_may_be_others(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    ours = erase(resume=tmp_path, checkpointing="all", collect_batch_size=1, cuda_graphs="off")
    assert_same(ours, straight())


def test_a_live_pipeline_is_left_erased_and_can_be_reverted(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    ours = erase(resume=tmp_path, pipe=pipe)
    assert all(same_bits(pipe.unet.get_parameter(n), t) for n, t in ours.tensors.items())
    ours.revert(pipe)
    assert_same_weights(pipe, before)


# ------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_checkpoints_come_every_n_steps_and_the_newest_two_stay(
    preset: str, tmp_path: Path
) -> None:
    seen: dict[int, list[str]] = {}

    def look(step: Any) -> None:
        seen[step.iteration + 1] = [path.stem[-2:] for path in checkpoints_in(tmp_path)]

    truth = erase(tmp_path, checkpoint_every=2, on_step=look, preset=preset)
    first = ["00"] if preset == "fast" else []  # when all samples were there
    assert seen == {
        1: first,
        2: ["02", *first],
        3: ["02", *first],
        4: ["04", "02"],
        5: ["04", "02"],
    }
    assert {p.name[:10] for p in tmp_path.iterdir()} == {"checkpoint"}  # and nothing else
    for file in checkpoints_in(tmp_path):
        copy = tmp_path / "copy" / file.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
        assert_same(erase(resume=copy, preset=preset), truth)


def test_a_resumed_run_keeps_on_writing_as_often_as_before(tmp_path: Path) -> None:
    with suppress(EraseInterrupted):
        erase(tmp_path, checkpoint_every=3, on_step=stopping_at(1))
    erase(resume=tmp_path)
    assert newest_state(tmp_path).step == 3


def test_nothing_is_written_where_nobody_asks(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EraseInterrupted) as interrupted:
        erase(on_step=stopping_at(2))
    assert interrupted.value.checkpoint is None
    assert not list(tmp_path.iterdir())


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)


def headless(file: Path) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def altered(file: Path) -> None:
    """A digit of a loss, with every length as it was."""
    content = file.read_bytes()
    at = content.index(b"losses") + content[content.index(b"losses") :].index(b"0.") + 4
    digit = b"1" if content[at : at + 1] != b"1" else b"2"
    file.write_bytes(content[:at] + digit + content[at + 1 :])


def another(file: Path) -> None:
    save_file({"masters": torch.zeros(3)}, file)


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, headless, altered, another])
def test_where_the_newest_is_damaged_the_one_before_is_taken(damage: Any, tmp_path: Path) -> None:
    with suppress(EraseInterrupted):
        erase(tmp_path, checkpoint_every=1, on_step=stopping_at(3))
    newest, before = checkpoints_in(tmp_path)
    damage(newest)
    with pytest.warns(UserWarning, match=f"{newest.name} is .*; going on from {before.name}"):
        ours = erase(resume=tmp_path)
    assert ours.manifest["resumed_at"] == [2]
    assert_same(ours, straight())
    for file in checkpoints_in(tmp_path):  # the damaged one was written anew, or went
        newest_state(file)
        damage(file)
    with pytest.raises(ValueError, match=r"checkpoint-00000005.*; .*checkpoint-00000004"):
        erase(resume=tmp_path)


def test_a_file_of_another_run_is_refused_in_one_line(tmp_path: Path) -> None:
    stopped(tmp_path, 2)
    for change, said in (
        ({"learning_rate": 2e-3}, "another config: learning_rate 0.001, now 0.002"),
        ({"concept": "dog"}, "another config: concept 'cat', now 'dog'"),
        ({"iterations": 6}, "another config: iterations 5, now 6"),
        ({"pipe": pipelines.pipeline(dtype=torch.bfloat16)}, "another base"),
        ({"pipe": pipelines.pipeline("sd-v-ddim")}, "another base"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            erase(resume=tmp_path, **change)
        assert "\n" not in str(refused.value)
    for part in ("unet", "text_encoder"):
        pipe = pipelines.pipeline()
        with torch.no_grad():  # the last bit of a weight that is not trained
            weight = next(getattr(pipe, part).parameters()).view(torch.int32)
            weight.view(-1)[0] ^= 1
        with pytest.raises(ValueError, match="another base"):
            erase(resume=tmp_path, pipe=pipe)


def test_a_file_of_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    (file,) = [stopped(tmp_path, 2).checkpoint]
    assert file is not None
    metadata = tensor_files.open_safetensors(file).metadata
    state = json.loads(metadata[STATE_KEY]) | {"format": 2}
    save_file(load_file(file), file, metadata | {STATE_KEY: json.dumps(state)})
    with pytest.raises(ValueError, match="has version 2 of the format; this esd-fast reads 1"):
        erase(resume=tmp_path)


def test_bad_arguments_are_found_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: Any
) -> None:
    stopped(tmp_path / "old", 1)
    monkeypatch.setattr("esd_fast.esd.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="checkpoint_every is 0; it must be a whole number"):
        erase(tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="checkpoint_every is 2 without a folder"):
        erase(checkpoint_every=2)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        erase(resume=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        erase(resume=tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="holds checkpoints of a run: resume goes on"):
        erase(tmp_path / "old")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint can be written to"):
        erase(tmp_path / "file")


# --------------------------------------------------------------------------------------- what a disk can do


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write more, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_last_is_whole(folder: Path, step: int, **settings: Any) -> None:
    assert [path.name for path in checkpoints_in(folder)] == [f"checkpoint-{step:08d}.safetensors"]
    assert not list(folder.glob("*.part"))
    assert_same(erase(resume=folder, **settings), straight(**settings))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_disk_full(share: float, tmp_path: Path) -> None:
    """Refused within the header, the tensors, or shortly before the end."""
    file = stopped(tmp_path, 1).checkpoint
    assert file is not None
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    limit = int(share * file.stat().st_size)
    with (
        files_of_at_most(limit),
        pytest.raises(CheckpointError, match="no checkpoint") as refused,
    ):
        erase(resume=tmp_path, pipe=pipe, checkpoint_every=2)
    assert os.strerror(errno.EFBIG) in str(refused.value)
    assert_same_weights(pipe, before)
    assert_last_is_whole(tmp_path, 1)


def test_disk_full_on_ctrl_c_still_hands_out_the_work(tmp_path: Path) -> None:
    stopped(tmp_path, 1)
    with (
        files_of_at_most(1000),
        pytest.warns(UserWarning, match=r"no checkpoint of step 3 .*; the last one is .*00001"),
    ):
        interruption = stopped(tmp_path, 3, resume=tmp_path)
    assert interruption.checkpoint is None
    assert len(interruption.erasure.manifest["losses"]) == 3
    assert_last_is_whole(tmp_path, 1)


def test_a_folder_that_vanishes_is_not_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "mount"

    def unmount(step: Any) -> None:
        if step.iteration == 1:
            folder.rename(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match=r"step 3 in .*mount: the folder is gone"):
        erase(folder, checkpoint_every=1, on_step=unmount)
    assert not folder.exists()
    assert_same(erase(resume=tmp_path / "elsewhere"), straight())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=os.strerror(errno.EACCES)):
        erase(tmp_path, checkpoint_every=2, on_step=lambda _: tmp_path.chmod(0o500))
    tmp_path.chmod(0o700)
    assert_same(erase(resume=tmp_path), straight())


def test_no_checkpoint_holds_what_is_no_number(tmp_path: Path) -> None:
    pipe = pipelines.pipeline()
    before = pipelines.weights(pipe)
    parameter = pipe.unet.get_parameter(trainable_names(pipe.unet, "esd-x")[3])
    calls = iter(range(100))
    parameter.register_hook(lambda g: g * (math.inf if next(calls) == 2 else 1.0))
    with pytest.raises(NonFiniteLoss, match=r"1 of 20 trained tensors .* after iteration 2"):
        erase(tmp_path, pipe, checkpoint_every=1)
    assert_same_weights(pipe, before)
    assert_last_of_two_is_whole(tmp_path, 2)


def assert_last_of_two_is_whole(folder: Path, step: int) -> None:
    assert newest_state(folder).step == step
    assert_same(erase(resume=folder), straight())


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_an_update_waits_for_its_end(
    number: signal.Signals, tmp_path: Path, monkeypatch: Any
) -> None:
    """Masters moved, weights and losses not yet: such a state would be neither step's."""
    whole, calls = TrainableSubset.masters_to_parameters, iter(range(100))

    def stop(subset: TrainableSubset, names: Any = None) -> None:
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        whole(subset, names)

    truth = straight()
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        patched.setattr(TrainableSubset, "masters_to_parameters", stop)
        with pytest.raises(EraseInterrupted) as interrupted:
            erase(tmp_path)
    assert len(interrupted.value.erasure.manifest["losses"]) == 3
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(erase(resume=tmp_path), truth)


def test_a_signal_that_was_held_back_comes_once() -> None:
    reached = []

    def work() -> None:
        with held_back():
            for part in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                reached.append(part)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [0, 1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_was_held_back_comes_after_an_error_too() -> None:
    def work() -> None:
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
            raise NonFiniteLoss("within")

    with pytest.raises(KeyboardInterrupt) as came:
        work()
    assert isinstance(came.value.__context__, NonFiniteLoss)


def test_an_interrupt_before_the_state_was_taken_up_leaves_it(
    tmp_path: Path, monkeypatch: Any
) -> None:
    stopped(tmp_path, 3)

    @contextmanager
    def interrupted(*_: Any) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patched:
        patched.setattr("esd_fast.esd.only_trainable", interrupted)
        with pytest.raises(EraseInterrupted):
            erase(resume=tmp_path)
    assert_last_is_whole(tmp_path, 3)


# -------------------------------------------------------------------------------------------------- kill -9


def killed_run(folder: str, within_write: int) -> None:
    """In a process of its own, which kills itself within that write, if any."""
    torch.set_num_threads(1)
    writes = iter(range(1000))

    def writing(target: Path, tensors: Any, metadata: Any) -> None:
        number, halfway = next(writes), sorted(tensors)[len(tensors) // 2]

        def before(name: str) -> None:
            if number == within_write and name == halfway:
                os.kill(os.getpid(), signal.SIGKILL)

        tensor_files.write_tensors(target, tensors, metadata, before)

    run_state.write_tensors = writing
    place = Path(folder)
    again = {"resume": place} if checkpoints_in(place) else {"folder": place}
    with ops.forced("torch"):  # it may find the source folder, without the native module
        erase(**again, checkpoint_every=1, iterations=STEPS)  # type: ignore[arg-type]


def test_killed_again_and_again(tmp_path: Path) -> None:
    """At a moment that nobody chose, and within writes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    chance, step = random.Random(0), 0
    for within_write in (-1, 2, 0):
        process = context.Process(target=killed_run, args=(str(tmp_path), within_write))
        process.start()
        aim = step + chance.randrange(2, 8)
        while within_write < 0 and process.is_alive() and steps_in(tmp_path) < aim:
            time.sleep(0.001)
        if within_write < 0:
            time.sleep(chance.random() * 0.02)
            process.kill()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        if within_write >= 0:
            assert len(list(tmp_path.glob("*.part"))) == 1
            assert newest_state(tmp_path).step == step + within_write
        step = newest_state(tmp_path).step
        assert 2 <= step < STEPS
    with ops.forced("torch"):
        assert_same(erase(resume=tmp_path, iterations=STEPS), erase(iterations=STEPS))
    assert not list(tmp_path.glob("*.part"))


def steps_in(folder: Path) -> int:
    return max((int(path.stem[-8:]) for path in checkpoints_in(folder)), default=0)


# ----------------------------------------------------------------------------------------- the command line


@pytest.fixture
def train(monkeypatch: Any, capsys: Any) -> Any:
    """train(*arguments, sigterm_at=step): exit code, what was said."""
    monkeypatch.setattr("esd_fast.commands.train.keep_pages", lambda: None)  # of the process
    monkeypatch.setattr("esd_fast.commands.train.quiet_libraries", lambda: None)

    def run(*arguments: Any, sigterm_at: int = 0) -> tuple[int, str]:
        def show(_: Any, phase: str, done: int, *__: Any) -> None:
            if phase == "fit" and done == sigterm_at:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr("esd_fast.commands.console.Bars.show", show)
        capsys.readouterr()
        code = main(["train", *map(str, arguments), "--pictures", "0"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_command_goes_on_after_sigterm(train: Any, tmp_path: Path) -> None:
    model = ["--concept", "cat", "--model", pipelines.GOLDEN / "sd-ddim"]
    settings = [*model, "--iterations", 6, "--num-inference-steps", 4, "--seed", 3]
    assert train(*settings, "--output", tmp_path / "straight")[0] == 0
    straight = esd_fast.load(tmp_path / "straight")
    folder = tmp_path / "it's cut"

    code, said = train(*settings, "--output", folder, "--checkpoint-every", 2, sigterm_at=3)
    assert code == 130
    assert "interrupted after 3 of 6 steps" in said
    assert f"esd-fast train --resume {shlex.quote(str(folder))} goes on" in said
    assert len(esd_fast.load(folder).manifest["losses"]) == 3  # the work so far
    assert [path.stem[-1] for path in checkpoints_in(folder)] == ["3", "2"]

    code, said = train(*settings, "--output", folder)
    assert (code, "--resume" in said, "--overwrite" in said) == (2, True, True)
    code, said = train("--resume", folder, "--learning-rate", 1)
    assert (code, "another config: learning_rate 5e-05, now 1.0" in said) == (2, True)
    code, said = train("--resume", folder, "--output", tmp_path / "straight")
    assert (code, "with --resume results go to" in said) == (2, True)
    code, said = train("--resume", tmp_path / "straight")
    assert (code, "a finished run keeps none" in said) == (2, True)
    code, said = train("--resume", folder, "--harden", 1)
    assert (code, "--harden is 1; it must be 0 with checkpoints" in said) == (2, True)
    code, said = train()
    assert (code, "what to erase is missing" in said) == (2, True)

    assert train("--resume", folder, sigterm_at=5)[0] == 130
    code, said = train("--resume", folder)
    assert (code, "going on from step 5" in said) == (0, True)
    assert not checkpoints_in(folder)
    assert_same(esd_fast.load(folder), straight)
    assert esd_fast.load(folder).manifest["resumed_at"] == [3, 5]


def test_a_state_cannot_consent_to_pickles(tmp_path: Path) -> None:
    stopped(tmp_path, 1)
    state = newest_state(tmp_path)
    wanting = replace(state.identity, config=state.identity.config | {"allow_pickle": True})
    assert config_in(replace(state, identity=wanting)).allow_pickle is False
