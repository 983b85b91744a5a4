"""The page on value vectors in a real browser: from the button to a dot, a row, a word, a file, and back by the address."""
# ruff: noqa: F401, F811  # fixtures of the other browser tests

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.test_browser import Server, browser, images_in, models, open_tab, server, settled

pytestmark = pytest.mark.browser

SENTENCE = "The Eiffel Tower is in"


def open_page(open_tab: Callable[..., Page], server: Server, **query: object) -> Page:
    """The page, which no other was opened before."""
    tab = open_tab(f"http://localhost:{server.port}/value_vectors?{urlencode(query)}")
    expect(tab.get_by_role("link", name="Explore")).to_be_visible()
    expect(tab).to_have_title("Knowledge location workbench")
    return tab


def card(tab: Page) -> Locator:
    """The title of the neuron's card."""
    return tab.get_by_role("heading", name=re.compile(r"Neuron \d+ of layer \d+"))


def click_row(tab: Page, table: str, row: int) -> None:
    """Marks a row of a table, by its box on the left; the table is a canvas."""
    expect(tab.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")
    canvas = tab.locator(f"[class*='st-key-{table}'] canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    tab.mouse.click(box["x"] + 16, box["y"] + 36 + 35 * row + 17)


def neuron_in(tab: Page) -> str:
    found = re.search(r"neuron=(L\d+\.\d+)", tab.url)
    return found[1] if found else ""


def test_from_the_button_to_a_neuron_by_dot_by_row_and_by_word(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    tab = open_page(open_tab, server, model=models["llama"], prompt=SENTENCE)
    button = tab.locator(".st-key-trace button")
    expect(button).to_be_enabled(timeout=120_000)  # the server imports torch meanwhile
    button.click()
    figure = tab.locator("[class*='st-key-figure-'] .js-plotly-plot")
    expect(figure).to_have_count(1)
    expect(card(tab)).to_be_visible()
    assert neuron_in(tab) == ""

    figure.locator(".scatterlayer .point").last.click(force=True)
    tab.wait_for_url(re.compile(r"neuron=L\d"))
    by_dot = neuron_in(tab)
    layer, neuron = by_dot[1:].split(".")
    expect(card(tab)).to_have_text(f"Neuron {neuron} of layer {layer}")

    click_row(tab, "strongest-", 1)
    tab.wait_for_url(lambda url: f"neuron={by_dot}" not in url)
    by_row = neuron_in(tab)
    assert by_row

    tab.locator(".st-key-index button").click()
    word = tab.locator(".st-key-word input")
    word.fill("The")
    word.press("Enter")
    expect(tab.locator("[class*='st-key-search-']")).to_have_count(1)
    click_row(tab, "search-", 0)
    tab.wait_for_url(lambda url: f"neuron={by_row}" not in url)
    by_word = neuron_in(tab)
    assert by_word
    click_row(tab, "strongest-", 1)
    tab.wait_for_url(re.compile(rf"neuron={re.escape(by_row)}(&|$)"))

    with tab.expect_download() as waiting:
        tab.get_by_role("button", name="PDF", exact=True).click()
    pdf = Path(waiting.value.path()).read_bytes()
    assert waiting.value.suggested_filename == "value-vectors-eiffel-tower-llama.pdf"
    assert pdf.startswith(b"%PDF")
    assert images_in(pdf) == 0

    again = open_tab(settled(tab))
    expect(card(again)).to_have_text(card(tab).inner_text())
    expect(again.locator("[class*='st-key-search-']")).to_have_count(1)
    assert again.url == tab.url

    again.get_by_role("link", name="Patch two prompts").click()
    again.wait_for_url(lambda url: "patch_two_prompts?" in url and urlencode({"prompt": SENTENCE}) in url)
    again.wait_for_url(lambda url: urlencode({"model": models["llama"]}) in url)
