"""The page: three tabs, and what is filled in when it is opened."""

from __future__ import annotations

from typing import Any

import gradio as gr

from esd_fast.evaluation.markup import element

from .browsers import owner_of, saying
from .erase_tab import erase_tab
from .library_tab import library_tab
from .place import Place
from .try_tab import try_tab

TITLE = "esd-fast"


def page(place: Place) -> gr.Blocks:
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(
            element(
                "div",
                element("h1", "esd-fast"),
                element("p", "Make a diffusion model forget: an object, a style, a name."),
                class_="esd-head",
            )
        )
        with gr.Tabs():
            with gr.Tab("Erase", id="erase") as first:
                erasing = erase_tab(place)
            with gr.Tab("Try", id="try") as second:
                trying = try_tab(place)
            with gr.Tab("Library", id="library") as third:
                library = library_tab(place, erasing)

        say = saying(place)
        models = (erasing.model, trying.model)  # the owner may have put others into the folder

        @say
        def opened(request: gr.Request) -> list[Any]:
            owner = owner_of(request)
            return [
                *erasing.look(None, owner),
                *library.look(None, owner),
                trying.choices(None, owner),
                *(gr.Dropdown(choices=place.offered.labels()) for _ in models),
            ]

        @say
        def watch_again(which: str | None, request: gr.Request) -> list[Any]:
            return erasing.look(which, owner_of(request))

        @say
        def choose(keys: list[str] | None, request: gr.Request) -> Any:
            return trying.choices(keys, owner_of(request))

        @say
        def list_again(chosen: str | None, request: gr.Request) -> list[Any]:
            return library.look(chosen, owner_of(request))

        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        everything = [*erasing.watched, *library.listed, trying.erasures, *models]
        blocks.load(opened, None, everything, **hidden)
        first.select(watch_again, [erasing.which], erasing.watched, **hidden)
        second.select(choose, [trying.erasures], [trying.erasures], **hidden)
        third.select(list_again, [library.stopped], library.listed, **hidden)
    return blocks


def theme() -> Any:
    """Gradio's plainest with fonts of the machine that shows it: nothing is fetched."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500")  # its own is too pale to read
