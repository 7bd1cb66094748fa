"""Pieces of the page that no Gradio component has: plain HTML, all text escaped."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from esd_fast.evaluation.markup import Html, data, duration, element, join, short, user_text

from .library import DOWNLOADS, Entry

if TYPE_CHECKING:
    from PIL import Image

    from .erasing import Look, Seen
    from .jobs import Job
    from .planning import Plan
    from .studio import Pair, Scene

PHASES = {
    "load": ("Loading the model", ""),
    "draw before": ("Drawing pictures before", "picture"),
    "prepare": ("Getting ready to train", ""),
    "collect": ("Collecting what the model knows", "pass"),
    "fit": ("Training", "step"),
    "draw after": ("Drawing pictures after", "picture"),
}
WITH_PICTURES = 2  # of the jobs shown: those of older ones are in their reports
STATES = {
    "waiting": "waiting",
    "running": "running",
    "finished": "done",
    "stopped": "stopped",
    "failed": "failed",
}


def image(picture: Image.Image, alt: str, **attributes: str) -> Html:
    """In the page itself, so that no address of it can be guessed or passed on."""
    from esd_fast.evaluation.page import image as inline

    content = io.BytesIO()
    picture.save(content, "PNG")
    shown = inline(content.getvalue(), alt)
    if not attributes:
        return shown
    return Html(shown.replace("<img ", "<img " + named(attributes) + " ", 1))


def named(attributes: dict[str, str]) -> str:
    return " ".join(f'{k.rstrip("_")}="{html.escape(v)}"' for k, v in attributes.items())


def nothing(text: str) -> Html:
    return element("p", text, class_="esd-nothing")


# --- a plan ------------------------------------------------------------------------------------


def plan_card(plan: Plan, ahead: int) -> Html:
    config = plan.config
    model = f"{plan.family}, {plan.resolution} px, on {plan.device}"
    spread = f"{short(plan.weights)} of {short(plan.all_weights)} weights"
    push = f"negative guidance {config.negative_guidance:g}, learning rate {config.learning_rate:g}"
    passes = (
        f"{short(plan.collect_passes)} UNet passes to collect, {short(plan.fit_passes)} to train"
    )
    facts: list[tuple[str, object]] = [
        ("Erase", user_text(", ".join(config.concepts))),
        *([("from", user_text(str(config.erase_from)))] if config.erase_from else []),
        ("Model", model),
        ("Trains", f"{config.train_method}: {spread}"),
        ("Recipe", f"{config.preset}, {config.iterations} steps, {push}"),
        ("Work", passes),
    ]
    if plan.pictures:
        facts.append(("Pictures", f"{plan.pictures} before and {plan.pictures} after"))
    parts = f"training {duration(plan.training_seconds)}"
    if plan.pictures:
        parts += f", pictures {duration(plan.drawing_seconds)}"
    expected = join(
        (
            element("b", "about ", data(plan.seconds, duration(plan.seconds))),
            f" ({parts}; measured here just now)",
        )
    )
    facts.append(("Expected time", expected))
    if ahead:
        facts.append(("Queue", f"{ahead} before yours"))
    return element("div", element("h3", "Plan"), fact_list(facts), class_="esd-card esd-plan")


def fact_list(facts: Sequence[tuple[str, object]]) -> Html:
    rows = (element("div", element("dt", k), element("dd", v)) for k, v in facts)
    return element("dl", *rows)


# --- jobs --------------------------------------------------------------------------------------


def jobs_list(jobs: Sequence[Job], ahead: Sequence[int]) -> Html:
    if not jobs:
        return nothing("Nothing was started from this browser yet.")
    drawn = [job for job in jobs if job.progress is not None and job.progress.look is not None]
    cards = [
        job_card(job, before, pictures=job in drawn[:WITH_PICTURES])
        for job, before in zip(jobs, ahead, strict=True)
    ]
    return element("div", *cards, class_="esd-jobs")


def job_card(job: Job, ahead: int, pictures: bool) -> Html:
    heading = element(
        "h3",
        user_text(job.title),
        " ",
        element("span", STATES[job.state], class_=f"esd-state esd-{job.state}"),
    )
    body: list[object] = [heading]
    seen: Seen | None = job.progress
    if job.state == "waiting":
        body.append(element("p", f"{ahead} before it in the queue." if ahead else "Next."))
    if job.state == "running":
        stopping = "Stopping after this step …" if job.cancelled else None
        body.append(progress_line(seen, stopping))
    if job.message:
        body.append(element("p", job.message, class_="esd-message"))
    if job.state in ("finished", "stopped") and job.result:
        link = element(
            "a", "Open the report", href=f"erasures/{job.result}/report", target="_blank"
        )
        body.append(element("p", link, " · it is in the library, and can be tried."))
    if seen is not None and seen.losses:
        room = seen.steps if job.state == "running" else 0  # for the steps to come
        body.append(curve(seen.losses, max(room, len(seen.losses))))
    if seen is not None and seen.look is not None and pictures:
        body.append(seen.look.html)
    return element("article", *body, class_="esd-card", id=f"job-{job.key}")


def progress_line(seen: Seen | None, instead: str | None) -> Html:
    if seen is None:
        return element("p", "Starting …")
    words, unit = PHASES[seen.phase]
    said = instead or words
    if seen.total:
        said += f": {unit} {seen.done} of {seen.total}"
        left = seconds_left(seen)
        said += f", about {duration(left)} left" if left is not None and not instead else ""
        bar = element("progress", max=seen.total, value=seen.done, aria_label=words)
    else:
        bar = element("progress", aria_label=words)
    return element("div", bar, element("p", said), class_="esd-progress")


def seconds_left(seen: Seen) -> float | None:
    """Of this phase, at the pace so far."""
    passed = time.monotonic() - seen.began
    if not seen.done or passed < 1:
        return None
    return max(1.0, passed / seen.done * (seen.total - seen.done))


def curve(losses: Sequence[float], total: int) -> Html:
    """A line in a box of 300 x 60, light enough to be sent every second."""
    high = max(losses) or 1.0
    every = max(1, len(losses) // 300)
    points = " ".join(
        f"{300 * i / max(1, total - 1):.1f},{58 - 56 * loss / high:.1f}"
        for i, loss in enumerate(losses)
        if i % every == 0 or i == len(losses) - 1
    )
    words = f"loss {losses[-1]:.4g} after {len(losses)} steps, at first {losses[0]:.4g}"
    line = element("polyline", points=points)
    svg = element(
        "svg", line, viewBox="0 0 300 60", preserveAspectRatio="none", role="img", aria_label=words
    )
    return element("figure", svg, element("figcaption", words), class_="esd-curve")


def before_and_now(look: Look) -> Html:
    from esd_fast.evaluation.pictures import tile

    cells = [
        element(
            "figure",
            element(
                "div",
                image(tile(row.before[0]), f"{row.label}, before"),
                image(tile(row.after[0]), f"{row.label}, now"),
            ),
            element("figcaption", user_text(row.label)),
            class_="esd-erased" if row.kind == "erased" else None,
        )
        for row in look.rows
    ]
    note = f"Before at the left, after {look.step} steps at the right, from the same noise."
    return element(
        "div",
        element("div", *cells, class_="esd-pairs"),
        element("p", note, class_="esd-note"),
    )


# --- pictures side by side ---------------------------------------------------------------------


def side_by_side(pair: Pair, scene: Scene, strength: float, titles: Sequence[str]) -> Html:
    rows = []
    right = f"strength {strength:g}" if titles else "no erasure chosen"
    for number, (was, now) in enumerate(zip(pair.original, pair.erased, strict=True)):
        seed = scene.seed + number
        rows.append(
            element(
                "div",
                *(
                    drawn_figure(picture, f"{heading}, seed {seed}", scene.prompt)
                    for picture, heading in ((was, "original"), (now, right))
                ),
                class_="esd-two",
            )
        )
    notes = [element("p", note, class_="esd-note") for note in pair.notes]
    return element("div", *rows, *notes, class_="esd-tried")


def drawn_figure(picture: Any, heading: str, prompt: str) -> Html:
    from esd_fast.generate import to_pil

    drawn = to_pil(picture)
    small = {"class_": "esd-pixels"} if drawn.width < 256 else {}
    shown = image(drawn, f"{prompt}: {heading}", **small)
    return element("figure", shown, element("figcaption", heading))


# --- library -----------------------------------------------------------------------------------


def entries_list(entries: Sequence[Entry]) -> Html:
    if not entries:
        return nothing("Nothing here yet. What you erase, or import, appears here.")
    return element("div", *map(entry_card, entries), class_="esd-library")


def entry_card(entry: Entry) -> Html:
    place = f"erasures/{entry.key}"
    facts = [entry.method, entry.model]
    if entry.steps is not None:
        facts.append(f"{entry.steps} steps")
    facts.append(time.strftime("%d %b %Y, %H:%M", time.localtime(entry.created)))
    if entry.interrupted:
        facts.append("stopped early")
    if entry.imported:
        facts.append("imported")
    links = [
        element("a", words, href=f"{place}/{format}", download="")
        for format, words in DOWNLOADS.items()
    ]
    report = None
    if entry.report:
        report = element("a", "Report", href=f"{place}/report", target="_blank", class_="esd-main")
    return element(
        "article",
        element("h3", user_text(entry.concept)),
        element("p", " · ".join(facts), class_="esd-note"),
        element("p", verdict(entry), class_="esd-verdict") if entry.report else None,
        element("nav", report, *links, aria_label=f"Downloads of {entry.concept}"),
        class_="esd-card",
    )


def verdict(entry: Entry) -> str:
    from esd_fast.evaluation.report import verdict_of

    from .library import json_in

    return verdict_of(json_in(entry.folder / "report.json"))[1]
