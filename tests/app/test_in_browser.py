"""The web app as people use it: a server in a process of its own, headless Chromium, the embedded
model. One story, in the order of the tests; what they compare with is diffusers' own."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("gradio", reason="the web app needs Gradio: pip install '.[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from playwright.sync_api import expect

import esd_fast
from esd_fast.demo import model_path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
LONG = 200_000  # milliseconds: machines that test do other things as well
SCREENSHOTS = os.environ.get("ESD_FAST_SCREENSHOTS")  # a folder, to look at them
PASSWORD = "open sesame"
TINY = Path(__file__).parents[1] / "golden" / "sd-ddim"
MANY = 2000  # steps: more than are ever taken here
# two prompts in one picture each, not six in two: it is the drawing that takes the time
FEWER_PICTURES = """
import sys
from dataclasses import replace
from esd_fast.app import erasing, planning
whole = planning.proof_of
def fewer(*given):
    proof = whole(*given)
    return replace(proof, columns=min(1, proof.columns), prompts=proof.prompts[:2])
planning.proof_of = erasing.proof_of = fewer
from esd_fast.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address, and its work folder."""
    work = tmp_path_factory.mktemp("app")
    process = subprocess.Popen(
        [
            *(sys.executable, "-P", "-c", FEWER_PICTURES, "app", "--work", str(work)),
            *("--port", "0", "--model", str(TINY), "--max-upload", "8MB"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "ESD_FAST_PASSWORD": PASSWORD,
            "HF_HUB_OFFLINE": "1",  # no test asks the hub
        },
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://\S+/", line):
            break
    else:
        pytest.fail(f"the server did not start:\n{said}")
    yield found[0], work
    process.terminate()
    try:
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    # Gradio tells of choices that its page never sent
    faults = re.findall(r"^\S*(?:Error|Exception)\b.*", rest, re.MULTILINE)
    assert rest.count("Traceback") == len(faults), rest
    assert all("is not in the list of choices" in fault for fault in faults), rest
    assert process.returncode == 0


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        expect.set_options(timeout=LONG)
        yield browser
        browser.close()


class Visitor:
    """A browser of its own at one of the widths; notes what its page asks for and complains of."""

    everyone: ClassVar[list] = []

    def __init__(self, browser, address: str, width: int = 1280, height: int = 900) -> None:
        self.address, self.width, self.asked, self.complaints = address, width, [], []
        self.leaving = False
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            http_credentials={"username": "anybody", "password": PASSWORD},
        )
        self.context.set_default_timeout(LONG)
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complain(str(error)))
        self.page.on("console", self.listen)
        self.everyone.append(self)
        self.open()

    def listen(self, message) -> None:
        if message.type == "error":
            self.complain(message.text)

    def complain(self, text: str) -> None:
        if not self.leaving:
            self.complaints.append(text)

    def open(self) -> None:
        """Opens the page, or opens it anew: while it is left, Gradio complains of the connections
        that end with it."""
        self.leaving = True
        self.page.goto("about:blank")
        self.leaving = False
        self.page.goto(self.address)
        self.page.wait_for_selector("#plan")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def fill(self, place: str, value: object) -> None:
        """A field of one of the forms, by its element's id."""
        field = self.page.locator(f"#{place} textarea, #{place} input:not([type=range])").first
        field.fill(str(value))
        field.press("Tab")

    def choose(self, place: str, words: str) -> None:
        """From a list."""
        self.page.locator(f"#{place} input").first.click()
        self.page.get_by_role("option", name=words).first.click()

    def wish(self, concept: str, steps: int, report: str, recipe: str = "fast") -> None:
        self.tab("Erase")
        if not self.page.locator("#iterations input").is_visible():
            self.page.locator("#more button").first.click()
        self.fill("concept", concept)
        self.fill("iterations", steps)
        self.choose("preset", recipe)
        self.page.locator("#proof").get_by_label(report, exact=True).check()

    def plan(self):
        """The card."""
        self.page.locator("#plan").click()
        card = self.page.locator(".esd-plan")
        expect(card).to_contain_text("Expected time")
        return card

    def start(self) -> None:
        jobs = self.page.locator("#jobs article").count()
        self.page.locator("#start").click()
        expect(self.page.locator("#jobs article")).to_have_count(jobs + 1)

    def job(self, number: int = 0):
        """The newest first."""
        return self.page.locator("#jobs article").nth(number)

    def state(self, number: int = 0):
        return self.job(number).locator(".esd-state")

    def told(self, said: str) -> None:
        """An error is on the page: a line, without a place of the server or words of Python."""
        toast = self.page.get_by_test_id("toast-body").filter(has_text=said).first
        expect(toast).to_be_visible()
        text = toast.get_by_test_id("toast-text").inner_text()
        assert "\n" not in text.strip()
        assert not re.search(r"Traceback|\w+Error\b|/tmp|site-packages|\.py\b", text), text
        for close in self.page.get_by_test_id("toast-close").all()[::-1]:
            close.click()
        expect(self.page.get_by_test_id("toast-body")).to_have_count(0)

    def pixels(self, picture) -> np.ndarray:
        """(H, W, 3) of an <img>, which is in the page itself."""
        kind, _, coded = picture.get_attribute("src").partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(coded))) as image:
            return np.asarray(image.convert("RGB"), dtype=int)

    def download(self, card, words: str, folder: Path) -> Path:
        with self.page.expect_download(timeout=LONG) as download:
            card.get_by_role("link", name=words, exact=True).click()
        file = folder / download.value.suggested_filename
        download.value.save_as(file)
        return file

    def shoot(self, name: str) -> None:
        """Nothing sticks out at the right, and there is a picture to look at."""
        assert self.page.evaluate(STICKING_OUT) == []
        if SCREENSHOTS:
            self.page.wait_for_timeout(400)
            self.page.screenshot(
                path=f"{SCREENSHOTS}/{name}-{self.width}.png", full_page=True, animations="disabled"
            )


STICKING_OUT = """() => [
    ...(document.documentElement.scrollWidth > innerWidth ? ["the page"] : []),
    ...[...document.querySelectorAll("main *, .esd-card *")].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width > 1 && box.height > 1 && box.right > innerWidth + 1
            && getComputedStyle(e).visibility === "visible";
    }).map(e => e.outerHTML.slice(0, 200)),
]"""


@pytest.fixture(scope="module")
def visitor(server, chromium):
    """The one whose story it is."""
    return Visitor(chromium, server[0])


@pytest.fixture(scope="module")
def other(chromium, visitor):
    """Somebody else, with a telephone."""
    return Visitor(chromium, visitor.address, 390, 844)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Where downloads go."""
    return tmp_path_factory.mktemp("downloads")


def test_nobody_comes_in_without_the_password(server):
    for path in ("/", "/config", "/gradio_api/queue/data", "/erasures/a/delta"):
        assert b" 401 " in raw(server[0], path, password=None)
        assert b" 401 " in raw(server[0], path, password="wrong one")


def test_plan_comes_before_the_work(visitor, server):
    visitor.wish("cat", 8, "pictures")
    card = visitor.plan()
    expect(card).to_contain_text("esd-x-strict")
    expect(card).to_contain_text("8 steps")
    # one trajectory of 10 steps, two predictions at each; a step is a forward and a backward
    expect(card).to_contain_text("20 UNet passes to collect, 16 to train")
    expect(card).to_contain_text("2 before and 2 after")
    assert not list((server[1] / "erasures").iterdir())
    visitor.shoot("plan")
    visitor.fill("concept", "dog")  # another wish: another plan
    expect(visitor.page.locator("#start")).to_be_hidden()
    visitor.fill("concept", "cat")


def test_erasing_is_watched_to_its_end(visitor, server):
    visitor.plan()
    visitor.start()
    cat = visitor.page.locator("#jobs article:has(.esd-running)")
    expect(cat.locator("progress")).to_be_visible()
    expect(cat.locator("svg polyline")).to_be_visible()
    expect(cat.locator(".esd-pairs img")).to_have_count(4)
    expect(cat.locator(".esd-pairs figcaption")).to_have_text(["a cat", "a cat in ink style"])
    before, now = (visitor.pixels(cat.locator(".esd-pairs img").nth(i)) for i in (0, 1))
    assert (before != now).any()
    visitor.shoot("erasing")
    expect(visitor.state()).to_have_text("done")
    expect(visitor.job()).to_contain_text("after 8 steps")
    (folder,) = (server[1] / "erasures").iterdir()
    for name in ("report.html", "report.json", "manifest.json", "before_after.png", "loss.png"):
        assert (folder / name).stat().st_size
    assert len(json.loads((folder / "manifest.json").read_text())["losses"]) == 8


def test_one_job_at_a_time(visitor, other):
    # by the recipe whose samples are drawn with the model as it learns: the loss is there at once
    visitor.wish("dog", MANY, "none", "paper")
    visitor.plan()
    visitor.start()
    expect(visitor.state()).to_have_text("running")
    visitor.wish("ink", 2, "none")
    visitor.choose("model", TINY.name)
    expect(visitor.plan()).to_contain_text("1 before yours")
    visitor.start()
    expect(visitor.job()).to_contain_text("1 before it in the queue")
    expect(visitor.state()).to_have_text("waiting")
    expect(visitor.state(1)).to_have_text("running")
    expect(visitor.job(1).locator("svg polyline")).to_be_visible()
    visitor.shoot("queue")
    # somebody else sees that there is a queue, and nothing of whose
    expect(other.page.locator("#jobs")).to_contain_text("Nothing was started")
    other.wish("house", 2, "none")
    expect(other.plan()).to_contain_text("2 before yours")
    other.tab("Library")
    expect(other.page.locator("#library")).to_contain_text("Nothing here yet")
    other.tab("Try")
    other.page.locator("#erasures input").click()
    expect(other.page.get_by_role("option")).to_have_count(0)
    assert "dog" not in other.page.locator("body").inner_text()


def test_others_can_neither_reach_nor_stop_what_is_mine(visitor, other, server):
    """By requests that the page would not send, with the keys that nobody else should know."""
    cat = next((server[1] / "erasures").glob("cat-*")).name
    dog = visitor.job(1).get_attribute("id").removeprefix("job-")
    for place in ("report", "delta", "lora", "single-file"):
        answer = other.context.request.get(f"{server[0]}erasures/{cat}/{place}")
        assert answer.status == 404
        assert answer.text() == "there is no such erasure"
    assert visitor.context.request.get(f"{server[0]}erasures/{cat}/report").status == 200
    for button, given in (
        ("cancel", [dog]),
        ("go-on", [cat]),
        ("draw", [[cat], "embedded", "a cat", 1, 0, 1, 2, 4, False]),
    ):
        answer = pressed(other, button, given)
        assert '"success":true' not in answer or button == "cancel"
        assert "<img" not in answer
        assert "dog" not in answer
    expect(visitor.state(1)).to_have_text("running")
    assert "Stopping" not in visitor.job(1).inner_text()


def pressed(visitor, button: str, given: list) -> str:
    """What comes of the button with these inputs, whatever the page says."""
    request = visitor.context.request
    config = request.get(f"{visitor.address}config").json()
    (component,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == button)
    number, inputs = next(
        (d["id"], d["inputs"])
        for d in config["dependencies"]
        if [component, "click"] in d["targets"]
    )
    assert len(inputs) == len(given)
    session = f"by-hand-{button}"
    joined = request.post(
        f"{visitor.address}gradio_api/queue/join",
        data={"data": given, "fn_index": number, "session_hash": session},
    )
    assert joined.status == 200, joined.text()
    return request.get(
        f"{visitor.address}gradio_api/queue/data?session_hash={session}", timeout=LONG
    ).text()


def test_cancelled_job_keeps_its_work_and_the_next_runs(visitor, server):
    page = visitor.page
    page.locator("#which input").click()
    expect(page.get_by_role("option")).to_have_count(2)
    page.get_by_role("option", name="dog").click()
    page.locator("#cancel").click()
    expect(visitor.state(1)).to_have_text("stopped")
    expect(visitor.job(1).locator(".esd-message")).to_contain_text(f"of {MANY} steps, and kept")
    (kept,) = (server[1] / "erasures").glob("dog-*")
    taken = len(json.loads((kept / "manifest.json").read_text())["losses"])
    assert 0 < taken < MANY
    assert esd_fast.load(kept).manifest["interrupted"]
    expect(visitor.state()).to_have_text("done")
    expect(page.locator("#cancel")).to_be_hidden()


def test_stopped_job_is_gone_on_with(visitor, server):
    page = visitor.page
    visitor.tab("Library")
    expect(page.locator("#library article")).to_have_count(3)
    expect(page.locator("#library article", has_text="dog")).to_contain_text("stopped early")
    page.locator("#go-on").click()
    visitor.tab("Erase")
    expect(visitor.state()).to_have_text("running")
    expect(visitor.job()).to_contain_text("Training")
    page.locator("#cancel").click()
    expect(visitor.state()).to_have_text("stopped")
    expect(visitor.job().locator(".esd-message")).to_contain_text("and kept")
    assert len(list((server[1] / "erasures").iterdir())) == 3


def test_downloads_are_what_other_tools_read(visitor, server, files):
    visitor.tab("Library")
    card = visitor.page.locator("#library article", has_text="cat")
    names = ("delta", "LoRA (diffusers)", "LoRA (A1111, ComfyUI)", "single file")
    delta, lora, kohya, whole = (visitor.download(card, words, files) for words in names)
    (made,) = (server[1] / "erasures").glob("cat-*/esd-*.safetensors")
    tensors = esd_fast.load(delta).tensors
    assert all(t.equal(tensors[n]) for n, t in load_file(made).items())
    plain = pipeline().unet.state_dict()
    moves = {n: t - plain[n] for n, t in tensors.items()}
    assert all(move.abs().max() > 0 for move in moves.values())
    for file in (lora, kohya):
        loaded = pipeline()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it holds nothing for the text encoder
            loaded.load_lora_weights(file)
        loaded.fuse_lora()
        loaded.unload_lora_weights()
        fused = loaded.unet.state_dict()
        for name, move in moves.items():  # the best of its rank, in float16
            u, s, v = torch.linalg.svd(move, full_matrices=False)
            best = u[:, :64] * s[:64] @ v[:64]
            assert (fused[name] - plain[name] - best).norm() <= 2e-3 * best.norm()
    from diffusers import StableDiffusionPipeline

    read = StableDiffusionPipeline.from_single_file(
        whole, config=str(model_path()), local_files_only=True, dtype=torch.float32
    )
    expected = {n: t.half().float() for n, t in {**plain, **tensors}.items()}  # as the model is
    assert all(t.equal(expected[n]) for n, t in read.unet.state_dict().items())
    with visitor.context.expect_page() as opened:
        card.get_by_role("link", name="Report").click()
    opened.value.wait_for_load_state()
    expect(opened.value.locator("h1")).to_contain_text("Erased: cat")
    assert opened.value.locator("img").count()
    assert not [p for p in places_of(server[1]) if p in opened.value.content()]
    opened.value.close()
    visitor.shoot("library")


def pipeline():
    from diffusers import StableDiffusionPipeline

    found = StableDiffusionPipeline.from_pretrained(model_path(), dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def drawn(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """(H, W, 3): "a cat" of seed 3 in 5 steps by diffusers, with these weights in the UNet."""
    found = pipeline()
    found.unet.load_state_dict(tensors, strict=False)
    images = found(
        "a cat",
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    return (images[0] * 255).round().astype(int)


def test_original_and_erased_side_by_side(visitor, server):
    page, plain = visitor.page, pipeline().unet.state_dict()
    cat, dog = (
        load_file(next((server[1] / "erasures").glob(f"{name}-*/esd-*.safetensors")))
        for name in ("cat", "dog")
    )

    def pushed(strength: float, *deltas: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {n for delta in deltas for n in delta}
        return {
            n: plain[n] + strength * sum(d[n] - plain[n] for d in deltas if n in d) for n in names
        }

    def shows(caption: str, tensors: dict[str, torch.Tensor]) -> None:
        expect(page.locator("#tried figcaption").nth(1)).to_have_text(f"{caption}, seed 3")
        expect(page.locator("#tried img")).to_have_count(2)
        left, right = (visitor.pixels(page.locator("#tried img").nth(i)) for i in (0, 1))
        # a rounding of the last bit may turn over
        assert abs(left - drawn({})).max() <= 1
        assert abs(right - drawn(tensors)).max() <= 1

    visitor.tab("Try")
    choose_erasures(visitor, "cat")
    for place, value in {"images": 1, "try-seed": 3, "steps": 5, "guidance": 4}.items():
        visitor.fill(place, value)
    page.locator("#draw").click()
    shows("strength 1", pushed(1, cat))
    visitor.fill("try-strength", 0)  # the slider draws by itself
    shows("strength 0", {})
    visitor.fill("try-strength", 1.5)
    shows("strength 1.5", pushed(1.5, cat))
    choose_erasures(visitor, "dog")
    visitor.fill("try-strength", 0.5)
    shows("strength 0.5", pushed(0.5, cat, dog))
    visitor.shoot("try")


def choose_erasures(visitor, *names: str) -> None:
    for name in names:
        visitor.page.locator("#erasures input").click()
        visitor.page.get_by_role("option", name=re.compile(rf"^{name} ")).first.click()
    visitor.page.keyboard.press("Escape")


def test_import(visitor, server, files, tmp_path):
    page = visitor.page
    visitor.tab("Library")
    delta = next(files.glob("esd-cat*.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(delta.read_bytes()[:5000])
    (tmp_path / "large.safetensors").write_bytes(bytes(9 << 20))
    torch.save({}, tmp_path / "weights.pt")
    save_file({"x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    odd = {"mid_block.a": torch.full((2,), torch.nan)}
    save_file(odd, tmp_path / "odd.safetensors")
    for name, said in {
        "lora": "it is a LoRA",
        "odd": "no finite number",
        "torn": "no whole safetensors file",
        "large": "size",
        "weights.pt": "safetensors",
    }.items():
        file = tmp_path / (name if "." in name else f"{name}.safetensors")
        page.locator("input[type=file]").set_input_files(file)
        visitor.told(said)
    expect(page.locator("#library article")).to_have_count(3)
    page.locator("input[type=file]").set_input_files(delta)
    expect(page.locator("#library article")).to_have_count(4)
    expect(page.locator("#library article").first).to_contain_text("imported")
    again = visitor.download(page.locator("#library article").first, "delta", tmp_path)
    assert all(t.equal(load_file(delta)[n]) for n, t in load_file(again).items())
    left = [path for path in (server[1] / "uploads").rglob("*") if path.is_file()]
    assert not sum(path.stat().st_size for path in left)


def test_what_the_owner_adds_is_offered(visitor, server, files):
    """Here a single file that no published configuration fits, which is said."""
    file = next(files.glob("*-single-file.safetensors"))
    shutil.copy(file, server[1] / "models" / "mine.safetensors")
    visitor.open()
    visitor.wish("dog", 2, "none")
    visitor.choose("model", "mine")
    visitor.page.locator("#plan").click()
    visitor.told("mine does not fit the unet of its configuration")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"concept": "  "}, "say what to erase"),
        ({"concept": "<img src=x onerror=alert(1)>" * 40}, "at most 1000"),
        ({"concept": "\n".join(f"a{i}" for i in range(21))}, "21 concepts"),
        ({"erase-from": "x" * 1001}, "at most 1000"),
        ({"model": "/etc/passwd"}, "model is 'passwd'"),
        ({"model": "../erasures"}, "model is '../erasures'"),
        ({"model": "nobody/nothing"}, "nobody/nothing"),
        ({"iterations": -1}, "iterations is -1"),
        ({"iterations": 20_000}, "iterations is 20000"),
        ({"rate": -1}, "learning_rate is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_wish_is_said(visitor, fields, said):
    page = visitor.page
    visitor.tab("Erase")
    page.evaluate(
        "document.querySelectorAll('[maxlength]').forEach(e => e.removeAttribute('maxlength'))"
    )
    good = {
        "concept": "cat",
        "erase-from": "",
        "model": "embedded",
        "iterations": 2,
        "rate": 0,
        "seed": 0,
        "strength": 1,
    }
    for place, value in {**good, **fields}.items():
        visitor.fill(place, value)
    page.locator("#plan").click()
    visitor.told(said)
    expect(page.locator("#start")).to_be_hidden()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x" * 1001}, "at most 1000"),
        ({"try-seed": -1}, "seed is -1"),
        ({"try-model": TINY.name}, "does not fit the model"),
        ({"try-model": "/etc/passwd"}, "model is 'passwd'"),
    ],
)
def test_bad_scene_is_said(visitor, fields, said):
    page = visitor.page
    visitor.tab("Try")
    page.evaluate(
        "document.querySelectorAll('[maxlength]').forEach(e => e.removeAttribute('maxlength'))"
    )
    if not page.locator("#erasures .token").count():
        choose_erasures(visitor, "cat")
    good = {"prompt": "a cat", "try-seed": 0, "try-model": "embedded"}
    for place, value in {**good, **fields}.items():
        visitor.fill(place, value)
    page.locator("#draw").click()
    visitor.told(said)


def test_phone(visitor, chromium):
    """The same person on a telephone: what is there fits, and is seen."""
    phone = Visitor(chromium, visitor.address, 390, 844)
    phone.context.add_cookies(visitor.context.cookies())
    phone.open()
    expect(phone.page.locator("#jobs article")).to_have_count(4)
    phone.wish("cat", 2, "none")
    phone.plan()
    phone.shoot("jobs")
    phone.tab("Library")
    expect(phone.page.locator("#library article")).to_have_count(4)
    phone.shoot("library")
    phone.tab("Try")
    choose_erasures(phone, "cat")
    phone.fill("steps", 2)
    phone.page.locator("#draw").click()
    expect(phone.page.locator("#tried img")).to_have_count(4)
    phone.shoot("try")


def places_of(work: Path) -> tuple[str, ...]:
    return str(work), str(Path.home()), str(Path(__file__).parents[2]), sys.prefix


def test_nothing_was_asked_of_anybody_else_and_no_path_shown(server):
    address, work = server
    for someone in Visitor.everyone:
        assert len(someone.asked) > 10
        assert not [u for u in someone.asked if not u.startswith((address, "data:", "blob:"))]
        assert not [c for c in someone.complaints if "Failed to load resource" not in c]
        texts = [someone.context.request.get(address + path).text() for path in ("", "config")]
        for text in (*texts, someone.page.content()):
            assert not [place for place in places_of(work) if place in text]


def test_no_other_file_is_handed_out(visitor, server):
    """Sent as they stand: a browser would tidy them up."""
    address, work = server
    secret = work / "secret.txt"
    secret.write_text("the secret")
    (work / "uploads" / "link").symlink_to(secret)
    (work / "erasures" / "link").symlink_to(work)
    cat = next((work / "erasures").glob("cat-*")).name
    mine = "; ".join(f"{c['name']}={c['value']}" for c in visitor.context.cookies())
    up = ("..", "%2e%2e", "..%2f..", "..%5c..", "....//", "%252e%252e")
    paths = [
        *(f"/gradio_api/file={p}" for p in (secret, "/etc/passwd", work / "uploads" / "link")),
        *(f"/file={p}" for p in (secret, "/etc/passwd")),
        *("/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/"),
        *(f"/{base}/{u}/{u}/secret.txt" for u in up for base in ("assets", "static", "erasures")),
        *(f"/erasures/{u}/delta" for u in up),
        *(f"/erasures/{cat}/{u}" for u in (*up, "..%2f..%2fsecret.txt", "app.json", "report.json")),
        *("/erasures/link/delta", "/erasures/link/report", "//etc/passwd", "/etc/passwd"),
        *(f"/assets/..%2f..%2f..%2f{secret}", f"/static/{secret}", f"/svelte/{secret}"),
    ]
    for path in paths:
        answer = raw(address, path, cookie=mine)
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status in (400, 403, 404, 405, 409), (path, head)
        assert b"the secret" not in body
        assert b"root:" not in body
        assert not [p for p in places_of(work) if p.encode() in body and p not in path]


def raw(address: str, path: str, cookie: str = "", password: str | None = PASSWORD) -> bytes:
    """The whole answer to a GET of `path`, without its slashes and dots put right."""
    host, port = re.search(r"//([^:/]+):(\d+)/", address).groups()
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close"]
    if cookie:
        lines.append(f"Cookie: {cookie}")
    if password is not None:
        coded = base64.b64encode(f"anybody:{password}".encode()).decode()
        lines.append(f"Authorization: Basic {coded}")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer
