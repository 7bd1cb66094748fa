"""Every argument of every command with values that will not do: one line, code 2 (1 where it is no usage), no
traceback, and nothing written. The parsers are walked: an argument without a case fails."""

import argparse
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esd_fast.cli import main, parser
from esd_fast.commands.train import WRITTEN
from esd_fast.erasure import Erasure

from . import pipelines
from .pipelines import GOLDEN

one_thread = pipelines.one_thread
Result = tuple[int, str, str]

HUGE = "9" * 5000  # more digits than Python converts
COUNT = ["0", "-1", "1.5", "nan", "x", "", HUGE, str(10**12)]
NUMBER = ["nan", "inf", "-inf", "1e999", "x", ""]
POSITIVE = [*NUMBER, "0", "-1"]
SEED = ["-1", str(2**63), "1.5", HUGE]
PIXELS = [*COUNT, "63", str(8 * 10**9)]
CHOICE = ["", "no-such", "\x1b[31m", "x" * 100_000]
TEXT = ["", " ", "\u200b", "\udcff"]
# a folder that is none, a file that is none, loops, names that no file system takes
OUTPUT = ["", "a\0b", "file", "file/inside", "loop", "x" * 300]
MODEL = [
    "",
    "a\0b",
    "./gone",
    "/no/such",
    "file",
    "folder",
    "loop",
    "./" + "x" * 5000,
    "\x1b[2J./x",
]
ERASURE = ["", "a\0b", "gone", "file", "folder", "loop", "cut.safetensors", "x" * 300]
DEVICE = ["", "toaster", "cuda:99", "cpu:-1", "\x1b[31m"]
SIZE = ["", "0GB", "-1GB", "x", "8", "1e9GB", "9" * 400 + "GB", "nanGB"]
FLAG = ["=yes"]  # glued to it: flags take no value
FREE: list[str] = []  # any text will do

# by the name that argparse stores an argument under
BAD: dict[str, list[str]] = {
    "concept": TEXT,
    "concepts_file": ["", "gone", "folder", "loop", "binary", "blank"],
    "erase_from": TEXT,
    "concept_weights": [*POSITIVE, "1"],
    "model": MODEL,
    "variant": ["", "no-such", "../x", "\0"],
    "ema": CHOICE,
    "prediction_type": CHOICE,
    "model_config": ["", "folder"],  # of a folder of weights none is of use
    "preserve": TEXT,
    "preserve_file": ["", "gone", "folder", "loop", "binary", "blank"],
    "preserve_weight": [*NUMBER, "-1"],
    "samples_file": ["", "gone", "folder", "file", "loop", "cut.safetensors"],
    "output": OUTPUT,
    "checkpoint_every": ["0", "-1", "x", HUGE],
    "resume": ["", "gone", "folder", "file", "loop", "cut.safetensors"],
    "preset": CHOICE,
    "train_method": ["", "no-such", "attn2(", "a{9999999999}", "\x1b[31m", "zzz.*"],
    "iterations": COUNT,
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "optimizer": CHOICE,
    "quantize": CHOICE,
    "weight_decay": [*NUMBER, "-1", "0.1"],
    "max_grad_norm": [*NUMBER, "-1"],
    "negative_guidance": NUMBER,
    "anchor": CHOICE,
    "guidance_scale": NUMBER,
    "num_inference_steps": [*COUNT, "1001"],
    "keep_vocabulary": [*NUMBER, "-1"],
    "harden": ["-1", "x", "", HUGE, str(10**12)],
    "collect_batch_size": COUNT,
    "vram": SIZE,
    "checkpointing": CHOICE,
    "resolution": PIXELS,
    "seed": SEED,
    "dtype": CHOICE,
    "device": DEVICE,
    "cuda_graphs": CHOICE,
    "keep_prompt": TEXT,
    "manifest": ["", "gone", "folder", "file", "loop"],
    "pictures": ["", "gone", "file", "folder", "loop"],
    # the reference's, most of which go with --prompt alone
    "save_path": ["", "file", "file/inside", "loop"],
    "start_guidance": ["nan", "x", "3"],
    "image_size": ["63", "x", "64"],
    "ddim_steps": ["0", "x", "3"],
    "seperator": [","],
    "devices": ["0,1", "x"],
    "ckpt_path": ["", "gone"],
    "regularize": ["1", "x"],
    # drawing
    "prompt": TEXT,
    "prompts": ["", "gone.csv", "folder", "loop", "binary", "blank"],
    "erasure": ERASURE,
    "erasures": ERASURE,
    "images": COUNT,
    "from_case": ["x", "3", HUGE],
    "till_case": ["x", "3", HUGE],
    "strength": NUMBER,
    # eval and attack
    "object": TEXT,
    "style": TEXT,
    "erased": TEXT,
    "metric": CHOICE,
    "clip": ["", "./gone", "/no/such", "a\0b"],
    "nudenet_threshold": [*NUMBER, "0", "1", "-1"],
    "inception": ["", "gone", "folder"],
    "reference": ["", "gone", "file", "folder", "loop"],
    "paraphrases": ["", "gone", "folder", "binary", "blank"],
    "control": TEXT,
    "train_data_dir": ["", "gone", "file", "folder", "loop"],
    "learnable_property": CHOICE,
    "initializer_token": ["two words"],
    "max_train_steps": COUNT,
    "train_batch_size": COUNT,
    # verify, export, diff, info
    "file": ["", "a\0b", "gone", "loop", "folder"],
    "format": CHOICE,
    "rank": COUNT,
    "energy": [*POSITIVE, "1.5"],
    "a": ["", "a\0b", "./gone", "folder", "file", "cut.safetensors"],
    "b": ["", "a\0b", "./gone", "folder", "file", "cut.safetensors"],
    "path": ["", "a\0b", "gone", "file", "folder", "loop", "cut.safetensors"],
    # fleet
    "jobs": ["", "a\0b", "gone", "folder", "file", "loop", "binary", "blank"],
    "workers": COUNT,
    "address": FREE,  # Ray's
    # flags
    **dict.fromkeys(
        ("overwrite", "allow_pickle", "allow_other_base", "no_grid", "json", "debug"), FLAG
    ),
    # taken and not read, as the reference's own command lines name them
    "config_path": FREE,
    "diffusers_config_path": FREE,
}
# what differs in one command
OF_COMMAND: dict[tuple[str, str], list[str]] = {
    ("train", "pictures"): ["-1", "x", "1.5", HUGE, "101"],
    ("train", "prompt"): TEXT,
    ("info", "model"): [v for v in MODEL if v != "folder"] + ["folder"],
    ("verify", "images"): ["-1", "x", HUGE, str(10**12)],
    ("plan", "dtype"): [*CHOICE, "auto"],
    ("plan", "device"): FREE,
    ("attack", "concept"): TEXT,
    ("export", "output"): ["", "a\0b", "folder", "file", "loop", "good.safetensors"],
    ("apply", "output"): ["", "a\0b", "file", "loop/x", "tiny"],
    ("export", "model"): MODEL,
}
QUICK = ["--model", "tiny", "--device", "cpu", "--num-inference-steps", "2"]
# a command line of each command that is right but for the argument in question
RIGHT: dict[str, list[str]] = {
    "train": ["--concept", "cat", *QUICK, "--iterations", "1", "--pictures", "0"],
    "collect": ["--concept", "cat", *QUICK, "--iterations", "1"],
    "generate": ["--prompt", "cat", "--images", "1", *QUICK],
    "eval": ["good.safetensors", "--prompt", "cat", "--images", "1", *QUICK],
    "verify": ["good.safetensors", *QUICK],
    "attack": ["good.safetensors", "--images", "1", "--max-train-steps", "1", *QUICK],
    "export": ["good.safetensors", "--format", "lora", "--model", "tiny", "--output", "o.safetensors"],
    "apply": ["good.safetensors", "--model", "tiny", "--output", "o"],
    "diff": ["good.safetensors", "good.safetensors"],
    "info": ["good.safetensors"],
    "plan": ["--model", "tiny"],
    "fleet": ["jobs.jsonl", *QUICK, "--iterations", "1", "--output", "o"],
}  # fmt: skip
# with what an argument can be said at all, in place of the above
INSTEAD: dict[tuple[str, str], list[str]] = {
    ("train", "manifest"): ["--device", "cpu"],
    ("train", "concept"): RIGHT["train"][2:],
    ("train", "concepts_file"): RIGHT["train"][2:],
    ("train", "prompt"): RIGHT["train"][2:],
    ("train", "concept_weights"): ["--concept", "dog", *RIGHT["train"]],
    ("train", "regularize"): ["--prompt", "cat", *RIGHT["train"][2:]],
    ("collect", "concept"): RIGHT["collect"][2:],
    ("collect", "concepts_file"): RIGHT["collect"][2:],
    ("train", "samples_file"): ["--device", "cpu"],
    ("generate", "prompt"): RIGHT["generate"][2:],
    ("generate", "prompts"): RIGHT["generate"][2:],
    ("eval", "prompts"): ["good.safetensors", *QUICK],
    ("eval", "prompt"): ["good.safetensors", *QUICK],
    ("eval", "pictures"): [],
    ("info", "model"): [],
    **{("info", name): ["--model", "tiny"] for name in ("variant", "model_config")},
}


def arguments() -> Iterator[tuple[str, argparse.Action]]:
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        if name == "app":  # serves until it is stopped; tests/app has what it refuses
            continue
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                yield name, action


ALL = [(command, action) for command, action in arguments()]


def bad_values(command: str, name: str) -> list[str]:
    return OF_COMMAND.get((command, name), BAD.get(name, []))


def command_line(command: str, action: argparse.Action, value: str) -> list[str]:
    right = INSTEAD.get((command, action.dest), RIGHT[command])
    if action.nargs == 0:
        return [command, *right, max(action.option_strings, key=len) + value]
    if action.option_strings:  # glued, since a value may begin with a dash
        return [command, *right, f"{action.option_strings[0]}={value}"]
    if command == "diff":
        return [command, *((value, right[1]) if action.dest == "a" else (right[0], value))]
    return [command, value, *right[1:]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an erasure of it, and things that are neither."""
    place = tmp_path_factory.mktemp("world")
    shutil.copytree(GOLDEN / "sd-ddim", place / "tiny")
    pipe = pipelines.pipeline()
    tensors = {n: p.detach() + 0.01 for n, p in pipe.unet.named_parameters() if "attn2.to_k" in n}
    good = Erasure(tensors, {"concept": "cat", "method": "esd-x"}).save(place / "good.safetensors")
    (place / "cut.safetensors").write_bytes(good.read_bytes()[:-5])
    (place / "file").write_text("nothing of use")
    (place / "jobs.jsonl").write_text('{"concept": "cat"}\n')
    (place / "binary").write_bytes(b"\xff\xfe\0\1")
    (place / "blank").write_text(" \n\n")
    (place / "folder").mkdir()
    (place / "loop").symlink_to("loop")
    return place


@pytest.fixture
def call(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], Result]:
    """Runs a command in `world`, which it must leave as it was."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(line: list[str]) -> Result:
        before = listing(world)
        try:
            code = main(line)
        except SystemExit as end:  # argparse's own
            code = int(str(end.code))
        said = capsys.readouterr()
        assert listing(world) == before, line
        return code, said.out, said.err

    return run


def listing(place: Path) -> dict[str, Any]:
    """What is there; of files size and time too."""
    found = {}
    for path in place.rglob("*"):
        told = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(place))] = (told.st_size, told.st_mtime_ns) if plain else None
    return found


def test_every_argument_has_its_bad_values() -> None:
    missing = [(c, a.dest) for c, a in ALL if a.dest not in BAD and (c, a.dest) not in OF_COMMAND]
    assert not missing, "say in BAD what would not do for these"
    assert set(BAD) <= {a.dest for _, a in ALL}
    assert set(RIGHT) == {c for c, _ in ALL}


@pytest.mark.parametrize(("command", "action"), ALL, ids=[f"{c}-{a.dest}" for c, a in ALL])
def test_bad_values_are_refused(
    command: str, action: argparse.Action, call: Callable[[list[str]], Result]
) -> None:
    wrong = []
    for value in bad_values(command, action.dest):
        line = command_line(command, action, value)
        code, out, err = call(line)
        # `verify` and `diff` answer with 1 and a report; an erasure that is damaged is such an answer
        answered = command == "verify" and action.dest == "file" and code == 1 and not err
        fine = code in (1, 2) and err.count("\n") == 1 and err.startswith("esd-fast") and not out
        plain = all(c.isprintable() or c == "\n" for c in out + err) and len(err) < 1500
        named = "Error: " not in err and "Traceback" not in err
        if not (answered or (fine and plain and named)):
            wrong.append((value[:60], code, out[:200], err[-400:]))
    assert not wrong


@pytest.mark.parametrize("command", RIGHT)
def test_what_is_right_is_not_refused(
    command: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the cases above would show nothing: these lines get as far as the model, or through."""

    class Loaded(Exception):
        pass

    def loaded(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.chdir(world)
    first_look = {"fleet": "models.look_at"}.get(command, "models.load_model")
    for home in (first_look, "export.base.open_base"):
        monkeypatch.setattr(f"esd_fast.{home}", loaded)
    if command in ("diff", "info", "plan"):
        assert main([command, *RIGHT[command]]) == 0
    else:
        with pytest.raises(Loaded):
            main([command, *RIGHT[command], "--debug"])
    assert not (world / "o").exists()


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["no-such-command"],
        ["\x1b[31m"],
        ["train", "--no-such-option"],
        ["train", "--concept", "cat", "stray\x1b[2J"],
        ["train", "--concept", "a", "--prompt", "b"],
        ["generate"],
        ["export"],
    ],
)
def test_no_such_line(line: list[str], call: Callable[[list[str]], Result]) -> None:
    code, out, err = call(line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--help" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("output", ["tiny", "tiny/unet", "tiny/new/deep", "folder/../tiny"])
@pytest.mark.parametrize("command", ["train", "generate", "eval", "attack"])
def test_nothing_goes_into_the_models_own_folder(
    command: str, output: str, call: Callable[[list[str]], Result]
) -> None:
    code, _, err = call([command, *RIGHT[command], "--output", output])
    assert code == 2
    assert "lies in the model's own folder; name another place" in err


FILES = ("collect", "export")


@pytest.mark.parametrize("command", ["train", "generate", "eval", "attack", "apply", *FILES])
def test_an_output_is_tried_before_anything_is_loaded(
    command: str, call: Callable[[list[str]], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """stable-diffusion#94: a name that no file system takes was found out after the training."""
    for home in ("esd_fast.models.load_model", "esd_fast.export.base.open_base"):
        monkeypatch.setattr(home, lambda *_, **__: pytest.fail("loaded"))
    end = ".safetensors" if command in FILES else ""
    for place in (
        "file/inside",
        "loop/inside",
        "x" * 300,
        "new/" + "x" * 300,
        "x" * (251 - len(end)),
    ):
        if len(place) < 252 and command not in (*FILES, "apply"):
            continue  # which is no name of theirs with `.part` behind it
        code, out, err = call([command, *RIGHT[command], "--output", f"{place}{end}"])
        assert code in (1, 2), place
        assert (out, err.count("\n")) == ("", 1), err
        assert place.removeprefix("new/")[:12] in err


@pytest.mark.parametrize("name", WRITTEN)
def test_training_replaces_nobodys_files(
    name: str, world: Path, call: Callable[[list[str]], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.models.load_model", lambda *_: pytest.fail("loaded"))
    (world / "mine").mkdir()
    try:
        (world / "mine" / name).write_text("of somebody")
        code, _, err = call(["train", *RIGHT["train"], "--output", "mine"])
        assert code == 2
        assert f"mine holds {name}; --overwrite replaces what a run writes" in err
        (world / "mine" / name).unlink()
        (world / "mine" / name).mkdir()
        code, _, err = call(["train", *RIGHT["train"], "--output", "mine", "--overwrite"])
        assert (code, f"mine/{name} is a folder; give another --output" in err) == (2, True)
    finally:
        shutil.rmtree(world / "mine")


@pytest.mark.parametrize(
    "name",
    ["attack.png", "attack.json", "before/0.png", "after/x", "cat-concept-after.safetensors"],
)
def test_an_attack_replaces_nobodys_files(
    name: str, world: Path, call: Callable[[list[str]], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.erasure.load", lambda *_: pytest.fail("loaded"))
    file = world / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text("of somebody")
    try:
        code, _, err = call(["attack", *RIGHT["attack"], "--output", "mine"])
        assert code == 2
        assert f"mine holds {name}; --overwrite replaces what an attack writes" in err
    finally:
        shutil.rmtree(world / "mine")


def test_links_that_a_stranger_left_lead_nowhere(world: Path, tmp_path: Path) -> None:
    """In a folder from elsewhere whatever is written may be a link to a file of one's own."""
    mine = tmp_path / "mine"
    mine.write_text("of somebody")
    run, model = tmp_path / "run", str(world / "tiny")
    run.mkdir()
    delta = "esd-cat-from-cat-esd-x.safetensors"
    trials = (".esd-fast-writable", f"{delta}.part", *(f"{n}.part" for n in WRITTEN))
    for name in (
        *trials,
        *(f"checkpoint-{n:08d}.safetensors.part" for n in range(3)),
        *WRITTEN,
        delta,
    ):
        (run / name).symlink_to(mine)
    line = ["train", "--concept", "cat", "--model", model, *RIGHT["train"][4:]]
    line += ["--checkpoint-every", "1", "--output", str(run), "--overwrite"]
    assert main(line) == 0
    assert mine.read_text() == "of somebody"
    assert not any((run / name).is_symlink() for name in (*WRITTEN[:3], delta))


@pytest.mark.parametrize(("command", "name"), [("generate", "base"), ("attack", "after")])
def test_folders_of_pictures_are_no_links(
    command: str, name: str, world: Path, call: Callable[[list[str]], Result]
) -> None:
    there = world / "there"
    there.mkdir()
    (there / name).symlink_to(world / "folder")
    try:
        code, _, err = call([command, *RIGHT[command], "--output", "there"])
    finally:
        shutil.rmtree(there)
    assert code == 2
    assert f"there/{name} is a link; remove it, or give another --output" in err
    assert not any((world / "folder").iterdir())


def test_a_run_that_fails_leaves_no_folder(call: Callable[[list[str]], Result]) -> None:
    for line in (
        ["train", *RIGHT["train"], "--method", "conv_in.*nothing"],
        ["train", *RIGHT["train"], "--output", "new/deep"],
        ["generate", *RIGHT["generate"], "--output", "new/deep"],
    ):
        code, _, err = call([*line, "--resolution", "8"])
        assert code == 2, err


def test_samples_that_no_memory_holds(
    call: Callable[[list[str]], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esd_fast.plan.memory_of", lambda _: 2**20)
    line, gibibytes = ["train", *RIGHT["train"], "--iterations", "1000000"], []
    for more, whose in (
        ([], "their samples"),
        (["--preserve", "a dog"], "samples and as many preserved"),
    ):
        code, _, err = call([*line, *more])
        assert code == 2
        assert "iterations is 1000000 and batch_size 1" in err
        gibibytes += re.findall(rf"{whose} take (\d+) GiB", err)
    alone, with_preserved = map(int, gibibytes)
    assert with_preserved == pytest.approx(2 * alone, abs=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads and writes everything")
def test_what_may_not_be_read_or_written(world: Path, call: Callable[[list[str]], Result]) -> None:
    locked = world / "locked"
    locked.mkdir(mode=0o500)
    secret = shutil.copy(world / "good.safetensors", world / "secret.safetensors")
    Path(secret).chmod(0)
    try:
        for line in (
            ["train", *RIGHT["train"], "--output", "locked/run"],
            ["info", "secret.safetensors"],
        ):
            code, _, err = call(line)
            assert code == 1
            assert err.count("\n") == 1
    finally:
        locked.rmdir()
        Path(secret).unlink()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("model", 3),
        ("model", b"x"),
        ("model", ""),
        ("concept", None),
        ("preset", ["fast"]),
        ("on_progress", "print"),
        ("on_step", 3),
        ("checkpoints", 3),
        ("checkpoints", ""),
        ("checkpoint_every", 2),
        ("checkpoint_every", True),
        ("resume", 3),
        ("resume", torch.zeros(2)),
    ],
)
def test_arguments_of_erase(argument: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are no fields of EraseConfig; these are in test_config_values."""
    import esd_fast

    monkeypatch.setattr("esd_fast.models.folder.Folder.load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=argument):
        esd_fast.erase(**{"model": str(GOLDEN / "sd-ddim"), "concept": "cat", argument: value})
