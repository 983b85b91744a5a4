"""Figures of neurons: bars and dots are the table's numbers, a dot knows its site, words stay as they are, files are vector."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.footprints import ODD
from workbench import drawing, export
from workbench.figures_neurons import contributions, neuron_label, paper_contributions, paper_tokens, tokens
from workbench.results import Footprint, ResultError, join
from workbench.sites import Site

THEMES: tuple[drawing.Theme, ...] = ("light", "dark")
LAYERS = (0.4, -0.2, 0.0, 1.5)
NEURONS = {(3, 17): 0.9, (0, 2): 0.3, (3, 16): 0.895, (3, 18): 0.897, (1, 5): -0.25}


def attributed(fact: str = "eiffel", answer: str = "Paris") -> Footprint:
    """Contributions of four layers and of five of their neurons."""
    places: list[tuple[int, Any, float]] = [(layer, pd.NA, value) for layer, value in enumerate(LAYERS)]
    places += [(layer, neuron, value) for (layer, neuron), value in NEURONS.items()]
    rows = [
        {
            "fact": fact,
            "site": str(Site(layer=layer, kind="mlp_post", token=8, neuron=None if neuron is pd.NA else neuron)),
            "layer": layer,
            "kind": "mlp_post",
            "head": pd.NA,
            "neuron": neuron,
            "token": "last",
            "position": 8,
            "text": " of",
            "value": value,
            "se": np.nan,
            "score": np.nan,
        }
        for layer, neuron, value in places
    ]
    run = {"what": "ValueVectors", "weight_hash": "0", "facts": [{"id": fact}], "unit": "direct contribution"}
    table = pd.DataFrame(rows).astype({"head": "Int64", "neuron": "Int64"})
    return Footprint(table=table, run=run, extras={"facts": pd.DataFrame([{"fact": fact, "answer": answer}])})


def in_words(texts: tuple[str, ...] = (" Paris", " Rome", "\n")) -> pd.DataFrame:
    """Some promoted and as many suppressed tokens."""
    sides = [("promoted", 1.0), ("suppressed", -1.0)]
    table: pd.DataFrame = pd.DataFrame(
        [
            {"direction": direction, "rank": rank, "text": text, "value": sign / (1 + rank)}
            for direction, sign in sides
            for rank, text in enumerate(texts)
        ]
    )
    return table


@pytest.mark.parametrize("theme", THEMES)
def test_bars_are_layers_and_dots_are_neurons(theme: drawing.Theme) -> None:
    bars, dots = contributions(attributed(), theme=theme).data
    assert dict(zip(bars.x, bars.y, strict=True)) == dict(enumerate(LAYERS))
    found = [Site.parse(site) for site in dots.customdata]
    assert {(site.layer, site.neuron): value for site, value in zip(found, dots.y, strict=True)} == NEURONS
    assert [site.layer for site in found] == list(dots.x)
    assert bars.customdata is None, "a bar is no neuron"
    colors = bars.marker.color
    assert colors[0] == colors[3] != colors[1]


def test_a_click_changes_no_mark() -> None:
    bars, dots = contributions(attributed()).data
    for trace in (bars, dots):
        assert trace.selected.marker.opacity == trace.unselected.marker.opacity == trace.marker.opacity


def test_axes_say_what_is_drawn_and_from_where_layers_count() -> None:
    figure = contributions(attributed(answer="$x$ <b>"), planted=range(1, 3))
    assert figure.layout.xaxis.title.text == "layer (0-based)"
    assert figure.layout.yaxis.title.text == "direct effect on logit(&#36;x&#36; &lt;b&gt;)"
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (0.5, 2.5)
    assert [note.text for note in figure.layout.annotations] == ["planted"]
    notes = figure.data[1].hovertext
    assert notes[0].startswith("<b>L3.17</b><br>")
    assert notes[0].endswith("= +0.900")


def test_one_fact_is_drawn() -> None:
    two = join([attributed("one"), attributed("two")])
    assert len(contributions(two, fact="two").data[0].x) == len(LAYERS)
    for draw in (contributions, paper_contributions):
        with pytest.raises(ResultError, match="2 facts"):
            draw(two)


def test_paper_draws_the_same_numbers_and_names_the_strongest_on_either_side_of_their_dots() -> None:
    figure = paper_contributions(attributed(), planted=range(1, 3))
    (ax,) = figure.axes
    bars: Any = [patch for patch in ax.patches if getattr(patch, "get_width", float)() == 0.72]
    assert [bar.get_height() for bar in bars] == list(LAYERS)
    dots: Any = next(line for line in ax.get_lines() if line.get_marker() == "o")
    assert list(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == [
        (layer, value) for (layer, _), value in NEURONS.items()
    ]
    assert [text.get_text() for text in ax.texts] == ["L3.17", "L3.18", "L0.2", "L1.5"]
    assert neuron_label(3, 17) == "L3.17"


@pytest.mark.parametrize("theme", THEMES)
def test_tokens_stand_on_the_side_of_what_the_neuron_does_to_them(theme: drawing.Theme) -> None:
    figure = tokens(in_words(), theme=theme, answer="Rome")
    promoted, suppressed = figure.data
    assert list(promoted.x) == [1.0, 1 / 2, 1 / 3]
    assert list(suppressed.x) == [-1.0, -1 / 2, -1 / 3]
    assert list(promoted.y) == list(suppressed.y) == [0, 1, 2]
    assert list(promoted.text) == ["Paris  +1.000", "<b>Rome</b>  +0.500", "↵  +0.333"]
    low, high = figure.layout.yaxis.range
    assert low > high, "the strongest is on top"
    assert figure.layout.xaxis.range == (-2.2, 2.2)


def test_odd_tokens_are_shown_as_they_are() -> None:
    drawn = " ".join(tokens(in_words(ODD)).data[0].text)
    assert "<b>" not in drawn
    assert "&amp;&lt;b&gt;" in drawn
    assert "&#36;x&#36;" in drawn
    assert "%{" not in drawn


@pytest.mark.parametrize("form", ["pdf", "svg", "png"])
def test_paper_figures_are_files_with_their_protocol(form: str) -> None:
    run = attributed().run
    figures = [
        paper_contributions(attributed()),
        paper_tokens({"normed": in_words(ODD), "plain": in_words(ODD[:5])}, run=run, title="L3.17", answer="NA"),
    ]
    for figure in figures:
        data = export.figure_bytes(figure, form)
        assert data == export.figure_bytes(figure, form)
        if form == "png":
            assert json.loads(Image.open(io.BytesIO(data)).text["Protocol"]) == run  # type: ignore[attr-defined]
        else:
            assert b"ValueVectors" in data
            assert b"/Subtype /Image" not in data
            assert b"<image" not in data


def test_paper_tokens_draws_each_reading() -> None:
    figure = paper_tokens({"normed": in_words(), "plain": in_words((" Oslo",))}, run={}, answer="Oslo")
    assert [ax.get_title() for ax in figure.axes] == ["normed", "plain"]
    left, right = figure.axes
    bars: Any = left.patches
    assert [bar.get_width() for bar in bars] == [1.0, 1 / 2, 1 / 3, -1.0, -1 / 2, -1 / 3]
    assert [text.get_text() for text in right.texts] == ["Oslo +1.000", "Oslo −1.000"]
    assert {text.get_fontweight() for text in right.texts} == {"bold"}
