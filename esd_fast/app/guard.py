"""Who gets in, and to what: in front of everything that the server answers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from .cookies import COOKIE, new_cookie
from .library import folder_size, forget_empty

# what the page needs of Gradio, and ours; whatever else it could do (read files, call other
# servers, edit itself) is not there
OPEN = ("/", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
OPEN_UNDER = (
    *("/assets/", "/static/", "/svelte/", "/erasures/"),
    *("/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/upload_progress"),
)
OPEN_API = tuple(
    f"/gradio_api/{name}" for name in ("upload", "cancel", "reset", "reset/", "startup-events")
)
UPLOAD = "/gradio_api/upload"
LARGEST_REQUEST = 1 << 20  # bytes of any other
OVERHEAD = 1 << 16  # bytes of a multipart body besides the file
WAITING_UPLOADS = 8  # files that lie in the folder and have not been taken in yet
HEADERS = {
    # nothing is fetched from elsewhere, and no other page may put this one into a frame
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass
class Guard:
    """ASGI. `password`: asked for as HTTP Basic does it, any user name. `hosts`: names that the
    server answers to, so that no other site's name can be pointed at it; None: any."""

    app: Any
    uploads: Path
    upload_bytes: int
    password: str | None = None
    hosts: tuple[str, ...] | None = None
    wrong: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = await self.refusal(scope, headers)
        if refusal is not None:
            await answer(send, *refusal)
            return
        await self.app(scope, receive, with_headers(send, cookie_for(headers)))

    async def refusal(
        self, scope: Any, headers: dict[str, str]
    ) -> tuple[int, str, dict[str, str]] | None:
        """Status, words and headers."""
        if self.hosts is not None and host_name(headers.get("host", "")) not in self.hosts:
            return 400, "This name is not the server's.", {}
        if self.password is not None and not given(headers, self.password):
            if "authorization" in headers:
                async with self.wrong:  # one guess a second, from whomever
                    await asyncio.sleep(1)
            return 401, "A password is needed.", {"WWW-Authenticate": 'Basic realm="esd-fast"'}
        path = scope["path"]
        if not (path in OPEN or path in OPEN_API or path.startswith(OPEN_UNDER)):
            return 404, "There is nothing here.", {}
        if scope["method"] in ("GET", "HEAD"):
            return None
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "Say how long it is.", {}
        if path == UPLOAD:
            return self.upload_refusal(int(length))
        if int(length) > LARGEST_REQUEST:
            return 413, "This is more than the page ever sends.", {}
        return None

    def upload_refusal(self, length: int) -> tuple[int, str, dict[str, str]] | None:
        if length > self.upload_bytes + OVERHEAD:
            return 413, f"The file may have {self.upload_bytes >> 20} MB at most.", {}
        forget_empty(self.uploads)
        files = (path for path in self.uploads.rglob("*") if path.is_file())
        waiting = sum(path.stat().st_size > 0 for path in files)
        room = WAITING_UPLOADS * self.upload_bytes - folder_size(self.uploads)
        if waiting >= WAITING_UPLOADS or length > room:
            return 429, "Too many files were sent at once; try again later.", {}
        return None


def given(headers: dict[str, str], password: str) -> bool:
    kind, _, coded = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return False
    try:
        said = base64.b64decode(coded, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return secrets.compare_digest(said, password.encode())


def host_name(host: str) -> str:
    """Of "name:port", "1.2.3.4:port", "[::1]:port"."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def cookie_for(headers: dict[str, str]) -> str | None:
    """A new one, where the browser has none."""
    try:
        if COOKIE in SimpleCookie(headers.get("cookie", "")):
            return None
    except CookieError:
        pass
    secure = "; Secure" if headers.get("x-forwarded-proto") == "https" else ""
    month = 30 * 24 * 3600
    return f"{COOKIE}={new_cookie()}; Path=/; Max-Age={month}; HttpOnly; SameSite=Lax{secure}"


def with_headers(send: Any, cookie: str | None) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            there = {name.decode("latin-1").lower() for name, _ in message["headers"]}
            added = [(k, v) for k, v in HEADERS.items() if k.lower() not in there]
            if cookie is not None and any(
                n.lower() == b"content-type" and v.startswith(b"text/html")
                for n, v in message["headers"]
            ):
                added.append(("Set-Cookie", cookie))
            coded = [(k.lower().encode(), v.encode()) for k, v in added]
            message = {**message, "headers": [*message["headers"], *coded]}
        await send(message)

    return sending


async def answer(send: Any, status: int, words: str, headers: dict[str, str]) -> None:
    told = {**HEADERS, "Content-Type": "text/plain; charset=utf-8", **headers}
    coded = [(k.lower().encode(), v.encode()) for k, v in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": coded})
    await send({"type": "http.response.body", "body": words.encode()})
