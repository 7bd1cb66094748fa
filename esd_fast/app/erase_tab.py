"""The tab that erases: a form, its plan, and the jobs of this browser while they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from esd_fast.config import PRESETS
from esd_fast.parameters import METHODS

from .browsers import owner_of, saying, still
from .erasing import Erasing
from .place import Place
from .planning import plan_of
from .shown import jobs_list, nothing, plan_card
from .wishes import PACES, PROOFS, Wish

RECIPES = "the recipe's"
PACE_NAMES = {
    "quick": "quick (a quarter of the steps)",
    "standard": "standard",
    "thorough": "thorough (twice the steps)",
}
PROOF_NAMES = {
    "measured": "pictures and counts",
    "pictures": "pictures",
    "none": "none",
}
assert PACE_NAMES.keys() == PACES.keys()
assert PROOF_NAMES.keys() == PROOFS.keys()


@dataclass(frozen=True)
class EraseTab:
    """What other tabs and the page need of it."""

    jobs: gr.HTML
    timer: gr.Timer
    which: gr.Dropdown
    cancel: gr.Button
    model: gr.Dropdown
    place: Place

    @property
    def watched(self) -> list[Any]:
        return [self.jobs, self.which, self.cancel, self.timer]

    def look(self, which: str | None, owner: str) -> list[Any]:
        """For `watched`."""
        jobs = self.place.jobs.of(owner)
        undone = [j for j in reversed(jobs) if j.undone]
        choices = [(f"{j.title} ({j.state})", j.key) for j in undone]
        keys = [key for _, key in choices]
        return [
            jobs_list(jobs, [self.place.jobs.ahead(j) for j in jobs]),
            gr.Dropdown(choices=choices, visible=len(undone) > 1, **still(which, keys)),
            gr.Button(visible=bool(undone)),
            gr.Timer(active=bool(undone)),
        ]


def erase_tab(place: Place) -> EraseTab:
    say = saying(place)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            concept = gr.Textbox(
                label="Concept to erase",
                placeholder="cat",
                info="An object, a style, a name. Several: one a line.",
                lines=1,
                max_lines=6,
                max_length=place.limits.concept,
                elem_id="concept",
            )
            erase_from = gr.Textbox(
                label="Erase it only from (optional)",
                placeholder="a wider prompt, such as: pet",
                max_length=place.limits.concept,
                elem_id="erase-from",
            )
            model = gr.Dropdown(
                choices=place.offered.labels(),
                value=place.offered.labels()[0],
                label="Model",
                info="Or type a hub id, owner/name.",
                allow_custom_value=True,
                elem_id="model",
            )
            method = gr.Dropdown(
                choices=[
                    (RECIPES, ""),
                    *((f"{n}: {text}", n) for n, text in METHODS.items()),
                ],
                value="",
                label="Method (which weights train)",
                elem_id="method",
            )
            strength = gr.Slider(
                0.25,
                3.0,
                value=1.0,
                step=0.25,
                label="Strength",
                info="1 is the recipe's negative guidance; more pushes farther, and takes more along.",
                elem_id="strength",
            )
            pace = gr.Radio(
                choices=[(words, name) for name, words in PACE_NAMES.items()],
                value="standard",
                label="Speed or quality",
                elem_id="pace",
            )
            with gr.Accordion("More settings", open=False, elem_id="more"):
                preset = gr.Dropdown(
                    choices=list(PRESETS), value="fast", label="Recipe", elem_id="preset"
                )
                # 0, not empty: in a closed accordion Gradio makes 0 of an empty one
                iterations = gr.Number(
                    label="Steps (0: the recipe's)",
                    value=0,
                    precision=0,
                    elem_id="iterations",
                )
                rate = gr.Number(label="Learning rate (0: the recipe's)", value=0, elem_id="rate")
                seed = gr.Number(label="Seed", value=0, precision=0, elem_id="seed")
                proof = gr.Radio(
                    choices=[(words, name) for name, words in PROOF_NAMES.items()],
                    value="measured",
                    label="Report",
                    info="Counts (how often a classifier sees the concept) are the embedded model's alone.",
                    elem_id="proof",
                )
            planned = gr.Button("Show plan and time", variant="primary", elem_id="plan")
        with gr.Column(scale=6, min_width=320):
            plan = gr.HTML(nothing("The plan is shown here, before anything starts."))
            start = gr.Button("Start erasing", variant="primary", visible=False, elem_id="start")
            gr.Markdown("### Your jobs")
            which = gr.Dropdown(label="Which job to cancel", visible=False, elem_id="which")
            cancel = gr.Button("Cancel, and keep the work", visible=False, elem_id="cancel")
            jobs = gr.HTML(nothing("Nothing was started from this browser yet."), elem_id="jobs")
    wish = gr.State(None)
    timer = gr.Timer(1.0, active=False)
    tab = EraseTab(jobs, timer, which, cancel, model, place)
    form: list[Any] = [concept, erase_from, model, method, preset, pace, strength]
    form += [iterations, rate, seed, proof]

    @say
    def show_plan(*values: Any) -> list[Any]:
        asked = wish_of(*values)
        card = plan_card(
            plan_of(asked, place.offered, place.studio, place.limits),
            sum(j.undone for j in place.jobs.jobs),
        )
        return [card, asked, gr.Button(visible=True)]

    @say
    def begin(
        asked: Wish | None, chosen: str | None, request: gr.Request, *values: Any
    ) -> list[Any]:
        if asked is None or asked != wish_of(*values):
            raise ValueError("the form says something else than the plan; show the plan first")
        owner = owner_of(request)
        title = ", ".join(asked.concepts)
        work = Erasing(asked, owner, place.offered, place.library, place.studio)
        place.jobs.submit(owner, title, work)
        cleared = [nothing("Started: see below."), None, gr.Button(visible=False)]
        return [*cleared, *tab.look(chosen, owner)]

    @say
    def stop(chosen: str | None, request: gr.Request) -> list[Any]:
        owner = owner_of(request)
        if chosen is not None:
            place.jobs.cancel(owner, chosen)
        return tab.look(chosen, owner)

    @say
    def watch(chosen: str | None, request: gr.Request) -> list[Any]:
        return tab.look(chosen, owner_of(request))

    def changed() -> list[Any]:
        return [nothing("Changed: show the plan anew."), None, gr.Button(visible=False)]

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    planned.click(
        show_plan, form, [plan, wish, start], api_visibility="private", show_progress_on=plan
    )
    gr.on([part.change for part in form], changed, None, [plan, wish, start], **hidden)
    start.click(begin, [wish, which, *form], [plan, wish, start, *tab.watched], **hidden)
    cancel.click(stop, [which], tab.watched, **hidden)
    timer.tick(watch, [which], tab.watched, concurrency_limit=8, **hidden)
    return tab


def wish_of(
    concept: str | None,
    erase_from: str | None,
    model: str,
    method: str | None,
    preset: str,
    pace: str,
    strength: float,
    iterations: float | None,
    rate: float | None,
    seed: float | None,
    proof: str,
) -> Wish:
    """As the form has it."""
    return Wish(
        concept=concept or "",
        erase_from=erase_from or "",
        model=model,
        train_method=method or None,
        preset=preset,
        pace=pace,
        strength=strength,
        iterations=int(iterations) if iterations else None,
        learning_rate=rate or None,
        seed=int(seed or 0),
        proof=proof,
    )
