"""Charts: the screen and the paper draw the same numbers, nothing is cut off, and layers are whole numbers from 0."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

from workbench import charts_paper, charts_screen
from workbench.charts import NONE, CellPlot, Chart, DotPlot, LinePlot, Plot, ScatterPlot
from workbench.drawing import Theme
from workbench.results import ResultError

LONG = tuple(f"Editor {i} with a name of forty letters {i:>2}" for i in range(15))
RNG = np.random.default_rng(0)


def curves(*names: str, sign: int = 1, layers: int = 12) -> pd.DataFrame:
    """Curves by layer with intervals."""
    rows = [
        {"series": name, "x": layer, "y": sign * abs(math.sin(i + layer))}
        for i, name in enumerate(names)
        for layer in range(layers)
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    table["low"], table["high"] = table["y"] - 0.1, table["y"] + 0.1
    return table


def cells(index: tuple[str, ...] = LONG, layers: int = 12) -> pd.DataFrame:
    """A matrix by layer with a row that has no values."""
    values: pd.DataFrame = pd.DataFrame(
        RNG.uniform(0.1, 1, (len(index), layers)), index=list(index), columns=range(layers)
    )
    values.iloc[1] = np.nan
    return values


def square() -> CellPlot:
    """Every one of many against every other."""
    values = pd.DataFrame(RNG.uniform(-1, 1, (15, 15)), index=list(LONG), columns=list(LONG))
    return CellPlot(values=values, name="cosine", signed=True, texts=values.map("{:.2f}".format))


DOTS = pd.DataFrame(
    [
        {"label": label, "series": series, "x": i / 15, "low": i / 15 - 0.1, "high": i / 15 + 0.1}
        for i, label in enumerate(LONG)
        for series in ("in", "out")
    ]
)
PLOTS: dict[str, Plot] = {
    "curves": LinePlot(rows=curves("Rome", "Memit"), y_title="share", shade=range(3, 7), lines={"even": 1 / 12}),
    "mirrored": LinePlot(rows=pd.concat([curves("Rome"), curves("Memit", sign=-1)]), y_title="share", mirrored=True),
    "bars": LinePlot(rows=pd.concat([curves("Rome"), curves("Memit", sign=-1)]), y_title="share", bars=True),
    "many": LinePlot(rows=curves(*LONG), y_title="a long title of an axis that has to be broken into several lines " * 2),
    "steps": LinePlot(
        rows=pd.DataFrame({"series": "Rome", "x": [1, 10, 100], "y": [1.0, 0.5, 0.2]}), x_title="edits", y_title="y", log_x=True
    ),
    "words": LinePlot(
        rows=pd.DataFrame({"series": "Rome", "x": list(LONG), "y": 1.0}), x_title="attack", y_title="y", bars=True
    ),
    "cells": CellPlot(values=cells(), name="norm", shade=range(3, 7), title="Weights"),
    "square": square(),
    "dots": DotPlot(rows=DOTS, x_title="share", lines={"chance": 0.5}),
    "points": ScatterPlot(
        rows=pd.DataFrame({"series": "a", "x": RNG.normal(size=9), "y": RNG.normal(size=9)}), x_title="x", y_title="y",
        diagonal=True,
    ),
}  # fmt: skip
CAPTION = "Means over 20 facts with 95 % percentile bootstrap intervals. Layers count from 0." * 2
CHARTS = {name: Chart(title=name, plots=(plot,), caption=CAPTION) for name, plot in PLOTS.items()}
CHARTS["stacked"] = Chart(title="stacked", plots=(PLOTS["curves"], PLOTS["mirrored"]), caption=CAPTION)
CHARTS["grid"] = Chart(
    title="grid", plots=tuple(PLOTS[name] for name in ("curves", "cells", "dots", "points")), columns=2
)


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_on_paper_is_cut_off_or_covered(name: str) -> None:
    figure = charts_paper.draw(CHARTS[name], run={})
    canvas = figure.bbox
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert any(CAPTION.split(".")[0][:20] in text.get_text() for text in texts) == bool(CHARTS[name].caption)
    whole = canvas.padded(1)
    below = [legend.get_window_extent(renderer) for legend in figure.legends] + [
        text.get_window_extent(renderer) for text in figure.texts
    ]
    for ax in figure.axes:
        around = ax.get_tightbbox(renderer)
        assert around is not None
        assert whole.contains(around.x0, around.y0)
        assert whole.contains(around.x1, around.y1)
        assert not any(box.overlaps(around) for box in below), "legend and caption stand below the plots"
    assert all(whole.contains(box.x0, box.y0) and whole.contains(box.x1, box.y1) for box in below)
    assert not any(a.overlaps(b) for i, a in enumerate(below) for b in below[:i])


@pytest.mark.parametrize("name", ["curves", "mirrored", "bars", "many", "cells", "stacked"])
def test_layers_are_whole_numbers_and_say_from_where_they_count(name: str) -> None:
    paper, screen = charts_paper.draw(CHARTS[name], run={}), charts_screen.draw(CHARTS[name])
    lowest = [ax for ax in paper.axes if ax.get_label() != "<colorbar>"][-1]
    assert "Layer (0-based)" in lowest.get_xlabel()
    assert all(float(tick).is_integer() for tick in lowest.get_xticks())
    axes = [axis for axis in screen.select_xaxes() if axis.title.text]
    assert [axis.title.text for axis in axes] == ["Layer (0-based)"]
    assert all(isinstance(tick, int) for tick in axes[0].tickvals)


def test_curves_above_each_other_share_their_layers() -> None:
    paper, screen = charts_paper.draw(CHARTS["stacked"], run={}), charts_screen.draw(CHARTS["stacked"])
    assert paper.axes[0].get_shared_x_axes().joined(*paper.axes)
    assert len({tuple(axis.range) for axis in screen.select_xaxes()}) == 1


def test_both_draw_the_same_cells() -> None:
    plot = PLOTS["cells"]
    assert isinstance(plot, CellPlot)
    (mesh,) = [
        one for one in charts_paper.draw(CHARTS["cells"], run={}).axes[0].collections if isinstance(one, QuadMesh)
    ]
    heat = next(trace for trace in charts_screen.draw(CHARTS["cells"]).data if isinstance(trace, go.Heatmap))
    printed = np.ma.filled(np.ma.asarray(mesh.get_array()).astype(float), np.nan).reshape(plot.values.shape)
    np.testing.assert_array_equal(printed, plot.values)
    np.testing.assert_array_equal(np.asarray(heat.z, dtype=float), plot.values)


def test_a_place_without_a_value_says_so() -> None:
    plot = PLOTS["cells"]
    assert isinstance(plot, CellPlot)
    assert (plot.words.iloc[1] == NONE).all()
    assert (plot.words.drop(index=plot.words.index[1]) == "").all(axis=None)
    assert CHARTS["cells"].below.endswith(f"{NONE}: no value.")
    chart = Chart(title="", plots=(DotPlot(rows=DOTS.assign(x=np.nan, low=np.nan, high=np.nan), x_title="share"),))
    assert sum(text.text == "no value" for text in charts_screen.draw(chart).layout.annotations) == len(DOTS)
    assert sum(text.get_text() == "no value" for text in charts_paper.draw(chart, run={}).findobj(Text)) == len(DOTS)


def test_sizes_that_point_down_have_no_sign() -> None:
    for name in ("mirrored", "bars"):
        paper, (axis,) = charts_paper.draw(CHARTS[name], run={}), charts_screen.draw(CHARTS[name]).select_yaxes()
        assert not any("−" in text.get_text() or "-" in text.get_text() for text in paper.axes[0].get_yticklabels())
        assert min(axis.tickvals) < 0
        assert not any(text.startswith("-") for text in axis.ticktext)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_series_looks_the_same_in_all_plots(theme: Theme) -> None:
    chart = CHARTS["grid"]
    alone = chart.alone(2)
    assert alone.styles(theme)["out"] == chart.styles(theme)["out"]
    named = [trace for trace in charts_screen.draw(alone, theme=theme).data if trace.showlegend]
    assert [trace.name for trace in named] == ["in", "out", "chance"]


def test_a_curve_that_would_hide_another_one_is_dashed() -> None:
    rows = curves("Rome", "Memit")
    twin = rows[rows["series"] == "Rome"].assign(series="FineTune")
    plots = LinePlot(rows=pd.concat([rows, twin]), y_title="share"), LinePlot(rows=curves("FineTune"), y_title="share")
    chart = Chart(title="", plots=plots)
    assert [bool(dash) for _, dash in chart.styles("light").values()] == [False, False, True]
    assert chart.alone(1).styles("light") == chart.styles("light"), "one look in all plots"


def test_what_has_nothing_to_show_is_left_out() -> None:
    empty = LinePlot(rows=curves("Rome").iloc[:0], y_title="share")
    none = CellPlot(values=pd.DataFrame(), name="share")
    chart = Chart(title="", plots=(empty, PLOTS["curves"], none), columns=2)
    assert chart.plots == (PLOTS["curves"],)
    charts_paper.draw(chart, run={})
    charts_screen.draw(chart)
    with pytest.raises(ResultError, match="nothing to draw"):
        Chart(title="Shares", plots=(empty, none))


def test_two_lines_in_a_cell_are_as_wide_as_the_longer_one() -> None:
    values = cells(LONG[:2]).iloc[:1, :4]
    plot = CellPlot(
        values=values, name="share", texts=values.map(lambda x: f"{x:.2f}\np {x:.2f}"), texts_are="share, and p"
    )
    chart = Chart(title="", plots=(plot,))
    (written,) = [trace for trace in charts_screen.draw(chart).data if trace.type == "scatter"]
    assert "<br>p " in written.text[0]
    assert charts_screen.caption(chart) == "In the cells: share, and p."
    many = cells(LONG[:2]).iloc[:1]
    wide = CellPlot(values=many, name="share", texts=many.map("{:.2f}\nand p".format), texts_are="share, and p")
    assert charts_screen.caption(Chart(title="", plots=(wide,))) == ""


def test_what_stands_in_the_cells_is_said_below_them_alone() -> None:
    matrix = CellPlot(values=cells(LONG[:2]).iloc[:1], name="share", texts_are="share, and p")
    chart = Chart(title="", plots=(matrix, PLOTS["curves"]), caption="Of ten facts.")
    assert chart.below == "Of ten facts. In the cells: share, and p."
    assert chart.alone(1).below == ""


def test_there_are_as_many_looks_as_editors() -> None:
    looks = CHARTS["many"].styles("light")
    assert len(looks) == len(set(looks.values())) == 15


def test_signed_cells_have_zero_in_the_middle() -> None:
    plot = square()
    low, high = plot.ends
    assert low == -high == -np.abs(plot.values.to_numpy()).max()
    assert len(plot.colors("light")) % 2 == 1


def test_rows_that_lack_a_column_are_refused() -> None:
    with pytest.raises(ResultError, match="lack y"):
        LinePlot(rows=pd.DataFrame({"series": ["a"], "x": [0]}), y_title="share")


def test_files_carry_the_manifest(tmp_path: Path) -> None:
    charts_paper.draw(CHARTS["curves"], run={"what": "weight_change"}).savefig(tmp_path / "figure.svg")
    assert "weight_change" in (tmp_path / "figure.svg").read_text()
