"""The tab that tries: the model as it is and erased, side by side, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from esd_fast.config import check_count, check_number, refuse
from esd_fast.prompts import clean_prompt

from .browsers import owner_of, saying
from .limits import Limits
from .models_offered import EMBEDDED
from .place import Place
from .shown import nothing, side_by_side
from .studio import Scene

HINT = "Choose erasures, say a prompt, and draw."


@dataclass(frozen=True)
class TryTab:
    """What the page needs of it."""

    erasures: gr.Dropdown
    model: gr.Dropdown
    place: Place

    def choices(self, chosen: Sequence[str] | None, owner: str) -> Any:
        found = [(entry.title, entry.key) for entry in self.place.library.entries(owner)]
        keys = [key for _, key in found]
        there = [key for key in chosen or [] if key in keys]
        if there and len(there) == len(chosen or []):
            return gr.Dropdown(choices=found)
        if not there and len(keys) == 1:
            there = keys
        # nothing is said of a choice that is empty: something may be chosen meanwhile
        return gr.Dropdown(choices=found, **({"value": there} if there or chosen else {}))


def try_tab(place: Place) -> TryTab:
    say = saying(place)
    limits = place.limits
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            erasures = gr.Dropdown(
                choices=[],
                multiselect=True,
                max_choices=limits.stacked,
                label="Erasures (several add up)",
                elem_id="erasures",
            )
            model = gr.Dropdown(
                choices=place.offered.labels(),
                value=place.offered.labels()[0],
                label="On the model",
                allow_custom_value=True,
                elem_id="try-model",
            )
            prompt = gr.Textbox(
                label="Prompt",
                value="a cat",
                max_length=limits.concept,
                elem_id="prompt",
            )
            strength = gr.Slider(
                0.0,
                2.0,
                value=1.0,
                step=0.05,
                label="Strength",
                info="0 is the original, 1 erased; beyond goes on in the same direction.",
                elem_id="try-strength",
            )
            with gr.Row():
                seed = gr.Number(
                    label="Seed",
                    value=0,
                    precision=0,
                    min_width=90,
                    elem_id="try-seed",
                )
                images = gr.Slider(
                    *(1, limits.images),
                    value=2,
                    step=1,
                    label="Pictures",
                    min_width=120,
                    elem_id="images",
                )
            with gr.Row():
                steps = gr.Slider(
                    *(1, limits.num_inference_steps),
                    value=25,
                    step=1,
                    label="Steps",
                    min_width=120,
                    elem_id="steps",
                )
                guidance = gr.Slider(
                    *(0, limits.guidance_scale),
                    value=4.0,
                    step=0.5,
                    label="Guidance",
                    min_width=120,
                    elem_id="guidance",
                )
            other = gr.Checkbox(
                label="Allow another model than the one it was made on", value=False
            )
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=6, min_width=320):
            shown = gr.HTML(nothing(HINT), elem_id="tried")
    drawn = gr.State(False)
    tab = TryTab(erasures, model, place)
    asked = [erasures, model, prompt, strength, seed, images, steps, guidance, other]

    @say
    def show(
        keys: list[str] | None,
        label: str,
        text: str,
        scale: float,
        first: float | None,
        count: float,
        taken: float,
        cfg: float,
        anywhere: bool,
        request: gr.Request,
    ) -> list[Any]:
        scene = scene_of(label, text, first, count, taken, cfg, limits)
        check_number("strength", scale)
        if abs(scale) > limits.strength:
            refuse("strength", scale, f"at most {limits.strength:g}")
        if keys and len(keys) > limits.stacked:
            raise ValueError(f"{len(keys)} erasures; at most {limits.stacked} are stacked")
        owner = owner_of(request)
        pair = place.studio.draw(scene, keys or [], scale, owner, bool(anywhere))
        return [side_by_side(pair, scene, scale, keys or []), True]

    def live(again: bool, request: gr.Request, *values: Any) -> list[Any]:
        """The slider: only where there are pictures to change."""
        return show(*values, request) if again else [gr.skip(), gr.skip()]

    @say
    def chosen(keys: list[str] | None, label: str, request: gr.Request) -> Any:
        """The model that the first of them was trained on, and how that is usually drawn."""
        owner = owner_of(request)
        entries = [place.library.get(key, owner) for key in (keys or [])[:1]]
        ours = [entry.model for entry in entries if entry.model in place.offered.labels()]
        return ours[0] if ours and ours[0] != label else gr.skip()

    def usual(label: str) -> float:
        return 4.0 if label == EMBEDDED else 7.5

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    visible: dict[str, Any] = {"api_visibility": "private", "show_progress_on": shown}
    draw.click(show, asked, [shown, drawn], trigger_mode="once", **visible)
    prompt.submit(show, asked, [shown, drawn], trigger_mode="once", **visible)
    strength.change(live, [drawn, *asked], [shown, drawn], trigger_mode="always_last", **visible)
    erasures.change(chosen, [erasures, model], [model], **hidden)
    model.change(usual, [model], [guidance], **hidden)
    return tab


def scene_of(
    label: str,
    text: str | None,
    seed: float | None,
    images: float,
    steps: float,
    guidance: float,
    limits: Limits,
) -> Scene:
    """Raises ValueError for what may not be asked for."""
    prompt = clean_prompt("prompt", text or "")
    limits.check_text("prompt", prompt)
    numbers = {"pictures": (images, limits.images), "steps": (steps, limits.num_inference_steps)}
    for name, (value, most) in numbers.items():
        check_number(name, value)
        check_count(name, int(value))
        if value > most:
            refuse(name, value, f"at most {most}")
    check_number("guidance", guidance)
    if abs(guidance) > limits.guidance_scale:
        refuse("guidance", guidance, f"at most {limits.guidance_scale:g}")
    first = seed or 0
    check_number("seed", first)
    if not 0 <= first < 2**53:  # what a browser's numbers hold exactly
        refuse("seed", first, "from 0 and below 2**53")
    return Scene(label, prompt, int(first), int(images), int(steps), float(guidance))
