"""The tab with what there is: reports, downloads, one brought along, a stopped run gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from .browsers import owner_of, saying, still
from .erase_tab import EraseTab
from .erasing import Erasing
from .place import Place
from .shown import entries_list, nothing
from .wishes import Wish


@dataclass(frozen=True)
class LibraryTab:
    """What the page needs of it."""

    entries: gr.HTML
    stopped: gr.Dropdown
    go_on: gr.Button
    place: Place

    @property
    def listed(self) -> list[Any]:
        return [self.entries, self.stopped, self.go_on]

    def look(self, chosen: str | None, owner: str) -> list[Any]:
        """For `listed`."""
        found = self.place.library.entries(owner)
        choices = [(e.title, e.key) for e in found if e.resumable]
        keys = [key for _, key in choices]
        return [
            entries_list(found),
            gr.Dropdown(choices=choices, visible=bool(choices), **still(chosen, keys)),
            gr.Button(visible=bool(choices)),
        ]


def library_tab(place: Place, erasing: EraseTab) -> LibraryTab:
    say = saying(place)
    size = place.limits.upload_bytes // 2**20
    with gr.Row(equal_height=True):
        upload = gr.UploadButton(
            f"Import an erasure (.safetensors, at most {size} MB)",
            file_types=[".safetensors"],
            file_count="single",
            elem_id="import",
            min_width=280,
        )
        stopped = gr.Dropdown(label="Stopped runs", visible=False, elem_id="stopped")
        go_on = gr.Button("Go on with it", visible=False, elem_id="go-on")
    entries = gr.HTML(nothing("Nothing here yet."), elem_id="library")
    tab = LibraryTab(entries, stopped, go_on, place)

    @say
    def bring(file: str | None, chosen: str | None, request: gr.Request) -> list[Any]:
        owner = owner_of(request)
        if file is not None:
            path = Path(file)
            try:
                entry = place.library.bring(path, path.name, owner)
            finally:
                path.unlink(missing_ok=True)
            gr.Info(f"Imported: {entry.method}", duration=4)
        return tab.look(chosen, owner)

    @say
    def resume(key: str | None, request: gr.Request) -> list[Any]:
        owner = owner_of(request)
        entry = place.library.get(key, owner)
        if not entry.resumable:
            raise ValueError("this run is finished")
        if any(job.undone and job.result == entry.key for job in place.jobs.jobs):
            raise ValueError("it is being gone on with already")
        wish = Wish(entry.concept, model=entry.model, proof=entry.proof)
        parts = (wish, owner, place.offered, place.library, place.studio)
        job = place.jobs.submit(owner, entry.concept, Erasing(*parts, resume=entry.folder))
        job.result = entry.key
        gr.Info("It goes on: see the first tab.", duration=4)
        return [*tab.look(key, owner), *erasing.look(None, owner)]

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    upload.upload(bring, [upload, stopped], tab.listed, **hidden)
    go_on.click(resume, [stopped], [*tab.listed, *erasing.watched], **hidden)
    return tab
