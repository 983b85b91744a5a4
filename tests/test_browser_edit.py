"""The page on edits in a real browser: from the button to a cell of the map, a file, the switch, and back by the address."""
# ruff: noqa: F401, F811  # fixtures of the other browser tests

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect

from analyses.explore_edit import unzipped
from tests.test_browser import Server, browser, models, open_tab, server, settled

pytestmark = pytest.mark.browser

SENTENCE = "The Eiffel Tower is in"


def test_from_the_button_to_a_matrix_a_file_and_back_by_the_address(
    open_tab: Callable[..., Page], server: Server, models: dict[str, Path]
) -> None:
    query = {
        "model": models["llama"], "prompt": SENTENCE, "target": "Rome", "editor": "FineTune",
        "FineTune-layers": "1, 2", "FineTune-steps": "3",
    }  # fmt: skip
    tab = open_tab(f"http://localhost:{server.port}/edit?{urlencode(query)}")
    button = tab.locator(".st-key-make button")
    expect(button).to_be_enabled(timeout=120_000)  # the server imports torch meanwhile
    button.click()
    expect(tab.get_by_text("With 1 edit")).to_be_visible()
    heading = tab.get_by_role("heading", name=re.compile(r"mlp\.down_proj of layer \d"))
    expect(heading).to_be_visible()
    before = heading.inner_text()
    other = "2" if before.endswith("1") else "1"

    weights = tab.locator("[class*='st-key-weights-'] .js-plotly-plot")
    rows = weights.locator(".ytick text")
    expect(rows.filter(has_text="mlp.down_proj")).to_be_visible()
    row = rows.all_text_contents().index("mlp.down_proj")
    cell = weights.locator(".scatterlayer .point").nth(row * weights.locator(".xtick text").count() + int(other))
    cell.click(force=True)
    expect(tab.get_by_role("heading", name=f"mlp.down_proj of layer {other}")).to_be_visible()

    zipped = tab.locator(".st-key-zip button")
    expect(zipped.first).to_be_visible()
    with tab.expect_download() as waiting:
        zipped.first.click()
    edit = unzipped(Path(waiting.value.path()).read_bytes())
    assert waiting.value.suggested_filename == "finetune-eiffel-tower-rome.zip"
    assert sorted(edit.changes) == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]

    switch = tab.locator("[class*='st-key-on-'] label")
    expect(switch.first).to_be_visible()
    switch.first.click()
    expect(tab.get_by_text("No edit is applied.")).to_be_visible()
    undo = tab.locator(".st-key-undo button")
    expect(undo.first).to_be_visible()
    undo.first.click()
    expect(tab.get_by_text("With 1 edit")).to_be_visible()

    again = open_tab(settled(tab))
    expect(again.get_by_text("With 1 edit")).to_be_visible()
    assert again.url == tab.url
    again.get_by_role("link", name="Explore").click()
    again.wait_for_url(lambda url: urlencode({"prompt": SENTENCE}) in url and "FineTune" not in url)
