"""Files and folders written beside their place, then renamed: never half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file to; it becomes `target` where the block ends well, else it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    temporary.unlink(missing_ok=True)  # in a stranger's folder it may be a link to elsewhere
    try:
        yield temporary
        temporary.chmod(0o666 & ~current_umask())  # safetensors writes for the owner alone
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """The same for a folder. One that stood there goes once the new one is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)  # which follows no links
    temporary.mkdir()
    try:
        yield temporary
        old = target.with_name(target.name + ".old")
        if target.exists():
            target.replace(old)
        temporary.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Within: `folder` is there, and was shown to be writable. Of what had to be made for it, that
    which is still empty at the end goes again: a run that failed leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        yield folder
    finally:
        for path in made:
            with suppress(OSError):  # it is no longer empty, or could not be made
                path.rmdir()


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made in `folder`. It is tried with one of a new name:
    a fixed one could be a link that a stranger left there."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_outside(output: Path, model: Any) -> None:
    """Raises ValueError where results would land in the folder of the model that they are from."""
    if not isinstance(model, (str, Path)) or not Path(model).is_dir():
        return
    home, place = (Path(os.path.realpath(path)) for path in (model, output))  # loops and all
    if home == place or home in place.parents:
        raise ValueError(f"{output} lies in the model's own folder; name another place")


def check_no_link(folder: Path) -> None:
    """Raises FileExistsError where `folder`, one of an output's own, is a link to elsewhere: in what
    came from a stranger it could lead anywhere."""
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link; remove it, or give another --output")


def free_folder(folder: Path, taken: Callable[[Path], bool]) -> Path:
    """`folder`, or where that is taken FOLDER-2, FOLDER-3, ..."""
    found, number = folder, 1
    while taken(found):
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def check_target(target: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Before any work: raises FileExistsError where something is there that must not go, another
    OSError where nothing can be written. A folder is replaced only where it is empty or a diffusers
    model."""
    check_place(target)
    if folder and target.is_dir() and not any(target.iterdir()):
        return
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; --overwrite (overwrite=True) replaces it")
    if folder != target.is_dir():
        kind = "a folder" if target.is_dir() else "a file"
        raise FileExistsError(f"{target} is {kind}; name another place")
    if folder and not (target / "model_index.json").is_file():
        raise FileExistsError(f"{target} is no diffusers model; a folder of yours is not replaced")


def check_place(target: Path) -> None:
    """Raises OSError where `target` cannot be made. Makes nothing itself."""
    nearest = next((path for path in target.parents if os.path.lexists(path)), target)
    if not nearest.is_dir():
        raise NotADirectoryError(f"{target}: {nearest} is no folder; name another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{target}: nothing may be written to {nearest}; name another place")
    *folders, name = target.relative_to(nearest).parts or ("",)
    for new in (*folders, f"{name}.part"):
        with suppress(FileNotFoundError):
            (nearest / new).lstat()  # raises where a name is too long


def parsed_json(
    text: str | bytes, what: str, pairs: Callable[[list[tuple[str, Any]]], Any] = dict
) -> Any:
    """Raises ValueError, in one line that begins with `what`, where it is none: bytes that are no
    text, nesting or numbers that Python does not take as well. `pairs` makes its tables."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"{what} is damaged: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are of this kind
        raise ValueError(f"{what} is damaged: {error}") from None


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
