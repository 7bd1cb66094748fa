"""The server: Gradio's page, the library's files, and the guard in front of both."""

from __future__ import annotations

import contextlib
import os
from importlib import resources
from typing import Any

from .place import Place


def web_app(place: Place, password: str | None = None, hosts: tuple[str, ...] | None = None) -> Any:
    """An ASGI application."""
    prepare(place)
    import gradio as gr
    from fastapi import FastAPI

    from .files_served import add_routes
    from .guard import Guard
    from .page import page, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, place)
    blocks = page(place).queue(api_open=False, default_concurrency_limit=4, max_size=100)
    blocks.enable_monitoring = False
    app = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=place.limits.upload_bytes,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"),
    )
    return Guard(app, place.work / "uploads", place.limits.upload_bytes, password, hosts)


def prepare(place: Place) -> None:
    """Gradio reads these when it is imported: nothing is told to anybody, and what is uploaded
    lies in the work folder."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": str(place.work / "uploads"),
        "GRADIO_SSR_MODE": "False",
    }


def serve(place: Place, host: str, port: int, password: str | None) -> None:
    """Until Ctrl-C or SIGTERM; a job that runs then puts its work away first."""
    import uvicorn

    from esd_fast.interrupts import sigterm_interrupts

    from .limits import is_loopback

    hosts = ("localhost", "127.0.0.1", "::1", host.strip("[]").lower())
    app = web_app(place, password, hosts if is_loopback(host) else None)
    config = uvicorn.Config(
        app,
        host=host.strip("[]"),
        port=port,
        log_level="critical",  # at the end it tells of every page that is still open
        server_header=False,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    server = announcing()(config, place)
    try:
        # uvicorn raises the signal that ended it anew, and a plain SIGTERM would be the end
        with sigterm_interrupts(True), contextlib.suppress(KeyboardInterrupt):
            server.run()
    finally:
        place.jobs.close()


def announcing() -> Any:
    """Made late: uvicorn is Gradio's, and comes with it."""
    import uvicorn

    class Server(uvicorn.Server):
        def __init__(self, config: Any, place: Place) -> None:
            super().__init__(config)
            self.place = place

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                name = self.config.host
                shown = f"[{name}]" if ":" in name else name
                port = self.servers[0].sockets[0].getsockname()[1]
                print(f"http://{shown}:{port}/ (work folder: {self.place.work})", flush=True)

    return Server
