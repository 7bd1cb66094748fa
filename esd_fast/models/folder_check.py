"""What is wrong with a model's folder, said before diffusers or transformers read it: their errors
rarely name the file, and what transformers does not find it makes up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .checkpoint import open_safetensors, unpickled

UNET_FILE = "diffusion_pytorch_model"
LIBRARIES = ("diffusers", "transformers")
# never loaded, so it may be of any library
IGNORED = ("safety_checker",)
COPY = "copy the model again"


def check_folder(path: Path, variant: str | None) -> None:
    """Name what is wrong with a local folder. Raises FileNotFoundError or ValueError."""
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json: no diffusers model folder")
    components = parts_of(read_table(index), str(index))
    variants = set(variants_of(path / "unet"))
    if variants and variant not in variants:
        there = ", ".join(sorted(v or "the plain weights (no variant)" for v in variants))
        raise ValueError(f"variant is {variant!r}; {path} has {there}")
    for name, (library, kind) in components.items():
        if name not in IGNORED:
            check_component(path / name, library, kind)


def parts_of(index: Mapping[str, Any], said_by: str) -> dict[str, tuple[str, str]]:
    """The components that an index names, with library and class. Raises ValueError for one that
    is of code that the model brings, or that lies elsewhere."""
    found = {}
    for name, value in index.items():
        if not isinstance(value, (list, tuple)) or name.startswith("_"):
            continue
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"{said_by} names a component {name!r}; that is no plain name")
        if len(value) != 2 or not all(v is None or isinstance(v, str) for v in value):
            raise ValueError(
                f"{said_by}: {name} is {value!r}; it must be a library and a class, such as "
                "['diffusers', 'UNet2DConditionModel']"
            )
        if not value[0] or name in IGNORED:
            continue
        if value[0] not in LIBRARIES or not str(value[1]).isidentifier():
            raise ValueError(
                f"{said_by}: {name} is {value[1]!r} of {value[0]!r}; a model's own code is not "
                f"run, only classes of {' and '.join(LIBRARIES)}"
            )
        found[name] = (value[0], str(value[1]))
    return found


def read_table(file: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Raises ValueError naming it."""
    try:
        table = json.loads(file.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}; {COPY}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file} holds a {type(table).__name__}, no table; {COPY}")  # noqa: TRY004
    return table


def check_component(folder: Path, library: str, kind: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there, and model_index.json names it; {COPY}")
    for file in sorted(folder.glob("*.json")):
        table = read_table(file)
        if file.name.endswith(".index.json"):
            check_shards(file, table)
    if "Tokenizer" in kind:
        check_tokenizer_files(folder)
        return
    if "Scheduler" in kind:
        require(folder / "scheduler_config.json")
        return
    if folder.name not in ("unet", "vae", "text_encoder", "text_encoder_2"):
        return
    require(folder / "config.json")
    weights = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights (.safetensors or .bin); {COPY}")
    shapes: dict[str, torch.Size] = {}
    for file in weights:
        require(file)
        if file.suffix == ".safetensors":
            shapes |= {n: t.shape for n, t in open_safetensors(file).tensors.items()}
    if not shapes:
        for file in weights:
            unpickled(file, allow_pickle=False)  # maps it; diffusers would not say what is wrong
    elif library == "transformers":
        check_encoder(folder, kind, shapes)


def require(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there, or leads nowhere; {COPY}")


def check_shards(index: Path, table: Mapping[str, Any]) -> None:
    files = table.get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) for name in files.values()
    ):
        raise ValueError(f"{index} must name files beside it in its weight_map; {COPY}")


def check_encoder(folder: Path, kind: str, shapes: Mapping[str, torch.Size]) -> None:
    """By names and shapes: transformers fills in at random what is missing, and goes on."""
    import transformers
    from accelerate import init_empty_weights

    made: Any = getattr(transformers, kind, None)
    if made is None or not hasattr(made, "config_class"):
        raise ValueError(f"{folder} is a {kind}, which transformers does not know as a model")
    with loading(folder), init_empty_weights():
        wanted = made(made.config_class.from_pretrained(folder)).state_dict()

    def plain(name: str) -> str:
        return name.removeprefix("text_model.")  # a level that newer versions dropped

    there = {plain(name): shape for name, shape in shapes.items()}
    missing = [n for n in wanted if plain(n) not in there and not n.endswith("position_ids")]
    bent = [n for n, t in wanted.items() if there.get(plain(n), t.shape) != t.shape]
    if missing or bent:
        raise ValueError(
            f"{folder} does not fit its config.json: {len(missing)} tensors missing, {len(bent)} "
            f"of another shape ({(missing or bent)[0]}); {COPY}"
        )


def variants_of(folder: Path) -> Iterator[str | None]:
    """Variants of a UNet's weights: None for diffusion_pytorch_model.safetensors, "fp16" for
    diffusion_pytorch_model.fp16.safetensors, in one file or in several."""
    for file in folder.glob(f"{UNET_FILE}*"):
        _, *named, suffix = file.name.split(".")
        if suffix in ("safetensors", "bin"):
            yield named[0].split("-")[0] if named else None  # fp16-00001-of-00002


def check_tokenizer_files(folder: Path) -> None:
    # transformers makes a tokenizer of a few special tokens of a folder without these, silently
    whole = (folder / "tokenizer.json").is_file()
    if not whole and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise FileNotFoundError(
            f"{folder} lacks its vocabulary: tokenizer.json, or vocab.json and merges.txt"
        )


# what the algorithm itself reads of configurations -> whether a value will do, and what would
def count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value <= 2**20 and not isinstance(value, bool)


def counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(count, value))


PREDICTIONS = ("epsilon", "v_prediction")
NEEDED: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "unet": {
        "sample_size": (count, "a whole number from 1 (latents a side)"),
        "in_channels": (count, "a whole number from 1"),
        "out_channels": (count, "a whole number from 1"),
        "block_out_channels": (counts, "a list of whole numbers from 1"),
    },
    "vae": {"block_out_channels": (counts, "a list of whole numbers from 1")},
    "scheduler": {
        "num_train_timesteps": (count, "a whole number from 1"),
        "prediction_type": (PREDICTIONS.__contains__, " or ".join(map(repr, PREDICTIONS))),
    },
}


def check_configs(configs: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """`configs` by component; an empty one is of a component that is not there. Raises ValueError."""
    for component, needed in NEEDED.items():
        config = configs[component]
        for name, (fits, would_do) in needed.items():
            if config and name in config and not fits(config[name]):
                raise ValueError(
                    f"{source}: {name} of its {component} is {config[name]!r}; it must be "
                    f"{would_do}"
                )
    if configs["unet"] and "sample_size" not in configs["unet"]:
        raise ValueError(f"{source}: its unet's config.json says no sample_size; {COPY}")


@contextmanager
def loading(source: Any) -> Iterator[None]:
    """Within: whatever diffusers and transformers raise over a damaged model names it, in a line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        away = isinstance(error, OSError) and not Path(source).exists()  # a hub that said no
        kind = OSError if away else ValueError
        raise kind(f"{source} cannot be loaded: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The first sentence; what follows is advice to programmers."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".")


def check_all_there(pipeline: Any, source: Any) -> None:
    """ValueError where a part did not get all of its weights: diffusers leaves these empty."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name, None)
        empty = [] if part is None else [n for n, p in part.named_parameters() if p.is_meta]
        if empty:
            raise ValueError(
                f"{source}: the files of its {name} lack {len(empty)} tensors, such as {empty[0]}; "
                f"{COPY}"
            )
