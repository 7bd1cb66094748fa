"""The command line. Only argparse is imported here: --help answers at once."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from . import __version__
from .config import CHOICES, PRESETS
from .export import FORMATS
from .parameters import METHODS
from .prompts import clean_prompt
from .quantize import QUANTIZERS
from .terminal import one_line, quoted, tell

# evaluation/metrics.py has them; it would bring torch
EVALUATION_METRICS = ("judge", "clip", "nudenet", "lpips", "fid", "kid")
BATCH = (
    "samples an optimizer step; under torchrun or `accelerate launch` in each process, so that the "
    "total batch is processes x N"
)
MODELS = "a diffusers folder, checkpoint file or hub id (default: embedded)"
METHODS_TOLD = "methods:\n" + "\n".join(f"  {name:<14} {text}" for name, text in METHODS.items())


# of a wrong argument, or of what it names; everything else is a failure
USAGE = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    # Pillow's, of pictures that evaluation/pictures.py then refuses
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("\nesd-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        tell(f"esd-fast: {told(error)}", sys.stderr)
        return 2 if isinstance(error, USAGE) else 1


def told(error: Exception) -> str:
    text = one_line(str(error))
    known = isinstance(error, (ValueError, OSError, RuntimeError))
    return text if text and known else f"{type(error).__name__}: {text}"


class Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first says it
            self.exit(2)
        self.exit(2, f"{self.prog}: {one_line(message)}; {self.prog} --help lists what there is\n")


def place(text: str) -> str:
    """A path, or a hub id."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"it is {quoted(text)}; it must name a file or folder")
    return text


def words(text: str) -> str:
    try:
        return clean_prompt("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="esd-fast", description="Erase a concept from a diffusion model (ESD), fast.")
    top.add_argument("--version", action="version", version=f"esd-fast {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    add_fleet(commands)
    add_collect(commands)
    add_generate(commands)
    add_eval(commands)
    add_verify(commands)
    add_attack(commands)
    add_export(commands)
    add_apply(commands)
    add_diff(commands)
    add_info(commands)
    add_plan(commands)
    add_app(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="erase a concept",
        description="Erase a concept and write the delta, pictures and a report to a folder. "
        "Without --model the embedded emoji model is used.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=METHODS_TOLD,
    )
    train.set_defaults(run=lazily("train"))
    say = train.add_argument
    what = train.add_mutually_exclusive_group().add_argument  # --resume says it as well
    add_concepts(what)
    what("--prompt", metavar="CONCEPT", help="the same with the paper's recipe, see below")
    add_prompts_beside(say)
    say(
        "--concept-weights",
        type=float,
        nargs="+",
        metavar="X",
        help="of each of several concepts in the loss (default: alike)",
    )
    say(
        "--samples",
        dest="samples_file",
        type=place,
        metavar="FILE",
        help="of `esd-fast collect`: nothing is collected but what it lacks, and what is not said "
        "is as it was there",
    )
    add_loading(say, MODELS)
    say("--output", type=place, metavar="FOLDER", help="where results go (default: erased-CONCEPT)")
    say("--overwrite", action="store_true", help="replace the results of an earlier run there")
    say(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps after which the run's state is kept (default: on Ctrl-C and SIGTERM alone)",
    )
    say(
        "--resume",
        type=place,
        metavar="FOLDER",
        help="go on with the unfinished run there, with its settings, to the same result",
    )
    say(
        "--manifest",
        metavar="FILE",
        help="do a finished run again: its manifest.json, report.json, delta or folder; options "
        "given beside it come first",
    )
    say(
        "--allow-other-base",
        action="store_true",
        help="with --manifest: another model than that run's is fine",
    )
    say("--preset", choices=list(PRESETS), help="recipe (default: fast; with --prompt: paper)")
    add_training(say)
    say(
        "--harden",
        type=int,
        metavar="N",
        help="rounds of concept inversion whose tokens are erased as well (default: 0)",
    )
    add_collecting(say)
    say(
        "--keep-prompt",
        type=words,
        action="append",
        metavar="PROMPT",
        help="a row of the pictures; repeatable",
    )
    say("--pictures", type=int, metavar="N", help="columns of the before/after grid; 0: none")
    theirs = train.add_argument_group(
        "options of the reference's scripts",
        "Their command lines work as they are: the spellings with underscores above, and these.",
    ).add_argument
    theirs(
        "--save_path",
        type=place,
        metavar="FOLDER",
        help="the delta, where the scripts write it, and the run",
    )
    theirs("--start_guidance", type=float, metavar="X", help="with --prompt: --guidance-scale")
    theirs("--image_size", type=int, metavar="PIXELS", help="with --prompt: --resolution")
    theirs("--ddim_steps", type=int, metavar="N", help="with --prompt: --num-inference-steps")
    theirs("--seperator", metavar="TEXT", help="with --prompt: what stands between its words")
    theirs("--devices", metavar="N,N", help="with --prompt: the first is --device")
    theirs("--ckpt_path", type=place, metavar="FILE", help="with --prompt: --model")
    theirs("--regularize", type=float, metavar="X", help="with --prompt: 0")
    for unused in ("--config_path", "--diffusers_config_path"):
        theirs(unused, help=argparse.SUPPRESS)


def add_fleet(commands: Any) -> None:
    fleet = commands.add_parser(
        "fleet",
        help="many erasures, each by itself, over a cluster",
        description="Run all jobs of a file on Ray (extra `fleet`), an erasure each: a worker a "
        "GPU, each of which loads the model once. What is in the folder already is not done again. "
        "JOBS is a CSV whose first line names columns (concept, erase_from, method, preset, "
        "iterations, seed, name, ...: train's options), or JSON Lines (.jsonl) with the same names. "
        "The options below are for all jobs that do not say otherwise.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=METHODS_TOLD,
    )
    fleet.set_defaults(run=lazily("fleet"))
    say = fleet.add_argument
    say("jobs", type=place, metavar="JOBS", help="a .csv or .jsonl file")
    say("--output", type=place, metavar="FOLDER", default="fleet", help="default: fleet")
    say("--overwrite", action="store_true", help="replace files of the same names there")
    say("--workers", type=int, metavar="N", help="default: one a GPU; without any one a machine")
    say("--address", metavar="ADDRESS", help="of a Ray cluster, or auto (default: this machine)")
    add_loading(say, MODELS)
    say("--preset", choices=list(PRESETS), help="recipe (default: fast)")
    add_preserved(say)
    add_training(say)
    add_collecting(say)


def add_concepts(say: Callable[..., Any]) -> None:
    say(
        "--concept",
        "--erase_concept",
        action="append",
        metavar="CONCEPT",
        help='what to erase, such as "cat" or "Van Gogh"; repeatable',
    )
    say("--concepts-file", type=place, metavar="FILE", help="what to erase, a concept a line")


def add_training(say: Callable[..., Any]) -> None:
    """What trains, and how."""
    say(
        "--method",
        "--train_method",
        dest="train_method",
        metavar="METHOD",
        help="which weights train, see below",
    )
    say("--preserve-weight", type=float, metavar="X", help="of preserved prompts in the loss")
    say("--learning-rate", "--lr", type=float, metavar="X", help="of the optimizer")
    say("--optimizer", choices=CHOICES["optimizer"], help="default: adam; 8bit: an extra")
    say("--weight-decay", type=float, metavar="X", help="of adamw (default: 0.01)")
    say("--max-grad-norm", type=float, metavar="X", help="gradients are clipped to it; 0: never")
    say(
        "--negative-guidance",
        "--negative_guidance",
        type=float,
        metavar="X",
        help="how far to push from the concept",
    )
    say("--anchor", choices=CHOICES["anchor"], help="what the target starts from")
    say("--keep-vocabulary", type=float, metavar="X", help="hold to other words' meaning; 0: off")
    say("--checkpointing", choices=CHOICES["checkpointing"], help="default: as --vram demands")
    say(
        "--quantize",
        choices=tuple(QUANTIZERS),
        help="frozen weights while training, for less memory: an extra",
    )


def add_prompts_beside(say: Callable[..., Any]) -> None:
    """What else is said of what is erased, and of what stays."""
    say(
        "--erase-from",
        "--erase_from",
        action="append",
        metavar="PROMPT",
        help="erase the concept from this wider prompt only; of several concepts all, or repeated "
        'for each ("" leaves one out)',
    )
    add_preserved(say)


def add_preserved(say: Callable[..., Any]) -> None:
    say(
        "--preserve",
        action="append",
        metavar="PROMPT",
        help='a prompt that is to stay as it is; repeatable; "default" stands for some of the '
        "model's own",
    )
    say("--preserve-file", type=place, metavar="FILE", help="such prompts, one a line")


def add_collecting(say: Callable[..., Any]) -> None:
    """How many samples, and how they are collected."""
    say("--iterations", type=int, metavar="N", help="optimizer steps")
    say("--batch-size", "--batchsize", type=int, metavar="N", help=BATCH)
    say("--guidance-scale", "--guidance_scale", type=float, metavar="X", help="of the rollout")
    say(
        "--num-inference-steps",
        "--num_inference_steps",
        type=int,
        metavar="N",
        help="scheduler steps of a trajectory",
    )
    say("--collect-batch-size", type=int, metavar="N", help="trajectories side by side")
    say("--vram", metavar="SIZE", help="memory to fit, such as 8GB (default: what is free)")
    say("--resolution", type=int, metavar="PIXELS", help="default: the model's own")
    say("--seed", type=int, metavar="N", help="default: 0")
    say("--dtype", choices=CHOICES["dtype"], help="of the frozen weights")
    say("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: the best there)")
    say("--cuda-graphs", choices=CHOICES["cuda_graphs"], help="replay recorded steps (auto)")


def add_collect(commands: Any) -> None:
    collect = commands.add_parser(
        "collect",
        help="the samples of an erasure alone, for several runs of `train`",
        description="Let the model draw what `train` learns from, and keep it: `train --samples` "
        "then takes it, with any --method, --learning-rate, --negative-guidance or "
        "--keep-vocabulary. Without --model the embedded emoji model is used.",
    )
    collect.set_defaults(run=lazily("collect"))
    say = collect.add_argument
    add_concepts(collect.add_mutually_exclusive_group(required=True).add_argument)
    add_prompts_beside(say)
    add_loading(say, MODELS)
    say("--output", type=place, metavar="FILE", help="default: samples-CONCEPT.safetensors")
    say("--overwrite", action="store_true", help="replace a file of that name")
    say("--preset", choices=list(PRESETS)[:2], default="fast", help="recipe (default: fast)")
    add_collecting(say)


def add_loading(
    say: Callable[..., Any],
    models: str,
    required: bool = False,
    names: tuple[str, ...] = ("--model", "--basemodel_id"),
) -> None:
    """What a model is and how it is read."""
    say(*names, type=place, metavar="MODEL", required=required, help=models)
    say("--variant", metavar="NAME", help="weight files of a diffusers folder, such as fp16")
    say("--ema", choices=CHOICES["ema"], help="of a file that holds both: the averaged weights")
    say(
        "--allow-pickle",
        action="store_true",
        default=None,
        help="read pickled objects in a .ckpt; they can run any code",
    )
    say(
        "--prediction-type",
        choices=CHOICES["prediction_type"],
        help="of the UNet (default: what the model says or shows)",
    )
    say(
        "--config",
        dest="model_config",
        type=place,
        metavar="FOLDER",
        help="configurations of a single file's components (default: the family's)",
    )


def add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="draw pictures, before and after an erasure",
        description="Draw prompts with the model and with each erasure, from the same noise: a "
        "folder of pictures each, and a grid that has them side by side. Pictures that are there "
        "already are not drawn again. The options of the reference's script (names_like_this) "
        "are accepted.",
    )
    generate.set_defaults(run=lazily("generate"))
    add_prompts(generate.add_mutually_exclusive_group(required=True).add_argument)
    say = generate.add_argument
    say(
        "--erasure",
        "--esd_path",
        action="append",
        type=place,
        metavar="PATH",
        help="a delta file or the folder of a run: drawn beside; repeatable",
    )
    add_loading(say, MODELS, names=("--model", "--base_model"))
    say(
        "--output",
        "--save_path",
        type=place,
        metavar="FOLDER",
        default="pictures",
        help="default: pictures",
    )
    add_drawing(say)
    say("--no-grid", action="store_true", help="single files alone")
    generate.epilog = (
        "A CSV has a column `prompt`, and may have `evaluation_seed` and `case_number`; its "
        "pictures are called CASE_SAMPLE.png, and samples start from the noises that the "
        "reference's script draws. Further columns go into the pictures' metadata."
    )


def add_prompts(say: Callable[..., Any]) -> None:
    say("--prompt", action="append", metavar="PROMPT", help="repeatable")
    say(
        "--prompts",
        "--prompts_path",
        type=place,
        metavar="FILE",
        help="a prompt a line, or a CSV (see below)",
    )


def add_drawing(say: Callable[..., Any]) -> None:
    """How many pictures, which, and how they are drawn."""
    say("--overwrite", action="store_true", help="replace other pictures of the same names")
    say(
        "--images", "--num_samples", type=int, metavar="N", help="a prompt (default: 4; of a CSV 1)"
    )
    say(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first picture; of a CSV, where it says none (default: 0)",
    )
    say("--from-case", "--from_case", type=int, metavar="N", help="of a CSV, this case_number on")
    say("--till-case", "--till_case", type=int, metavar="N", help="of a CSV, up to and with this")
    say(
        "--num-inference-steps",
        "--num_inference_steps",
        "--ddim_steps",
        type=int,
        default=25,
        metavar="N",
        help="default: 25",
    )
    say(
        "--guidance-scale",
        "--guidance_scale",
        type=float,
        metavar="X",
        help="default: 4 (embedded), else 7.5",
    )
    say("--resolution", "--image_size", type=int, metavar="PIXELS", help="default: the model's own")
    say("--batch-size", type=int, metavar="N", help="at a time (default: 64 (embedded), else 1)")
    say("--strength", type=float, default=1.0, metavar="X", help="of the erasures (default: 1)")
    say("--dtype", choices=CHOICES["dtype"], default="auto")
    say("--device", default="auto", metavar="DEVICE")


def add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="measure what an erasure took, and what else",
        description="Before against after: draws prompts with the model and with each erasure (or "
        "takes the pictures that `generate` drew), asks every metric that is there, and writes "
        "eval.json, eval.html and an interference matrix. Metrics that are not there are named with "
        "what they lack. Of the embedded model it needs no prompts.",
    )
    evaluate.set_defaults(run=lazily("evaluate"))
    say = evaluate.add_argument
    say(
        "erasures", nargs="*", type=place, metavar="ERASURE", help="delta files, or folders of runs"
    )
    say(
        "--pictures",
        type=place,
        metavar="FOLDER",
        help="drawn by `generate`: nothing is loaded or drawn",
    )
    add_prompts(say)
    add_loading(say, MODELS, names=("--model", "--base_model"))
    say(
        "--output",
        type=place,
        metavar="FOLDER",
        help="default: evaluation; with --pictures, that folder",
    )
    say(
        "--object",
        action="append",
        type=words,
        metavar="NAME",
        help="a concept to look for; repeatable",
    )
    say(
        "--style",
        action="append",
        type=words,
        metavar="NAME",
        help="of the other domain; repeatable",
    )
    say(
        "--erased",
        action="append",
        type=words,
        metavar="NAME",
        help="default: what the erasures say",
    )
    say(
        "--metric",
        action="append",
        choices=EVALUATION_METRICS,
        help="repeatable (default: all that are there); fetches its weights",
    )
    say("--clip", type=place, metavar="MODEL", help="a CLIP's folder or hub id")
    say("--nudenet-threshold", type=float, default=0.6, metavar="X", help="default: 0.6")
    say(
        "--inception",
        type=place,
        metavar="FILE",
        help="weights for FID and KID (default: torch.hub's)",
    )
    say(
        "--reference",
        type=place,
        metavar="FOLDER",
        help="pictures for FID and KID (default: the model's own)",
    )
    add_drawing(say)
    evaluate.epilog = (
        "A picture asks for the concepts that its prompt names, or, of a CSV, for what its columns "
        "`class` or `object`, `artist` or `style` say."
    )


def add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="does an erasure belong to a model, and does it change its pictures?",
        description="Look at an erasure on a model: names and shapes, the weights that it was "
        "trained on, its values, how far it moves the weights, and pictures from the same noise "
        "with and without it. Exit code 0: fine; 1: not, and the reason is said.",
    )
    verify.set_defaults(run=lazily("verify"))
    verify.add_argument(
        "file", type=place, metavar="FILE", help="a delta file or the folder of a run"
    )
    say = verify.add_argument
    add_loading(say, MODELS)
    say(
        "--allow-other-base",
        action="store_true",
        help="weights that it was not trained on are fine",
    )
    say("--prompt", action="append", metavar="PROMPT", help="repeatable (default: the concept)")
    say(
        "--images",
        type=int,
        metavar="N",
        help="a prompt (default: 2; embedded: 16 in all); 0: none",
    )
    say("--seed", type=int, default=0, metavar="N", help="of the first picture (default: 0)")
    say("--num-inference-steps", type=int, default=15, metavar="N", help="default: 15")
    say("--guidance-scale", type=float, metavar="X", help="default: 4 (embedded), else 7.5")
    say("--resolution", type=int, metavar="PIXELS", help="default: the model's own")
    say("--batch-size", type=int, metavar="N", help="at a time (default: 64 (embedded), else 1)")
    say("--json", action="store_true", help="as JSON, with every layer")
    say("--dtype", choices=CHOICES["dtype"], default="auto")
    say("--device", default="auto", metavar="DEVICE")


def add_attack(commands: Any) -> None:
    attack = commands.add_parser(
        "attack",
        help="can an erased concept be brought back?",
        description="Try to bring an erased concept back: paraphrases, a negated prompt, the concept "
        "as negative prompt, and concept inversion, which learns a new token against the model from "
        "a few pictures. Each on the model as it is and on the erased one. Writes a grid of "
        "pictures, the learnt tokens (textual inversion files) and attack.json.",
    )
    attack.set_defaults(run=lazily("attack"))
    attack.add_argument(
        "erasure", type=place, metavar="ERASURE", help="a delta file or the folder of a run"
    )
    say = attack.add_argument
    add_loading(say, MODELS)
    say("--output", type=place, metavar="FOLDER", help="default: attack-CONCEPT")
    say("--overwrite", action="store_true", help="replace the results of an earlier attack there")
    say("--concept", metavar="CONCEPT", help="default: what the erasure says it erased")
    say(
        "--paraphrases",
        type=place,
        metavar="FILE",
        help="prompts to try, one a line, in place of ours",
    )
    say(
        "--control",
        metavar="CONCEPT",
        help="one that is not erased, to show that inversion works (embedded: chosen)",
    )
    say(
        "--clip",
        type=place,
        metavar="MODEL",
        help="a CLIP's folder or hub id: says in which pictures the concept is recognised, as the "
        "most similar of those named (embedded: its own judge does)",
    )
    say(
        "--object",
        action="append",
        type=words,
        metavar="NAME",
        help="another that CLIP may see; repeatable",
    )
    say(
        "--style",
        action="append",
        type=words,
        metavar="NAME",
        help="of the other domain; repeatable",
    )
    say("--images", type=int, metavar="N", help="of each attack (default: 4; embedded: 64)")
    say("--seed", type=int, default=0, metavar="N", help="default: 0")
    say("--num-inference-steps", type=int, default=15, metavar="N", help="default: 15")
    say("--guidance-scale", type=float, metavar="X", help="default: 4 (embedded), else 7.5")
    say("--resolution", type=int, metavar="PIXELS", help="default: the model's own")
    say("--batch-size", type=int, metavar="N", help="drawn at a time (embedded: 64, else 1)")
    say("--json", action="store_true", help="as JSON")
    say("--dtype", choices=CHOICES["dtype"], default="auto")
    say("--device", default="auto", metavar="DEVICE")
    learn = attack.add_argument_group(
        "concept inversion", "The names are those of diffusers' textual_inversion.py."
    ).add_argument
    learn(
        "--train-data-dir",
        "--train_data_dir",
        type=place,
        metavar="FOLDER",
        help="pictures of the concept (default: 16 that the model draws before)",
    )
    learn(
        "--learnable-property",
        "--learnable_property",
        choices=("object", "style"),
        default="object",
        help="what the concept is, of models other than the embedded one (default: object)",
    )
    learn("--initializer-token", "--initializer_token", metavar="WORD", help="default: the mean")
    learn("--max-train-steps", "--max_train_steps", type=int, default=200, metavar="N")
    learn("--train-batch-size", "--train_batch_size", type=int, metavar="N")
    learn("--learning-rate", "--learning_rate", type=float, default=1e-2, metavar="X")


def add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="an erasure, or several in one, for other programs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {n:<14} {text}" for n, text in FORMATS.items()),
    )
    export.set_defaults(run=lazily("export"))
    say = export.add_argument
    say("--format", required=True, choices=list(FORMATS), help="see below")
    add_writing(export)
    say("--rank", type=int, metavar="N", help="of a LoRA (default: 64)")
    say("--energy", type=float, metavar="X", help="or the least rank that keeps X (0 to 1) of it")
    say("--dtype", choices=CHOICES["dtype"][1:], help="of a LoRA (default: float16)")


def add_apply(commands: Any) -> None:
    apply = commands.add_parser(
        "apply",
        help="write a model with erasures in it",
        description="A single file (.safetensors, .ckpt) gives a single file with the same keys; a "
        "diffusers folder or hub id gives a folder.",
    )
    apply.set_defaults(run=lazily("export", "apply"))
    add_writing(apply)


def add_writing(command: argparse.ArgumentParser) -> None:
    say = command.add_argument
    say(
        "erasures", nargs="+", type=place, metavar="ERASURE", help="delta files, or folders of runs"
    )
    say(
        "--model",
        type=place,
        metavar="MODEL",
        help="a folder, file or hub id (default: the erasure's own)",
    )
    say("--output", required=True, type=place, metavar="PATH", help="where it goes")
    say("--strength", type=float, default=1.0, metavar="X", help="of the erasure (default: 1)")
    say("--overwrite", action="store_true", help="replace what is there")
    say(
        "--config",
        dest="model_config",
        type=place,
        metavar="FOLDER",
        help="a single file's configurations, for a folder of it (default: its family's)",
    )
    say("--allow-other-base", action="store_true", help="onto a model that it was not trained on")
    say(
        "--allow-pickle", action="store_true", help="read files that can run code; trust them first"
    )


def add_diff(commands: Any) -> None:
    diff = commands.add_parser(
        "diff",
        help="what differs between two checkpoints",
        description="Folders, hub ids, single files or deltas. Exit code 1 where they differ.",
    )
    diff.set_defaults(run=lazily("export", "diff"))
    say = diff.add_argument
    say("a", type=place)
    say("b", type=place)
    say("--json", action="store_true", help="every tensor, as JSON")
    say(
        "--allow-pickle", action="store_true", help="read files that can run code; trust them first"
    )


def add_info(commands: Any) -> None:
    info = commands.add_parser("info", help="what an erasure is, what a model is, what runs here")
    info.set_defaults(run=lazily("info"))
    info.add_argument(
        "path",
        type=place,
        nargs="?",
        help="a delta file, the folder of a run, a file of samples, or a diffusers folder",
    )
    add_loading(info.add_argument, "a diffusers folder, checkpoint file or hub id")
    info.add_argument("--json", action="store_true", help="as JSON")


def add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="the memory that an erasure needs, before anything is loaded",
        description="Count what training would need, choice by choice, and name the fastest that "
        "fits a card. Only configurations are read.",
    )
    plan.set_defaults(run=lazily("plan"))
    say = plan.add_argument
    add_loading(say, "sd1, sd2, sdxl, a diffusers folder, checkpoint file or hub id", required=True)
    say("--method", dest="train_method", default="esd-x", metavar="METHOD", help="default: esd-x")
    say("--resolution", type=int, metavar="PIXELS", help="default: the model's own")
    say("--batch-size", type=int, default=1, metavar="N", help="samples a step (default: 1)")
    say(
        "--preserve",
        type=words,
        action="append",
        metavar="PROMPT",
        help="as in train: a step then holds twice as many samples, whatever the prompts",
    )
    say("--dtype", choices=CHOICES["dtype"][1:], default="bfloat16", help="of the frozen weights")
    say("--optimizer", choices=CHOICES["optimizer"], default="adam", help="default: adam")
    say("--quantize", choices=tuple(QUANTIZERS), help="of the frozen weights; default: not at all")
    say("--vram", metavar="SIZE", help="of the card, such as 8GB")
    say("--json", action="store_true", help="as JSON, in bytes")


def add_app(commands: Any) -> None:
    app = commands.add_parser(
        "app",
        help="the web app: erase, try, library",
        description="Serve the web app (extra `app`). Results, models that you put there and what "
        "is uploaded lie in the work folder; nothing else of this machine is shown or reached.",
    )
    app.set_defaults(run=lazily("app"))
    say = app.add_argument
    say("--work", metavar="FOLDER", default="esd-fast-app", help="default: esd-fast-app")
    say("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine")
    say("--port", type=int, default=7860, metavar="N", help="0: any free one (default: 7860)")
    say("--password-file", metavar="FILE", help="with a password, needed to listen elsewhere")
    say(
        "--password",
        metavar="TEXT",
        help="the same, but everybody on the machine can read it there; or ESD_FAST_PASSWORD",
    )
    say(
        "--model",
        action="append",
        metavar="MODEL",
        help="to be offered: a diffusers folder, checkpoint file or hub id; repeatable (others: "
        "what lies in WORK/models)",
    )
    say("--max-upload", default="512MB", metavar="SIZE", help="of one file (default: 512MB)")
    say(
        "--shared-library",
        action="store_true",
        help="every browser sees all erasures (default: its own, and what you put there)",
    )
    say("--device", default="auto", metavar="DEVICE")


def lazily(module: str, name: str = "") -> Callable[[argparse.Namespace], int]:
    """The function `name` (as the module, if not given) of commands/MODULE.py, imported when it is
    called: it brings torch."""

    def run(arguments: argparse.Namespace) -> int:
        commands = importlib.import_module(f".commands.{module}", __package__)
        code: int = getattr(commands, name or module)(arguments)
        return code

    return run


if __name__ == "__main__":
    sys.exit(main())
