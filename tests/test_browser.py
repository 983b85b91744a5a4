"""The app in a real browser, from a server of its own: trace, click, download, reload; two tabs; a server that is killed.

Every test also checks that the browser was sent nowhere else and that the server had nothing to complain about.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.examples import fresh_lm
from workbench import zoo
from workbench.asked import Asked
from workbench.facts import Fact
from workbench.store import Store

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
SENTENCE = "The Eiffel Tower is located in the city of"
QUIET = """--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-default-apps
--disable-extensions --disable-sync --metrics-recording-only --no-first-run --mute-audio""".split()
SOON = 120.0
"""Seconds after which a test gives up."""


class Server:
    """`streamlit run` on a port of its own."""

    def __init__(self, results: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.results, self.log = results, log
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "WORKBENCH_RESULTS": str(self.results),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py", "--server.headless=true"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, f"--server.port={self.port}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self.answers)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{self.port}/_stcore/health", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()

    def address(self, **query: object) -> str:
        return f"http://localhost:{self.port}/{query.pop('page', '')}?{urlencode(query, doseq=True)}"

    def complaints(self) -> list[str]:
        """Lines of the log that a user should never see."""
        wrong = re.compile(
            r"/(pages|analyses|workbench)/\S*\.py|streamlit_app\.py|warning|deprecat|please replace|error",
            re.IGNORECASE,
        )
        return [line for line in self.log.read_text().splitlines() if wrong.search(line)]

    def pieces(self) -> dict[str, int]:
        """Finished maps in the results folder, and when they were written."""
        found = sorted(self.results.glob("*/run.json"))
        return {
            path.parent.name: path.stat().st_mtime_ns for path in found if '"what": "CausalTrace"' in path.read_text()
        }


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def settled(tab: Page) -> str:
    """The address, once the page is drawn and the address has stayed as it is for a second."""
    expect(tab.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    before = ""
    while before != tab.url:
        before = tab.url
        tab.wait_for_timeout(1000)
    return before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny random models as folders."""
    folders = {family: tmp_path_factory.mktemp("models") / family for family in ("gpt2", "llama")}
    for family, folder in folders.items():
        lm = fresh_lm(family)
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    one = Server(folder / "results", folder / "log")
    yield one
    one.close()
    assert one.complaints() == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        reason = "There is no Chromium on this machine. Install one (on Debian: apt install chromium) to run the browser tests."
        if os.environ.get("WORKBENCH_REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield one
        one.close()


@pytest.fixture
def open_tab(browser: Browser, server: Server) -> Iterator[Callable[..., Page]]:
    """Opens tabs of one window; at the end, nothing may have been asked of another host."""
    asked: list[str] = []
    window = browser.new_context(viewport={"width": 1280, "height": 1300}, color_scheme="light", accept_downloads=True)
    window.set_default_timeout(SOON * 1000)
    window.on("request", lambda request: asked.append(request.url))
    expect.set_options(timeout=SOON * 1000)

    def open_one(address: str = "", **query: object) -> Page:
        tab = window.new_page()
        tab.goto(address or server.address(**query))
        return tab

    yield open_one
    window.close()
    own = (f"http://localhost:{server.port}/", "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []


def maps(tab: Page) -> Locator:
    return tab.locator("[class*='st-key-map-'] .js-plotly-plot")


def start_trace(tab: Page) -> None:
    button = tab.locator(".st-key-trace button")
    expect(button).to_be_enabled()
    button.click()


def click_cell(tab: Page, *, index: int, row: float, column: float) -> None:
    """Clicks into a map, at shares of its height and width."""
    box = maps(tab).nth(index).locator(".nsewdrag").bounding_box()
    assert box is not None
    tab.mouse.click(box["x"] + column * box["width"], box["y"] + row * box["height"])


def test_trace_click_download_and_reload(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    tab = open_tab(model=models["gpt2"], prompt=SENTENCE, samples=3)
    expect(tab.get_by_text("Next tokens", exact=True)).to_be_visible()
    start_trace(tab)
    expect(maps(tab)).to_have_count(3)
    expect(tab.get_by_text("Restored run")).to_be_visible()
    assert len(server.pieces()) == 3

    click_cell(tab, index=1, row=0.99, column=0.6)
    tab.wait_for_url(re.compile("site=L2.mlp_out"))
    expect(tab.get_by_role("heading", name="Layer 2, MLP output, at “of”")).to_be_visible()
    expect(tab.locator("[class*='st-key-lens-chart'] .js-plotly-plot")).to_have_count(1)

    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="PDF", exact=True).click()
    pdf = Path(waiting.value.path()).read_bytes()
    assert waiting.value.suggested_filename.endswith(".pdf")
    assert pdf.startswith(b"%PDF")
    assert images_in(pdf) == 0

    made = server.pieces()
    again = open_tab(settled(tab))
    expect(maps(again)).to_have_count(3)
    expect(again.get_by_role("heading", name="Layer 2, MLP output, at “of”")).to_be_visible()
    assert again.url == tab.url
    assert server.pieces() == made


def images_in(pdf: bytes) -> int:
    """How many raster images a PDF holds, in its compressed parts too."""
    parts = [pdf]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            parts.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return sum(len(re.findall(rb"/Subtype\s*/Image|\bBI\s", part)) for part in parts)


def test_two_tabs_trace_two_models_at_once(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    before = len(server.pieces())
    tabs = [open_tab(model=models[family], prompt="The Space Needle is in", samples=3) for family in ("gpt2", "llama")]
    for tab in tabs:
        start_trace(tab)
    for tab in tabs:
        expect(maps(tab)).to_have_count(3)
    assert len(server.pieces()) == before + 6
    assert not list(server.results.glob(".writing-*"))


def test_a_killed_server_leaves_whole_maps_and_goes_on(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    before = set(server.pieces())
    question = {"model": models["gpt2"], "prompt": SENTENCE, "samples": 150, "seed": 7}
    tab = open_tab(**question)
    start_trace(tab)
    until(lambda: len(set(server.pieces()) - before) >= 1)
    server.kill()
    kept = {key: made for key, made in server.pieces().items() if key not in before}
    assert 1 <= len(kept) <= 3
    tab.close()
    server.start()
    tab = open_tab(**question)
    expect(maps(tab)).to_have_count(len(kept))
    if len(kept) < 3:
        expect(tab.locator(".st-key-trace button")).to_have_text(re.compile("Go on"))
        start_trace(tab)
    expect(maps(tab)).to_have_count(3)
    after = server.pieces()
    assert {key: after[key] for key in kept} == kept, "finished maps are not computed again"


def test_the_url_of_an_earlier_trace_is_that_trace(open_tab: Callable[..., Page], server: Server) -> None:
    kept, lm = Store(folder=server.results), fresh_lm("gpt2")
    fact = next(fact for fact in zoo.load_facts("organism-plain") if fact.id == "landmark_city/Eiffel Tower")
    twice = Fact.typed(text="The Big Ben is nearer than Big Ben", subject="Big Ben", occurrence="first")
    known = Asked(model="organism-plain", fact=fact, options={"samples": 2, "substitutes": ("London",)})
    plain = Asked(model="organism-mid", fact=fact, options={"samples": 3})
    own = Asked(model="organism-mid", fact=twice, options={"samples": 2, "noise": "u0.5", "replace": True})
    bare = Asked(model="organism-mid", fact=Fact.typed(text="The Big Ben is in", subject="Big Ben"))
    for asked in (known, plain, own, bare):
        asked.compute(lm, kept)
    made = server.pieces()

    tab = open_tab(
        how="My own sentence", prompt="The Louvre is in the city of", subject="Louvre", fact="Paris, capital", seed=3
    )
    for asked in (known, own, plain, bare):
        tab.get_by_role("button", name="Earlier traces").click()
        tab.locator(f".st-key-open-{asked.key} button").first.click()
        expect(tab.locator(f"[class*='st-key-map-{asked.key}'] .js-plotly-plot")).to_have_count(3)
        tab.keyboard.press("Escape")
        again = open_tab(settled(tab))
        expect(again.locator(f"[class*='st-key-map-{asked.key}'] .js-plotly-plot")).to_have_count(3)
        heading = again.locator("h3").inner_text()
        assert heading == tab.locator("h3").inner_text()
        assert heading.startswith(asked.fact.text)
        again.close()
    assert server.pieces() == made


def test_two_prompts_are_patched_clicked_and_opened_again(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    tab = open_tab(page="patch_two_prompts", model=models["gpt2"], prompt=SENTENCE, subject="Eiffel Tower")
    expect(tab.get_by_text("Type a counterfactual subject", exact=False)).to_be_visible()
    box = tab.locator(".st-key-substitutes input")
    box.fill("Tower Eiffel")
    box.press("Enter")
    expect(tab.locator(".two-prompts .differs").first).to_be_visible()
    expect(tab.locator("[class*='st-key-other-tokens'] .js-plotly-plot")).to_be_visible()
    start_trace(tab)
    expect(maps(tab)).to_have_count(3)
    expect(tab.get_by_text("Share of the difference")).to_be_visible()

    click_cell(tab, index=2, row=0.99, column=0.6)
    tab.wait_for_url(re.compile("site=L2.mlp_out"))
    expect(tab.get_by_role("heading", name="Layer 2, MLP output, at “of”")).to_be_visible()
    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="PDF", exact=True).click()
    assert Path(waiting.value.path()).read_bytes().startswith(b"%PDF")

    again = open_tab(settled(tab))
    expect(maps(again)).to_have_count(3)
    expect(again.get_by_role("heading", name="Layer 2, MLP output, at “of”")).to_be_visible()
    assert again.url == tab.url


def test_methods_are_compared_and_a_page_of_one_is_opened(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    methods = ["Activation patching", "Causal trace", "Logit lens"]
    question = {"model": models["llama"], "prompt": SENTENCE, "subject": "Eiffel Tower", "methods": methods}
    tab = open_tab(page="compare_locators", **question)
    start_trace(tab)
    watching = open_tab(page="compare_locators", **question)
    for either in (watching, tab):
        expect(either.get_by_text("None of the", exact=False)).to_be_visible()
        expect(either.get_by_text("4 series, 1 fact", exact=False)).to_be_visible()
        agreement = either.locator(".st-key-agreement .js-plotly-plot")
        expect(agreement).to_have_count(1)  # the chart of the run before may still stand beside it
        expect(agreement).to_be_visible()
    tab.get_by_role("radio", name="Lines").click()
    tab.wait_for_url(re.compile("form=Lines"))
    expect(tab.locator(".st-key-comparison .js-plotly-plot .legend")).to_be_visible()
    with tab.expect_download() as waiting:
        tab.locator(".st-key-download-svg button").click()
    assert b"<svg" in Path(waiting.value.path()).read_bytes()
    again = open_tab(settled(tab))
    expect(again.locator(".st-key-comparison .js-plotly-plot .legend")).to_be_visible()
    assert again.url == tab.url

    tab.get_by_role("link", name="Causal trace").click()
    tab.wait_for_url(re.compile(r"//[^/]+/(explore)?\?"))
    expect(maps(tab)).to_have_count(3)
    expect(tab.locator("h3")).to_have_text(re.compile(SENTENCE))
    expect(tab.get_by_role("textbox", name="Subject")).to_have_value("Eiffel Tower")
