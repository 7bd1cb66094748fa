"""The web app as people use it: a server in a process of its own, headless Chromium, the embedded model."""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("gradio", reason="the web app needs Gradio: pip install '.[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

from playwright.sync_api import expect

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


def started(work: Path, *arguments: str, **variables: str) -> tuple[subprocess.Popen, str]:
    """The server, once it says where it is."""
    code = (  # one picture of a prompt: it is the drawing that takes the time
        "import sys; from esd_fast.app import planning; planning.COLUMNS = 1; "
        "from esd_fast.cli import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "app", "--work", str(work), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            **variables,
        },
    )
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://\S+/", line):
            return process, found[0]
    pytest.fail(f"the server did not start:\n{said}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("app")
    process, address = started(work)
    yield address, work
    process.terminate()
    try:
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in rest, rest


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        expect.set_options(timeout=LONG)
        yield browser
        browser.close()


class Visitor:
    """A browser of its own at one of the widths; notes what its page asks for and complains of."""

    def __init__(self, browser, address: str, width: int = 1280, height: int = 900) -> None:
        self.address, self.asked, self.complaints = address, [], []
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.context.set_default_timeout(LONG)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.open()

    def open(self) -> None:
        self.page.goto(self.address)
        self.page.wait_for_selector("#plan")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def plan(self, concept: str, steps: int, report: str = "pictures") -> None:
        page = self.page
        self.tab("Erase")
        page.locator("#concept textarea").fill(concept)
        if not page.locator("#iterations input").is_visible():
            page.locator("#more button").first.click()
        page.locator("#iterations input").fill(str(steps))
        page.locator("#proof").get_by_label(report, exact=True).check()
        page.locator("#plan").click()
        expect(page.locator(".esd-plan")).to_contain_text("Expected time")

    def erase(self, concept: str, steps: int, report: str = "pictures") -> None:
        self.plan(concept, steps, report)
        self.page.locator("#start").click()
        expect(self.page.locator("#jobs article").first).to_contain_text(concept)

    def job(self):
        """The newest."""
        return self.page.locator("#jobs article").first

    def shoot(self, name: str) -> None:
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        if SCREENSHOTS:
            self.page.wait_for_timeout(400)
            self.page.screenshot(
                path=f"{SCREENSHOTS}/{name}-{self.width}.png", full_page=True, animations="disabled"
            )

    @property
    def width(self) -> int:
        return self.page.viewport_size["width"]


@pytest.fixture(scope="module")
def visitor(chromium, server):
    """The one whose story the tests tell, in their order."""
    return Visitor(chromium, server[0])


def test_plan_comes_before_the_work(visitor, server):
    visitor.plan("cat", 16)
    card = visitor.page.locator(".esd-plan")
    expect(card).to_contain_text("esd-x-strict")
    expect(card).to_contain_text("16 steps")
    # one trajectory of 10 steps, and a second: 20 states of two predictions each
    expect(card).to_contain_text("40 UNet passes to collect, 32 to train")
    assert not list((server[1] / "erasures").iterdir())
    visitor.shoot("plan")
    visitor.page.locator("#concept textarea").fill("dog")  # another wish: another plan
    expect(visitor.page.locator("#start")).to_be_hidden()


def test_erasing_is_watched_to_its_end(visitor, server):
    visitor.erase("cat", 16)
    job = visitor.job()
    expect(job.locator("progress")).to_be_visible(timeout=LONG)
    expect(job.locator("svg polyline")).to_be_visible(timeout=LONG)
    expect(job.locator(".esd-pairs img").first).to_be_visible(timeout=LONG)
    visitor.shoot("erasing")
    expect(job.locator(".esd-state")).to_have_text("done")
    (folder,) = (server[1] / "erasures").iterdir()
    for name in ("report.html", "report.json", "manifest.json", "before_after.png", "loss.png"):
        assert (folder / name).stat().st_size
    visitor.shoot("erased")


def test_library_gives_report_and_files(visitor, server, tmp_path):
    visitor.tab("Library")
    card = visitor.page.locator("#library article")
    expect(card).to_have_count(1)
    files = {}
    for words in ("delta", "LoRA (diffusers)", "LoRA (A1111, ComfyUI)", "single file"):
        with visitor.page.expect_download(timeout=LONG) as download:
            card.get_by_role("link", name=words, exact=True).click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        files[words] = load_file(file)
    (delta,) = (server[1] / "erasures").glob("*/esd-*.safetensors")
    assert {n: t.tolist() for n, t in files["delta"].items()} == {
        n: t.tolist() for n, t in load_file(delta).items()
    }
    assert all("lora" in name for name in files["LoRA (diffusers)"])
    assert all(name.startswith("lora_unet_") for name in files["LoRA (A1111, ComfyUI)"])
    assert any(name.startswith("model.diffusion_model.") for name in files["single file"])
    with visitor.context.expect_page() as opened:
        card.get_by_role("link", name="Report").click()
    opened.value.wait_for_load_state()
    expect(opened.value.locator("h1")).to_contain_text("Erased: cat")
    opened.value.close()
    visitor.shoot("library")


def test_original_and_erased_side_by_side(visitor):
    page = visitor.page
    visitor.tab("Try")
    page.locator("#draw").click()
    pictures = page.locator("#tried img")
    expect(pictures).to_have_count(4)
    first, second = (pictures.nth(i).get_attribute("src") for i in (0, 1))
    assert first != second
    visitor.shoot("try")
    page.locator("#try-strength input[type=number]").fill("0")
    page.locator("#try-strength input[type=number]").press("Tab")
    expect(page.locator("#tried figcaption").nth(1)).to_contain_text("strength 0,")
    assert pictures.nth(1).get_attribute("src") == pictures.nth(0).get_attribute("src") == first


def test_cancelled_job_keeps_its_work_and_goes_on(visitor, server):
    visitor.erase("dog", 300, "none")
    page, job = visitor.page, visitor.job()
    expect(job.locator("svg polyline")).to_be_visible(timeout=LONG)
    page.locator("#cancel").click()
    expect(job.locator(".esd-state")).to_have_text("stopped")
    expect(job.locator(".esd-message")).to_contain_text("of 300 steps, and kept")
    (kept,) = (server[1] / "erasures").glob("dog-*")
    assert list(kept.glob("checkpoint-*.safetensors"))
    assert list(kept.glob("esd-dog*.safetensors"))
    visitor.tab("Library")
    expect(page.locator("#library article").first).to_contain_text("stopped early")
    page.locator("#go-on").click()
    visitor.tab("Erase")
    expect(visitor.job().locator(".esd-state")).to_have_text("running")
    page.locator("#cancel").click()
    expect(visitor.job().locator(".esd-state")).to_have_text("stopped")


def test_reload_keeps_the_jobs_and_other_browsers_never_see_them(visitor, chromium, server):
    visitor.open()
    expect(visitor.page.locator("#jobs article")).to_have_count(3)
    other = Visitor(chromium, server[0], 390, 844)
    expect(other.page.locator("#jobs")).to_contain_text("Nothing was started")
    other.tab("Library")
    expect(other.page.locator("#library")).to_contain_text("Nothing here yet")
    key = next((server[1] / "erasures").glob("cat-*")).name
    assert other.context.request.get(f"{server[0]}erasures/{key}/report").status == 404
    assert other.context.request.get(f"{server[0]}erasures/{key}/delta").status == 404
    assert visitor.context.request.get(f"{server[0]}erasures/{key}/report").status == 200
    other.context.close()


def test_import(visitor, server, tmp_path):
    page = visitor.page
    visitor.tab("Library")
    before = page.locator("#library article").count()
    (delta,) = (server[1] / "erasures").glob("cat-*/esd-*.safetensors")
    bad = {
        "lora.safetensors": ({"x.lora_A.weight": torch.zeros(2, 2)}, "it is a LoRA"),
        "odd.safetensors": ({"mid_block.a": torch.full((2,), torch.nan)}, "no finite number"),
    }
    for name, (tensors, said) in bad.items():
        save_file(tensors, tmp_path / name)
        page.locator("#import input").set_input_files(tmp_path / name)
        expect(page.get_by_text(said).first).to_be_visible(timeout=LONG)
    (tmp_path / "torn.safetensors").write_bytes(delta.read_bytes()[:5000])
    page.locator("#import input").set_input_files(tmp_path / "torn.safetensors")
    expect(page.get_by_text("no whole safetensors file").first).to_be_visible(timeout=LONG)
    assert page.locator("#library article").count() == before
    page.locator("#import input").set_input_files(delta)
    expect(page.locator("#library article")).to_have_count(before + 1)
    expect(page.locator("#library article").first).to_contain_text("imported")
    assert not [path for path in (server[1] / "uploads").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("concept", "said"),
    [("  ", "say what to erase"), ("<img src=x onerror=alert(1)>" * 40, "at most 1000")],
)
def test_bad_input_is_said(visitor, concept, said):
    page = visitor.page
    visitor.tab("Erase")
    page.locator("#concept textarea").evaluate("e => e.removeAttribute('maxlength')")
    page.locator("#concept textarea").fill(concept)
    page.locator("#plan").click()
    expect(page.get_by_text(said).first).to_be_visible(timeout=LONG)
    assert not visitor.complaints


def test_phone(visitor, chromium, server):
    """The same person on a telephone: what is there fits, and is seen."""
    phone = Visitor(chromium, server[0], 390, 844)
    phone.context.add_cookies(visitor.context.cookies())
    phone.open()
    expect(phone.page.locator("#jobs article")).to_have_count(3)
    phone.shoot("jobs")
    phone.tab("Library")
    expect(phone.page.locator("#library article")).to_have_count(3)
    phone.shoot("library")
    phone.tab("Try")
    phone.shoot("try")
    phone.context.close()


def test_nothing_was_asked_of_anybody_else_and_no_path_shown(visitor, server):
    address, work = server
    elsewhere = [u for u in visitor.asked if not u.startswith((address, "data:", "blob:"))]
    assert not elsewhere
    assert not visitor.complaints
    places = (str(work), str(Path.home()), str(Path(__file__).parents[2]), sys.prefix)
    for path in ("", "config"):
        text = visitor.context.request.get(address + path).text()
        assert not [place for place in places if place in text]
    assert not [place for place in places if place in visitor.page.content()]
    for path in (
        f"gradio_api/file={work}/erasures",
        "gradio_api/file=/etc/passwd",
        "gradio_api/proxy=http://127.0.0.1/",
        "erasures/../../etc/passwd/delta",
        "erasures/..%2f..%2fetc/delta",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + path)
        assert refused.value.code == 404
