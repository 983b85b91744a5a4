"""Figures about edits for the screen: where in a model a change is, one changed matrix, and how far activations move.

Looks and arguments are those of `workbench.plots`, whose parts are used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from workbench import drawing, plots
from workbench.drawing import Theme

__all__ = ["cells", "matrix"]

LETTERS = 34
"""Of a line of a row's name, which has two at most."""


def cells(
    values: pd.DataFrame,
    *,
    name: str,
    theme: Theme = "light",
    hue: str = "blue",
    notes: pd.DataFrame | None = None,
    strong: Sequence[str] = (),
    hooks: Sequence[tuple[int, str]] = (),
    planted: range | None = None,
) -> go.Figure:
    """A map of rows by layers (0-based) on a scale from 0; a click gives `layer row`.

    Args:
        values: one row a name, one column a layer.
        name: what the colours stand for.
        theme: the page's.
        hue: one of `drawing.SCALES`.
        notes: what is said where one points at a cell, in the same shape; None: its value.
        strong: names of rows that stand out.
        hooks: layer and row of cells that get a ring.
        planted: layers in which a model is known to hold its facts; marked above the map.
    """
    ink, rows, layers = plots._INK[theme], list(map(str, values.index)), [int(layer) for layer in values.columns]
    height = 32 if len(rows) <= 8 else 24
    numbers = values.to_numpy(dtype=float)
    highest = float(np.nanmax(numbers)) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=numbers, x=layers, y=list(range(len(rows))), zmin=0, zmax=highest,
            colorscale=plots._scale(drawing.SCALES[hue][theme]), hoverinfo="skip", xgap=1, ygap=1,
            showscale=bool(numbers.any()),
            colorbar=dict(
                title=dict(text=plots._safe(name), side="top", font=dict(size=12, color=ink["muted"])), thickness=10,
                outlinewidth=0, len=1, y=0.5, xpad=10, ypad=0, nticks=4, tickfont=dict(size=11, color=ink["muted"]),
            ),
        )
    )  # fmt: skip
    places = list(product(range(len(rows)), range(len(layers))))
    said = [
        f"{rows[y]}, layer {layers[x]}\n"
        + (str(notes.iloc[y, x]) if notes is not None else f"{name} = {drawing.number(float(numbers[y, x]))}")
        for y, x in places
    ]
    figure.add_scatter(
        x=[layers[x] for _, x in places], y=[y for y, _ in places], mode="markers", showlegend=False,
        marker=dict(symbol="square", size=min(height, 26) - 2, opacity=0, color=ink["mark"]),
        selected_marker_opacity=0, unselected_marker_opacity=0,
        customdata=[f"{layers[x]} {rows[y]}" for y, x in places],
        hovertext=[plots._lines(text) for text in said], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    rings = [(layer, rows.index(row)) for layer, row in hooks if row in rows]
    if rings:
        figure.add_scatter(
            x=[x for x, _ in rings], y=[y for _, y in rings], mode="markers", hoverinfo="skip", showlegend=False,
            marker=dict(symbol="circle-open", size=height - 12, color=ink["mark"], line=dict(width=2.5)),
        )  # fmt: skip
    figure.update_xaxes(
        title_text="layer (0-based)", tickvals=drawing.layer_ticks(layers, most=13), tickangle=0, ticks="", showgrid=False,
        range=[layers[0] - 0.5, layers[-1] + 0.5], zeroline=False, showline=True, mirror=True, linecolor=ink["faint"],
        fixedrange=True,
    )  # fmt: skip
    labels = [_in_two_lines(row) for row in rows]
    figure.update_yaxes(
        tickvals=list(range(len(rows))), range=[len(rows) - 0.5, -0.5], ticks="", showgrid=False, zeroline=False,
        ticktext=[f"<b>{label}</b>" if row in strong else label for label, row in zip(labels, rows, strict=True)],
        showline=True, mirror=True, linecolor=ink["faint"], automargin=True, fixedrange=True, ticklabelstandoff=4,
        tickfont=dict(size=12),
    )  # fmt: skip
    top, bottom = 28 if planted else 12, 48
    if planted:
        figure.add_shape(
            type="line", x0=planted[0] - 0.45, x1=planted[-1] + 0.45, yref="paper", ysizemode="pixel", yanchor=1, y0=4, y1=4,
            line=dict(color=ink["mark"], width=2),
        )  # fmt: skip
        figure.add_annotation(**plots._planted_note(planted, theme), y=1, yshift=12)
    figure.update_layout(
        height=max(top + bottom + height * len(rows), 170), hovermode="closest", hoverdistance=-1,
        clickmode="event+select", dragmode=False, showlegend=False,
    )  # fmt: skip
    return plots._dressed(figure, theme=theme, margin=dict(l=8, r=8, t=top, b=bottom))


def matrix(
    values: Float[np.ndarray, "row column"],
    *,
    rows: Float[np.ndarray, " row"],
    columns: Float[np.ndarray, " column"],
    shape: tuple[int, int],
    theme: Theme = "light",
    hue: str = "green",
) -> go.Figure:
    """One changed matrix, (out, in): the mean size of its entries in blocks, and beside it the norms of its columns and rows.

    Args:
        values: by block of rows and of columns.
        rows: norms of the blocks of rows.
        columns: norms of the blocks of columns.
        shape: of the matrix itself.
        theme: the page's.
        hue: one of `drawing.SCALES`.
    """
    ink, scale = plots._INK[theme], drawing.SCALES[hue][theme]
    sizes = [-(-length // blocks) for length, blocks in zip(shape, values.shape, strict=True)]
    y, x = (np.arange(blocks) * size + (size - 1) / 2 for blocks, size in zip(values.shape, sizes, strict=True))
    spans = [
        [_span(i, size, length) for i in range(blocks)]
        for blocks, size, length in zip(values.shape, sizes, shape, strict=True)
    ]
    figure = make_subplots(
        rows=2, cols=2, row_heights=[0.2, 0.8], column_widths=[0.88, 0.12], shared_xaxes=True, shared_yaxes=True,
        vertical_spacing=0.03, horizontal_spacing=0.015,
    )  # fmt: skip
    figure.add_heatmap(
        z=values, x=x, y=y, zmin=0, colorscale=plots._scale(scale), row=2, col=1,
        hovertext=[[f"<b>mean |ΔW| {drawing.number(float(values[i, j]))}</b><br>rows {row}, columns {column}"
                    for j, column in enumerate(spans[1])] for i, row in enumerate(spans[0])],
        hovertemplate="%{hovertext}<extra></extra>",
        colorbar=dict(
            title=dict(text="mean |ΔW|", side="top", font=dict(size=12, color=ink["muted"])), thickness=10, outlinewidth=0,
            len=0.8, y=0, yanchor="bottom", xpad=10, ypad=0, nticks=4, tickfont=dict(size=11, color=ink["muted"]),
        ),
    )  # fmt: skip
    for along, norms, at, word in ((x, columns, 1, "columns"), (y, rows, 0, "rows")):
        across, up = (along, norms) if at else (norms, along)
        figure.add_bar(
            x=across, y=up, orientation="v" if at else "h", width=sizes[at], showlegend=False,
            marker=dict(color=scale[5], line_width=0), row=1 if at else 2, col=1 if at else 2,
            hovertext=[f"<b>|ΔW| {drawing.number(float(norm))}</b><br>{word} {span}"
                       for norm, span in zip(norms, spans[at], strict=True)],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    quiet = dict(showgrid=False, zeroline=False, fixedrange=True, ticks="")
    figure.update_xaxes(**quiet)
    figure.update_yaxes(**quiet)
    figure.update_xaxes(
        title_text=f"column: input, 0 to {shape[1] - 1}", row=2, col=1, range=[-0.5, x[-1] + sizes[1] / 2], nticks=7,
        tickangle=0, showline=True, mirror=True, linecolor=ink["faint"],
    )  # fmt: skip
    figure.update_yaxes(
        title_text="row: output", row=2, col=1, range=[y[-1] + sizes[0] / 2, -0.5], nticks=6, showline=True, mirror=True,
        linecolor=ink["faint"], automargin=True,
    )  # fmt: skip
    figure.update_yaxes(showticklabels=False, row=1, col=1)
    figure.update_xaxes(showticklabels=False, row=2, col=2)
    figure.update_layout(height=400, bargap=0, dragmode=False, hovermode="closest", showlegend=False)
    return plots._dressed(figure, theme=theme, margin=dict(l=8, r=8, t=8, b=44))


def _in_two_lines(text: str) -> str:
    """A row's name, wrapped; what does not fit in two lines is left out."""
    first, *more = drawing.wrapped(text, LETTERS)
    lines = [first, drawing.shortened(" ".join(more), LETTERS)] if more else [first]
    return "<br>".join(map(plots._safe, lines))


def _span(block: int, size: int, length: int) -> str:
    """Which rows or columns a block holds."""
    first, last = block * size, min((block + 1) * size, length) - 1
    return str(first) if first == last else f"{first} to {last}"
