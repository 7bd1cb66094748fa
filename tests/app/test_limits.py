"""What may be asked for, who gets in, and what is shown."""

import argparse
import asyncio
import base64
import os
from pathlib import Path

import pytest

from esd_fast.app.cookies import COOKIE, owner_in
from esd_fast.app.guard import WAITING_UPLOADS, Guard
from esd_fast.app.limits import Limits, hide_paths, is_loopback
from esd_fast.app.models_offered import OfferedModels
from esd_fast.app.wishes import Wish
from esd_fast.cli import main
from esd_fast.commands.app import VARIABLE, password_of
from esd_fast.demo import model_path


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        *((h, True) for h in ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1")),
        *((h, False) for h in ("0.0.0.0", "::", "192.168.1.2", "example.org", "")),
    ],
)
def test_loopback(host, ours):
    assert is_loopback(host) is ours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host is '0.0.0.0'"),
        (["--host", "::"], "--host is '::'"),
        (["--host", "0.0.0.0", "--password", "short"], "--password has 5 characters"),
        (["--password-file", "nowhere.txt"], "nowhere.txt"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-upload", "much"], "--max-upload is 'much'"),
    ],
)
def test_refused_before_anything_is_served(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert main(["app", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_password_from_file_or_variable(tmp_path):
    file = tmp_path / "password"
    file.write_text("long enough\n")
    arguments = argparse.Namespace(password=None, password_file=str(file))
    assert password_of(arguments, {}) == "long enough"
    with pytest.raises(ValueError, match="both given"):
        password_of(arguments, {VARIABLE: "another one"})
    arguments.password_file = None
    assert password_of(arguments, {VARIABLE: "another one"}) == "another one"
    assert password_of(arguments, {}) is None


# --- the guard -----------------------------------------------------------------------------------


def asked(guard, path="/", method="GET", **headers):
    """Status and headers of what the guard, or the application behind it, answers."""
    sent = []

    async def send(message):
        sent.append(message)

    coded = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": coded}
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


async def behind(_scope, _receive, send):
    html = [(b"content-type", b"text/html; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": html})
    await send({"type": "http.response.body", "body": b"in"})


def guard_of(folder, **settings):
    return Guard(behind, folder, 1000, **settings)


def basic(password):
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


def test_password_is_needed_for_everything(tmp_path, monkeypatch):
    async def at_once(_):
        return None

    monkeypatch.setattr(asyncio, "sleep", at_once)
    guard = guard_of(tmp_path, password="pass: wörd")
    for path in ("/", "/assets/index.js", "/config", "/erasures/a/delta", "/gradio_api/queue/join"):
        assert asked(guard, path)[0] == 401
        assert asked(guard, path, authorization=basic("pass: word"))[0] == 401
    for odd in ("Basic", "Basic !!", "Bearer abc", basic("")):
        assert asked(guard, authorization=odd)[0] == 401
    assert asked(guard, authorization=basic("pass: wörd"))[0] == 200


def test_only_what_the_page_needs_is_there(tmp_path):
    guard = guard_of(tmp_path)
    for path in ("/", "/config", "/assets/a.js", "/gradio_api/queue/data", "/erasures/a/report"):
        assert asked(guard, path)[0] == 200
    for path in (
        *("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://a/", "/gradio_api/run/show"),
        *(
            "/gradio_api/call/show",
            "/gradio_api/vibe-edit",
            "/monitoring",
            "/docs",
            "/openapi.json",
        ),
        *("/gradio_api/run-history/connect", "/gradio_api/stream/a", "/gradio_api/uploads"),
    ):
        assert asked(guard, path)[0] == 404


def test_other_names_are_not_answered(tmp_path):
    guard = guard_of(tmp_path, hosts=("127.0.0.1", "localhost", "::1"))
    for name in ("127.0.0.1:7860", "localhost", "[::1]:7860", "LOCALHOST:1"):
        assert asked(guard, host=name)[0] == 200
    for name in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""):
        assert asked(guard, host=name)[0] == 400


def test_uploads_are_bounded(tmp_path):
    guard = guard_of(tmp_path)

    def upload(length):
        said = {} if length is None else {"content_length": str(length)}
        return asked(guard, "/gradio_api/upload", "POST", **said)[0]

    assert upload(900) == 200
    assert upload(None) == 411
    assert upload(10**9) == 413
    assert asked(guard, "/gradio_api/queue/join", "POST", content_length="2000000")[0] == 413
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(bytes(WAITING_UPLOADS * 1000 - 500))
    assert upload(900) == 429  # together they would be too much
    (tmp_path / "a" / "large").unlink()
    for number in range(WAITING_UPLOADS):
        (tmp_path / f"tmp{number}").touch()
    os.utime(tmp_path / "tmp0", (0, 0))
    assert upload(1) == 200  # Gradio leaves empty ones behind
    assert not (tmp_path / "tmp0").exists()
    assert (tmp_path / "tmp1").exists()
    for number in range(WAITING_UPLOADS):
        (tmp_path / "a" / str(number)).write_bytes(b"x")
    assert upload(1) == 429


def test_pages_bring_a_cookie_and_may_fetch_nothing_from_elsewhere(tmp_path):
    _, headers = asked(guard_of(tmp_path))
    assert "default-src 'self'" in headers["content-security-policy"]
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    value = cookie.split(";")[0].removeprefix(f"{COOKIE}=")
    assert value not in owner_in({COOKIE: value})
    assert owner_in({COOKIE: value}) != owner_in({COOKIE: value[::-1]})
    _, again = asked(guard_of(tmp_path), cookie=f"{COOKIE}={value}")
    assert "set-cookie" not in again
    for none in ({}, {COOKIE: ""}, {COOKIE: "x"}):
        with pytest.raises(ValueError, match="cookie"):
            owner_in(none)


# --- what is shown, and what may be named --------------------------------------------------------


def test_paths_do_not_show():
    known = {"/srv/models/sd 15": "sd 15", "/srv/models": "models"}
    assert hide_paths("/srv/models/sd 15 holds no unet", known) == "sd 15 holds no unet"
    assert hide_paths("'/etc/ssl/key.pem' does not exist") == "'key.pem' does not exist"
    assert hide_paths(f"no {Path.home()}/a/b.txt") == "no b.txt"
    assert hide_paths("/srv/my work/a/b.txt", {"/srv/my work": "/work"}) == "b.txt"
    kept = "owner/name is no model; see https://a.b/c/d, 3/4 of it, AC/DC"
    assert hide_paths(kept) == kept


def test_models_are_named_by_label_alone(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "linked").symlink_to(model_path())
    (tmp_path / "models" / "notes.txt").touch()
    (tmp_path / "one.safetensors").touch()
    offered = OfferedModels.of(
        tmp_path / "models", [str(tmp_path / "one.safetensors"), "owner/name"]
    )
    assert offered.labels() == ["embedded", "one", "owner/name", "linked"]
    assert offered.source_of("embedded") is None
    assert offered.source_of("one") == str(tmp_path / "one.safetensors")
    assert offered.source_of("else/where") == "else/where"
    for bad in (
        *(str(tmp_path), str(model_path()), "../models", "models/../one.safetensors", "./one"),
        *("a/b/c", "/etc/passwd", "", None, 3, ["embedded"], "C:\\models\\a", "owner/na me"),
    ):
        with pytest.raises(ValueError, match="model is"):
            offered.source_of(bad)
    with pytest.raises(FileNotFoundError, match="--model"):
        OfferedModels.of(tmp_path, ["./nowhere"])


def test_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner" / "secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model is"):
        OfferedModels(tmp_path / "models").source_of("owner/secret")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(""), "say what to erase"),
        (Wish(" \n "), "say what to erase"),
        (Wish("x" * 1001), "1001 characters"),
        (Wish("\n".join(f"a{i}" for i in range(21))), "21 concepts"),
        (Wish("cat", strength=11.0), "strength is 11"),
        (Wish("cat", strength=float("nan")), "strength is nan"),
        (Wish("cat", strength=-1.0), "strength is -1"),
        (Wish("cat", pace="never"), "pace is 'never'"),
        (Wish("cat", iterations=20_000), "iterations is 20000"),
        (Wish("cat", iterations=-1), "iterations is -1"),
        (Wish("cat", seed=-1), "seed is -1"),
        (Wish("cat", train_method="magic"), "train_method is 'magic'"),
        (Wish("cat", model="/etc"), "model is '/etc'"),
    ],
)
def test_bad_wishes(wish, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        wish.config(OfferedModels(tmp_path), Limits())


def test_wish_is_the_recipe_times_strength_and_pace(tmp_path):
    offered = OfferedModels(tmp_path)
    plain = Wish("cat").config(offered, Limits())
    assert (plain.iterations, plain.negative_guidance, plain.learning_rate) == (200, 4.0, 2e-3)
    more = Wish("cat", strength=1.5, pace="thorough").config(offered, Limits())
    assert (more.iterations, more.negative_guidance) == (400, 6.0)
    two = Wish("cat\n dog \n", pace="quick").config(offered, Limits())
    assert two.concepts == ("cat", "dog")
    assert two.iterations == 100
    assert Wish("AC, DC").config(offered, Limits()).concepts == ("AC, DC",)
