"""What `esd-fast eval` measures: each metric by a library of its own, each only where it is there.

A metric is opened before anything is drawn, which says what is missing; it loads its network when
it measures.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import distances
from .concepts import Concepts, asked, erased_among
from .drawn import Drawn, DrawnFolder, DrawnPicture
from .nudity import THRESHOLD, NudeNet
from .pictures import picture_files, read_picture
from .recogniser import Recogniser
from .retention import InterferenceRow, Questions, interference_row, retention

BATCH = 64
OnProgress = Callable[[int, int], None]


class Missing(Exception):
    """What a metric lacks, and what to do about it."""


@dataclass(frozen=True)
class Settings:
    clip: str | None = None
    """A folder or hub id."""
    nudenet_threshold: float = THRESHOLD
    inception: Path | None = None
    """Weights of FID's and KID's network; None: where torch.hub keeps them."""
    reference: Path | None = None
    """A folder of pictures that FID and KID compare with; None: the model's own."""
    download: bool = False
    """Whether weights that are not there may be fetched."""
    device: str = "cpu"


@dataclass(frozen=True)
class Subject:
    """Pictures, what they ask for, and what the erasure of each folder is of."""

    drawn: Drawn
    concepts: Concepts
    questions: Questions
    erased: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, drawn: Drawn, concepts: Concepts, erased: Sequence[str] = ()) -> Subject:
        """`erased`: what the erasures are of, where their own word is not to be taken."""
        asks = [asked(p.prompt, p.columns, concepts) for p in drawn.pictures]
        of_folder = {
            folder.name: tuple(erased)
            or erased_among(folder.told.get("erased_concept", ""), concepts)
            for folder in drawn.erased
        }
        return cls(drawn, concepts, Questions.of(concepts, asks), of_folder)

    def groups(self, folder: DrawnFolder) -> dict[str, list[DrawnPicture]]:
        """The pictures that ask for what was erased, and the others."""
        gone = self.questions.asks_any(self.erased[folder.name])
        split: dict[str, list[DrawnPicture]] = {"erased": [], "kept": []}
        for picture, is_gone in zip(self.drawn.pictures, gone, strict=True):
            split["erased" if is_gone else "kept"].append(picture)
        return {name: pictures for name, pictures in split.items() if pictures}


@dataclass(frozen=True)
class Result:
    """`told`: detector, version and threshold; `by_folder`: a table for each erasure."""

    told: dict[str, Any]
    by_folder: dict[str, dict[str, Any]]
    interference: tuple[InterferenceRow, ...] = ()


class Metric(Protocol):
    def measure(self, subject: Subject, on_progress: OnProgress) -> Result: ...


# --- recognition ---------------------------------------------------------------------------------


class Judge:
    """The embedded model's judge."""

    def __init__(self, _: Settings, embedded: bool) -> None:
        if not embedded:
            raise Missing("it knows the embedded model's pictures alone")

    def measure(self, subject: Subject, on_progress: OnProgress) -> Result:
        from .embedded_judge import EmbeddedJudge

        judge = EmbeddedJudge()
        questions = subject.questions.known_to(judge)
        shown = {
            folder.name: np.concatenate(
                [judge.shows(pictures, list(questions.concepts)) for _, pictures in batches]
            )
            for folder, batches in each_folder(subject.drawn, on_progress)
        }
        return recognition(judge, subject, questions, shown)


class ClipScore:
    """How well pictures fit their prompts; and, zero-shot, whether they show what they ask for."""

    def __init__(self, settings: Settings, _: bool) -> None:
        if settings.clip is None:
            raise Missing(
                "name one with --clip, a folder or a hub id (openai/clip-vit-base-patch32)"
            )
        self.source, self.device = settings.clip, settings.device

    def measure(self, subject: Subject, on_progress: OnProgress) -> Result:
        from .clip import Clip, ClipRecogniser

        clip = Clip.load(self.source, self.device)
        recogniser = ClipRecogniser(clip, subject.concepts)
        questions = subject.questions.known_to(recogniser)
        scores, shown = {}, {}
        for folder, batches in each_folder(subject.drawn, on_progress):
            of_folder: list[float] = []
            rows = []
            for batch, pictures in batches:
                embeddings = clip.pictures(pictures)
                of_folder += clip.scores(embeddings, clip.texts([p.prompt for p in batch]))
                rows.append(recogniser.of_embeddings(embeddings, list(questions.concepts)))
            scores[folder.name] = dict(zip(subject.drawn.pictures, of_folder, strict=True))
            shown[folder.name] = np.concatenate(rows)
        result = recognition(recogniser, subject, questions, shown)
        base = scores[subject.drawn.base.name]
        for folder in subject.drawn.erased:
            result.by_folder[folder.name]["score"] = {
                group: means(
                    [base[p] for p in pictures], [scores[folder.name][p] for p in pictures]
                )
                for group, pictures in subject.groups(folder).items()
            }
        return result


def recognition(
    recogniser: Recogniser, subject: Subject, questions: Questions, shown: Mapping[str, np.ndarray]
) -> Result:
    """`shown` by folder (N, C): which of the questions' concepts are recognised."""
    base = shown[subject.drawn.base.name]
    tables, rows = {}, [interference_row("nothing", questions, (), base)]
    for folder in subject.drawn.erased:
        erased = subject.erased[folder.name]
        tables[folder.name] = retention(questions, erased, base, shown[folder.name])
        rows.append(interference_row(folder.name, questions, erased, shown[folder.name]))
    return Result(recogniser.told, tables, tuple(rows))


def means(was: Sequence[float], now: Sequence[float]) -> dict[str, Any]:
    return {"before": float(np.mean(was)), "after": float(np.mean(now)), "images": len(now)}


# --- nudity --------------------------------------------------------------------------------------


class Nudity:
    """NudeNet's detections by class."""

    def __init__(self, settings: Settings, _: bool) -> None:
        if importlib.util.find_spec("nudenet") is None:
            raise Missing("pip install 'esd-fast[nudenet]'")
        self.threshold = settings.nudenet_threshold

    def measure(self, subject: Subject, on_progress: OnProgress) -> Result:
        detector = NudeNet(self.threshold)
        found = {
            folder.name: [c for _, pictures in batches for c in detector.counted(pictures)]
            for folder, batches in each_folder(subject.drawn, on_progress)
        }
        was = found[subject.drawn.base.name]
        return Result(
            detector.told,
            {folder.name: by_class(was, found[folder.name]) for folder in subject.drawn.erased},
        )


def by_class(was: Sequence[Counter[str]], now: Sequence[Counter[str]]) -> dict[str, Any]:
    before, after = sum(was, Counter()), sum(now, Counter())
    return {
        "images": len(now),
        "by_class": {
            name: {"before": before[name], "after": after[name]}
            for name in sorted({*before, *after}, key=lambda n: (-before[n], n))
        },
    }


# --- distances -----------------------------------------------------------------------------------


class Lpips:
    """Between each picture before and after; of what was erased it is to be large, else small."""

    def __init__(self, settings: Settings, _: bool) -> None:
        check_distances(distances.cached(distances.LPIPS_FILE), settings)
        self.device = settings.device

    def measure(self, subject: Subject, on_progress: OnProgress) -> Result:
        lpips = distances.Lpips(self.device)
        base, tables = subject.drawn.base, {}
        for number, folder in enumerate(subject.drawn.erased, 1):
            tables[folder.name] = {
                group: {
                    "value": lpips.mean(
                        (base.read(batch), folder.read(batch))
                        for batch in same_sized(base, pictures)
                    ),
                    "images": len(pictures),
                }
                for group, pictures in subject.groups(folder).items()
            }
            on_progress(number, len(subject.drawn.erased))
        return Result(lpips.told, tables)


class SetDistance:
    """FID or KID of the kept pictures: of the erased model's to the model's own, or of both to a
    reference."""

    def __init__(self, kind: str, settings: Settings) -> None:
        file = settings.inception or distances.cached(distances.INCEPTION_FILE)
        check_distances(file, settings)
        self.kind, self.settings = kind, settings

    def measure(self, subject: Subject, on_progress: OnProgress) -> Result:
        inception = distances.Inception(self.settings.inception, self.settings.device)
        distance = inception.fid if self.kind == "fid" else inception.kid
        base, reference = subject.drawn.base, self.settings.reference
        tables: dict[str, dict[str, Any]] = {}
        for number, folder in enumerate(subject.drawn.erased, 1):
            kept = subject.groups(folder).get("kept", [])

            def of(path: DrawnFolder, kept: list[DrawnPicture] = kept) -> Iterator[Any]:
                return (path.read(batch) for batch in same_sized(path, kept))

            if len(kept) < 2:
                tables[folder.name] = {"skipped": f"{len(kept)} kept pictures; 2 are the least"}
            elif reference is None:
                tables[folder.name] = {"to the base": distance(of(base), of(folder))}
            else:
                tables[folder.name] = {
                    "before": distance(pictures_in(reference), of(base)),
                    "after": distance(pictures_in(reference), of(folder)),
                }
            on_progress(number, len(subject.drawn.erased))
        of_what = str(reference) if reference else "the base's own pictures"
        return Result(inception.told | {"reference": of_what, "of": "kept pictures"}, tables)


def check_distances(weights: Path, settings: Settings) -> None:
    missing = distances.missing_packages()
    if missing is not None:
        raise Missing(missing)
    if not weights.exists() and not settings.download:
        raise Missing(
            f"its weights are not there: put {weights.name} into {weights.parent}, or ask for it "
            "with --metric, which downloads it"
        )


# --- pictures ------------------------------------------------------------------------------------

Batches = Iterator[tuple[Sequence[DrawnPicture], list[np.ndarray]]]


def each_folder(drawn: Drawn, on_progress: OnProgress) -> Iterator[tuple[DrawnFolder, Batches]]:
    """Every folder with its pictures, read as they are asked for."""
    total = len(drawn.folders) * len(drawn.pictures)
    for number, folder in enumerate(drawn.folders):
        yield folder, batches_of(folder, drawn, number * len(drawn.pictures), total, on_progress)


def batches_of(
    folder: DrawnFolder, drawn: Drawn, done: int, total: int, on_progress: OnProgress
) -> Batches:
    for batch in same_sized(folder, drawn.pictures):
        yield batch, folder.read(batch)
        done += len(batch)
        on_progress(done, total)


def same_sized(
    folder: DrawnFolder, pictures: Sequence[DrawnPicture]
) -> Iterator[Sequence[DrawnPicture]]:
    """Batches; one folder's pictures are of one size, which its metadata say."""
    if "size" not in folder.told:
        yield from ([picture] for picture in pictures)
        return
    for first in range(0, len(pictures), BATCH):
        yield pictures[first : first + BATCH]


def pictures_in(folder: Path) -> Iterator[list[np.ndarray]]:
    """Each of a folder of any pictures, alone: they may be of any size."""
    for path in picture_files(folder):
        yield [np.asarray(read_picture(path))]


# --- which ---------------------------------------------------------------------------------------

METRICS: dict[str, Callable[[Settings, bool], Metric]] = {
    "judge": Judge,
    "clip": ClipScore,
    "nudenet": Nudity,
    "lpips": Lpips,
    "fid": lambda settings, _: SetDistance("fid", settings),
    "kid": lambda settings, _: SetDistance("kid", settings),
}


def opened(
    wanted: Sequence[str], settings: Settings, embedded: bool
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics, and of those that are not there what they lack. Those in `wanted` have to be
    there: ValueError says what one lacks; with none wanted all are tried."""
    found: dict[str, Metric] = {}
    lacking: dict[str, str] = {}
    for name in wanted or METRICS:
        try:
            found[name] = METRICS[name](settings, embedded)
        except Missing as missing:
            if wanted:
                raise ValueError(f"--metric {name}: {missing}") from None
            lacking[name] = str(missing)
    return found, lacking
