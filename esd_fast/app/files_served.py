"""Reports and downloads of the library: by an erasure's key, never by a path."""

from __future__ import annotations

from typing import Any

from .cookies import owner_in
from .library import Library
from .place import Place

# a report is one file without a script: the browser is held to that
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox allow-popups"


def add_routes(app: Any, place: Place) -> None:
    from fastapi import Request
    from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse

    library: Library = place.library

    def report(key: str, request: Request) -> Any:
        try:
            entry = library.get(key, owner_in(request.cookies))
            if entry.report is None:
                raise FileNotFoundError("this erasure came without a report")
            text = entry.report.read_text(encoding="utf-8")
        except (ValueError, OSError) as error:
            return PlainTextResponse(place.told(error), 404)
        for path, label in place.offered.paths().items():  # of a run from the command line
            text = text.replace(path, label)
        return HTMLResponse(text, headers={"Content-Security-Policy": REPORT_POLICY})

    def download(key: str, format: str, request: Request) -> Any:
        try:
            entry = library.get(key, owner_in(request.cookies))
            with place.studio.turns.turn():
                path, name = library.download(entry, format)
        except FileNotFoundError as error:
            return PlainTextResponse(place.told(error), 404)
        except (ValueError, OSError, RuntimeError) as error:
            return PlainTextResponse(place.told(error), 409)
        return FileResponse(path, filename=name, media_type="application/octet-stream")

    for function in (report, download):  # annotations above are texts, which FastAPI cannot find
        function.__annotations__["request"] = Request
    app.add_api_route("/erasures/{key}/report", report, methods=["GET"], response_model=None)
    app.add_api_route("/erasures/{key}/{format}", download, methods=["GET"], response_model=None)
