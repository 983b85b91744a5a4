"""Charts on the screen: plotly.

Looks are those of `workbench.plots`, whose parts are used here. Heights are fixed and fit a screen of 350 pixels; widths follow the
page. In Streamlit pass `theme=None` to `st.plotly_chart`, so that the colours chosen here stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from workbench import drawing, plots
from workbench.charts import NONE, CellPlot, Chart, DotPlot, LinePlot, Plot, ScatterPlot, dodged, label_lines, places
from workbench.drawing import Theme

__all__ = ["caption", "draw"]

MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon")
"""Shapes of dots, so that series differ not by colour alone."""

NARROW = 350
"""Pixels of the narrowest page."""

WIDE = 900
"""Pixels of a page on which plots stand side by side."""

ROOM = 40
"""Letters that fit beside each other into a matrix on such a page."""

_LETTER = 6.6
"""Pixels of a letter, on average and with some room."""


def draw(chart: Chart, *, theme: Theme = "light") -> go.Figure:
    """The figure of a chart; what stands side by side needs a wide page.

    Args:
        chart: what to draw.
        theme: the page's.
    """
    figure, ink = go.Figure(), plots._INK[theme]
    grid, columns = chart.grid, min(chart.columns, len(chart.plots))
    legend, below = _legend(figure, chart, theme), caption(chart)
    words = drawing.wrapped(below, 52) if below else []
    above = [max(_above(plot) for plot in row) for row in grid]
    inner = [max(_inner(plot) for plot in row) for row in grid]
    under = [max(_under(chart, i * columns + j) for j in range(len(row))) for i, row in enumerate(grid)]
    top, bottom = 8 + 28 * bool(chart.title), under[-1] + 20 * legend + 10 * bool(legend) + 17 * len(words) + 8
    area = sum(above) + sum(inner) + sum(under[:-1])
    height, y = top + area + bottom, 1.0
    for i, row in enumerate(grid):
        y -= above[i] / area
        domain = [max(0.0, y - inner[i] / area), y]
        y = domain[0] - (under[i] / area if i + 1 < len(grid) else 0)
        for j, plot in enumerate(row):
            _draw(
                figure, chart, i * columns + j, plot, y=domain, x=_span(chart, j, columns), tall=inner[i], theme=theme
            )
    if legend:
        figure.update_layout(
            showlegend=True,
            legend=dict(
                orientation="h", xref="container", x=0.01, xanchor="left", yref="container", yanchor="top",
                y=(bottom - under[-1]) / height, itemwidth=36, entrywidthmode="pixels",
                entrywidth=8 + 7 * max(len(str(trace.name)) for trace in figure.data if trace.showlegend),
                traceorder="normal", itemclick=False, itemdoubleclick=False, font=dict(size=12),
            ),
        )  # fmt: skip
    else:
        figure.update_layout(showlegend=False)
    figure.update_layout(height=height, hovermode="closest", dragmode=False, bargap=0, barmode="overlay")
    figure = plots._dressed(figure, theme=theme, margin=dict(l=8, r=12, t=top, b=bottom))
    if chart.title:
        figure.add_annotation(
            text=plots._safe(chart.title), x=0, xref="paper", xanchor="left", y=1, yref="paper", yanchor="bottom",
            yshift=4, showarrow=False, font=dict(size=15, color=ink["text"], weight=600),
        )  # fmt: skip
    if words:  # the title can be placed from the figure's edge, whatever stands left of the plots
        figure.update_layout(
            title=dict(
                text="<br>".join(map(plots._safe, words)), x=0, xref="container", xanchor="left", pad=dict(l=8),
                y=(17 * len(words) + 6) / height, yref="container", yanchor="top", automargin=False,
                font=dict(size=12, color=ink["muted"]),
            )
        )  # fmt: skip
    return figure


# --- the four plots ---


def _draw(
    figure: go.Figure, chart: Chart, index: int, plot: Plot, *, y: list[float], x: list[float], tall: int, theme: Theme
) -> None:
    """One plot on axes of its own."""
    ink, number = plots._INK[theme], "" if index == 0 else str(index + 1)
    axes = dict(xaxis=f"x{number}", yaxis=f"y{number}")
    across: dict[str, Any] = dict(
        domain=x, anchor=axes["yaxis"], showgrid=False, zeroline=False, automargin=True, fixedrange=True, tickangle=0,
        linecolor=ink["faint"], showline=True, ticks="",
    )  # fmt: skip
    up: dict[str, Any] = dict(
        domain=y, anchor=axes["xaxis"], zeroline=False, automargin=True, fixedrange=True, gridcolor=ink["faint"],
        griddash="dot", ticks="",
    )  # fmt: skip
    if isinstance(plot, CellPlot):
        _draw_cells(figure, chart, plot, axes, across, up, tall=tall, theme=theme)
    else:
        across["title_text"] = plots._safe(plot.x_title)
        if isinstance(plot, LinePlot):
            _draw_lines(figure, chart, plot, axes, across, up, tall=tall, theme=theme)
        elif isinstance(plot, DotPlot):
            _draw_dots(figure, chart, plot, axes, across, up, theme=theme)
        else:
            _draw_points(figure, chart, plot, axes, across, up, tall=tall, theme=theme)
    if chart.goes_on(index):
        across |= dict(title_text="", showticklabels=False)
    figure.update_layout({f"xaxis{number}": across, f"yaxis{number}": up})
    if heading := _heading(plot):
        lines = [
            f'<span style="color:{ink["text"]};font-weight:600">{plots._safe(line)}</span>'
            if strong
            else plots._safe(line)
            for line, strong in heading
        ]
        figure.add_annotation(
            text="<br>".join(lines), x=x[0], xref="paper", xanchor="left", align="left", y=y[1], yref="paper",
            yanchor="bottom", yshift=16 if _marked(plot) else 3, showarrow=False,
            xshift=-0.8 * _gutter(plot) if isinstance(plot, CellPlot) else 0, font=dict(size=13, color=ink["muted"]),
        )  # fmt: skip


def _draw_lines(
    figure: go.Figure, chart: Chart, plot: LinePlot, axes: dict[str, str], across: dict[str, Any], up: dict[str, Any], *,
    tall: int, theme: Theme,
) -> None:  # fmt: skip
    ink, styles, (where, numeric) = plots._INK[theme], chart.styles(theme), places(plot.rows)
    layers = sorted(int(place) for place in where.values()) if plot.by_layer else []
    if _marked(plot):
        assert plot.shade is not None
        figure.add_shape(
            type="rect", xref=axes["xaxis"], x0=plot.shade[0] - 0.5, x1=plot.shade[-1] + 0.5,
            yref=f"{axes['yaxis']} domain", y0=0, y1=1, fillcolor=ink["ground"], line_width=0, layer="below",
        )  # fmt: skip
        note = plots._planted_note(plot.shade, theme)
        figure.add_annotation(**{**note, "xref": axes["xaxis"], "yref": f"{axes['yaxis']} domain"}, y=1, yshift=8)
    for name, height in plot.lines.items():
        figure.add_shape(
            type="line", xref=f"{axes['xaxis']} domain", x0=0, x1=1, yref=axes["yaxis"], y0=height, y1=height,
            line=_rule(chart, name, theme), layer="below",
        )  # fmt: skip
    for name, offset, thick in dodged(plot):
        rows = plot.rows[plot.rows["series"].astype(str) == name]
        rows = rows.assign(layer=rows["x"].map(where)).sort_values("layer")
        rows = rows.assign(**{end: rows.get(end, pd.Series(np.nan, rows.index)) for end in ("low", "high")})
        color, dash = styles[name]
        shared: dict[str, Any] = dict(
            **axes, x=rows["layer"] + offset, y=rows["y"], name=plots._safe(name), showlegend=False,
            hovertext=[_note(row, plot.x_title, row["x"], row["y"]) for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
        if plot.bars:
            wide = (rows["high"] - rows["y"]).to_numpy(dtype=float), (rows["y"] - rows["low"]).to_numpy(dtype=float)
            figure.add_bar(
                **shared, width=thick, marker=dict(color=color, line_width=0),
                error_y=dict(
                    type="data", symmetric=False, array=wide[0], arrayminus=wide[1], color=ink["muted"], thickness=1, width=0
                ) if np.isfinite(wide[0]).any() else None,
            )  # fmt: skip
            continue
        plots._band(figure, rows, color=color, group=name, alpha=0.16 if len(styles) <= 6 else 0.08)
        if len(rows.dropna(subset=["low", "high"])):
            figure.data[-1].update(**axes)
        figure.add_scatter(
            **shared, mode="lines" if len(rows) > 60 else "lines+markers", marker=dict(color=color, size=5),
            line=dict(color=color, width=2, dash=_dash(dash)),
            **(dict(fill="tozeroy", fillcolor=plots._faded(color, 0.07)) if plot.points_down else {}),
        )  # fmt: skip
    figure.add_shape(
        type="line", xref=f"{axes['xaxis']} domain", x0=0, x1=1, yref=axes["yaxis"], y0=0, y1=0,
        line=dict(color=ink["muted"] if plot.points_down else ink["faint"], width=1), layer="below",
    )  # fmt: skip
    across["showline"] = False
    up["title_text"] = _broken(plot.y_title, tall)
    if plot.points_down:
        low, high = float(plot.rows["y"].min()), float(plot.rows["y"].max())
        ticks = _nice(min(0.0, 1.04 * low), max(0.0, 1.04 * high))
        up |= dict(tickvals=ticks, ticktext=[f"{abs(tick):g}" for tick in ticks])
    if layers:
        across |= dict(tickvals=drawing.layer_ticks(layers), range=[layers[0] - 0.5, layers[-1] + 0.5])
    elif plot.log_x:
        across |= dict(
            type="log", tickvals=list(where.values()), ticktext=[drawing.short_number(name) for name in where]
        )
    elif not numeric:
        words, turned = _across([str(name) for name in where], 0)
        across |= dict(
            tickvals=list(where.values()), ticktext=["<br>".join(map(plots._safe, lines)) for lines in words]
        )
        across |= dict(range=[-0.5, len(words) - 0.5], tickangle=-90 if turned else 0)


def _draw_dots(
    figure: go.Figure, chart: Chart, plot: DotPlot, axes: dict[str, str], across: dict[str, Any], up: dict[str, Any], *,
    theme: Theme,
) -> None:  # fmt: skip
    ink, styles, labels = plots._INK[theme], chart.styles(theme), list(dict.fromkeys(plot.rows["label"].astype(str)))
    for name, place in plot.lines.items():
        figure.add_shape(
            type="line", yref=f"{axes['yaxis']} domain", y0=0, y1=1, xref=axes["xaxis"], x0=place, x1=place,
            line=_rule(chart, name, theme), layer="below",
        )  # fmt: skip
    for line in range(1, len(labels)):
        figure.add_shape(
            type="line", xref=f"{axes['xaxis']} domain", x0=0, x1=1, yref=axes["yaxis"], y0=line - 0.5, y1=line - 0.5,
            line=dict(color=ink["faint"], width=1), layer="below",
        )  # fmt: skip
    for name, offset, _ in dodged(plot):
        rows = plot.rows[plot.rows["series"].astype(str) == name]
        y = rows["label"].astype(str).map(labels.index).to_numpy() + offset
        low, high = (rows.get(end, pd.Series(np.nan, rows.index)).to_numpy(dtype=float) for end in ("low", "high"))
        x, color = rows["x"].to_numpy(dtype=float), styles[name][0]
        figure.add_scatter(
            **axes, x=x, y=y, mode="markers", name=plots._safe(name), showlegend=False,
            marker=dict(color=color, size=8, symbol=_marker(chart, name)),
            error_x=dict(
                type="data", symmetric=False, array=high - x, arrayminus=x - low, color=color, thickness=1.5, width=0
            ) if np.isfinite(low).any() else None,
            hovertext=[_note(row, "", row["label"], row["x"]) for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
        for place in y[~np.isfinite(x)]:
            figure.add_annotation(
                text="no value", xref=f"{axes['xaxis']} domain", x=0, xanchor="left", yref=axes["yaxis"], y=place,
                showarrow=False, font=dict(size=11, color=color),
            )  # fmt: skip
    up |= _rows(labels)
    up["showgrid"] = False
    across |= dict(showgrid=True, gridcolor=ink["faint"], griddash="dot", nticks=6)


def _draw_points(
    figure: go.Figure, chart: Chart, plot: ScatterPlot, axes: dict[str, str], across: dict[str, Any], up: dict[str, Any], *,
    tall: int, theme: Theme,
) -> None:  # fmt: skip
    styles = chart.styles(theme)
    if plot.diagonal:
        both = pd.concat([plot.rows["x"], plot.rows["y"]]).astype(float)
        low, high = float(both.min()), float(both.max())
        figure.add_shape(
            type="line", xref=axes["xaxis"], x0=low, x1=high, yref=axes["yaxis"], y0=low, y1=high,
            line=dict(color=plots._INK[theme]["muted"], width=1), layer="below",
        )  # fmt: skip
    for name in dict.fromkeys(plot.rows["series"].astype(str)):
        rows = plot.rows[plot.rows["series"].astype(str) == name]
        figure.add_scatter(
            **axes, x=rows["x"], y=rows["y"], mode="markers", name=plots._safe(name), showlegend=False,
            marker=dict(color=plots._faded(styles[name][0], 0.75), size=7, symbol=_marker(chart, name)),
            hovertext=[_note(row, plot.x_title, row["x"], row["y"]) for row in rows.to_dict("records")],
            hovertemplate="%{hovertext}<extra></extra>",
        )  # fmt: skip
    up["title_text"] = _broken(plot.y_title, tall)
    across |= dict(showgrid=True, gridcolor=plots._INK[theme]["faint"], griddash="dot", nticks=6)


def _draw_cells(
    figure: go.Figure, chart: Chart, plot: CellPlot, axes: dict[str, str], across: dict[str, Any], up: dict[str, Any], *,
    tall: int, theme: Theme,
) -> None:  # fmt: skip
    ink, values, (low, high) = plots._INK[theme], plot.values.to_numpy(dtype=float), plot.ends
    n_rows, n_columns = values.shape
    names = [int(name) for name in plot.values.columns] if plot.by_layer else list(range(n_columns))
    scale = plots._scale(plot.colors(theme))
    short = len(plot.name) <= 14
    words = [plot.name] if short else drawing.wrapped(plot.name, tall // 7)
    notes = _cell_notes(plot)
    figure.add_heatmap(
        **axes, z=values, x=names, y=list(range(n_rows)), zmin=low, zmax=high, colorscale=scale, hoverongaps=True,
        showscale=not _is_written(plot),
        xgap=1 if n_columns <= 60 else 0, ygap=1, customdata=notes, hovertemplate="%{customdata}<extra></extra>",
        colorbar=dict(
            title=dict(
                text="<br>".join(map(plots._safe, words)), side="top" if short else "right",
                font=dict(size=12, color=ink["muted"]),
            ),
            thickness=10, outlinewidth=0, len=up["domain"][1] - up["domain"][0], lenmode="fraction",
            y=up["domain"][0], yanchor="bottom", x=across["domain"][1], xanchor="left", xpad=10, ypad=0, nticks=5,
            tickfont=dict(size=11, color=ink["muted"]), ticks="",
        ),
    )  # fmt: skip
    written = _written(plot)
    if (written != "").to_numpy().any():
        longest = _longest(written)
        share = np.nan_to_num((values.ravel() - low) / (high - low), nan=0.0).clip(0, 1)
        cells = sample_colorscale(scale, share, colortype="tuple")
        bright = [np.dot(cell, (0.299, 0.587, 0.114)) > 0.55 for cell in cells]
        colors = [
            ink["muted"] if not there else "#111111" if light else "#ffffff"
            for light, there in zip(bright, np.isfinite(values.ravel()), strict=True)
        ]
        figure.add_scatter(
            **axes, x=names * n_rows, y=[i for i in range(n_rows) for _ in names],
            text=["<br>".join(map(plots._safe, text.splitlines())) for text in written.to_numpy().ravel()], mode="text",
            textfont=dict(size=12 if n_columns * longest <= 32 else 10 if n_columns * longest <= 56 else 9, color=colors),
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    across |= dict(
        title_text=plots._safe(plot.column_title or ("Layer (0-based)" if plot.by_layer else "")), mirror=True, showline=True,
        range=[names[0] - 0.5, names[-1] + 0.5],
    )  # fmt: skip
    labels = plot.row_labels
    if plot.by_layer:
        few = 7 if max(map(len, labels)) > 14 or chart.columns > 1 else 13
        across["tickvals"] = drawing.layer_ticks(names, most=few)
    else:
        lines, turned = _across(plot.column_labels, _gutter(plot))
        across |= dict(tickvals=names, ticktext=["<br>".join(map(plots._safe, own)) for own in lines])
        across |= dict(tickangle=-90) if turned else {}
    up |= _rows(labels)
    if all(isinstance(name, (int, np.integer)) for name in plot.values.index):
        shown = drawing.layer_ticks([int(name) for name in plot.values.index], most=16)
        up |= dict(tickvals=[labels.index(str(name)) for name in shown], ticktext=[str(name) for name in shown])
    up |= dict(
        title_text=plots._safe(plot.row_title), showline=True, mirror=True, linecolor=ink["faint"], showgrid=False
    )
    if (shaded := plot.shaded) is not None:
        figure.add_shape(
            type="line", xref=axes["xaxis"], x0=shaded[0] - 0.45, x1=shaded[-1] + 0.45, yref="paper", ysizemode="pixel",
            yanchor=up["domain"][1], y0=4, y1=4, line=dict(color=ink["mark"], width=2),
        )  # fmt: skip
        note = {**plots._planted_note(shaded, theme), "xref": axes["xaxis"]}
        figure.add_annotation(**note, y=up["domain"][1], yshift=12)


# --- parts ---


def _note(row: dict[Any, Any], across: str, x: Any, y: Any) -> str:
    """What is said where one points at a place of a series."""
    place = drawing.short_number(x) if isinstance(x, (int, float, np.number)) else str(x)
    lines = [str(row["series"]), f"{across.partition(' (')[0].lower()} {place}" if across else place, drawing.number(y)]
    if all(end in row and np.isfinite(row[end]) for end in ("low", "high")):
        lines[-1] += f" [{drawing.number(row['low'])}, {drawing.number(row['high'])}]"
    if isinstance(row.get("note"), str) and row["note"]:
        lines.append(row["note"])
    return plots._lines("\n".join(lines))


def _cell_notes(plot: CellPlot) -> list[list[str]]:
    """What is said where one points at a cell."""
    notes = []
    for r, row in enumerate(plot.values.index):
        own = []
        for c, column in enumerate(plot.values.columns):
            value = float(plot.values.to_numpy(dtype=float)[r, c])
            said = plot.notes.iat[r, c] if plot.notes is not None else None
            text = str(said) if isinstance(said, str) and said else ""
            place = f"layer {column}" if plot.by_layer else str(column)
            shown = f"{plot.name} {drawing.number(value)}" if np.isfinite(value) else "no value"
            own.append(plots._lines(text or f"{row}\n{place}\n{shown}"))
        notes.append(own)
    return notes


def _rows(labels: list[str]) -> dict[str, Any]:
    """An axis up with a name for each row, long ones in two lines."""
    return dict(
        tickvals=list(range(len(labels))), ticktext=["<br>".join(map(plots._safe, label_lines(name))) for name in labels],
        range=[len(labels) - 0.5, -0.5], ticklabelstandoff=4, tickfont=dict(size=12),
    )  # fmt: skip


def _rule(chart: Chart, name: str, theme: Theme) -> dict[str, Any]:
    """How a line like chance is drawn."""
    dash = drawing.DASHES[1 + chart.lines.index(name) % (len(drawing.DASHES) - 1)]
    return dict(color=plots._INK[theme]["muted"], width=1.2, dash=_dash(dash))


def _dash(lengths: tuple[float, ...]) -> str:
    return ",".join(f"{2 * length:g}px" for length in lengths) or "solid"


def _marker(chart: Chart, name: str) -> str:
    return MARKERS[chart.series.index(name) % len(MARKERS)]


def _broken(title: str, tall: int) -> str:
    return "<br>".join(map(plots._safe, drawing.wrapped(title, int(tall / _LETTER))))


def _nice(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    step = (high - low or 1.0) / 5
    power = 10.0 ** np.floor(np.log10(step))
    step = power * min((one for one in (1, 2, 2.5, 5, 10) if one * power >= step), default=10)
    return [round(i * step, 12) for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _marked(plot: Plot) -> bool:
    """Whether the word `planted` stands above."""
    if isinstance(plot, CellPlot):
        return plot.shaded is not None
    return isinstance(plot, LinePlot) and bool(plot.shade) and plot.by_layer


def _gutter(plot: Plot) -> float:
    """Pixels left of a plot, about."""
    names = plot.row_labels if isinstance(plot, CellPlot) else plot.rows["label"] if isinstance(plot, DotPlot) else ()
    return _LETTER * max((len(line) for name in names for line in label_lines(name)), default=6)


def _across(names: list[str], gutter: float) -> tuple[list[list[str]], bool]:
    """Names across in lines, and whether they are turned, since they cannot stand beside each other on a narrow page."""
    lines = [label_lines(name) for name in names]
    longest = max(len(line) for own in lines for line in own)
    turned = len(names) * (longest + 1) * _LETTER > NARROW - gutter - 60
    return ([[name] for name in names] if turned and len(names) > 8 else lines), turned


def _written(plot: CellPlot) -> pd.DataFrame:
    """What is written into the cells: .46 where 0.46 is too wide, and only dashes where that is too wide too."""
    words = plot.words
    if len(words.columns) > 8:
        words = words.replace(r"^(−|-)?0\.", r"\1.", regex=True)
    if len(words.columns) * _longest(words) > ROOM:
        words = words.where(words == NONE, "")
    return words


def _longest(words: pd.DataFrame) -> int:
    """Letters of the longest line in the cells."""
    return max((len(line) for text in words.to_numpy().ravel() for line in text.splitlines()), default=0)


def _is_written(plot: CellPlot) -> bool:
    """Whether numbers are written into the cells."""
    return bool((~_written(plot).isin(["", NONE])).to_numpy().any())


def _heading(plot: Plot) -> list[tuple[str, bool]]:
    """What stands above a plot, in lines, and which of them are its title.

    A matrix with numbers in its cells has no colour bar, so its numbers are named here.
    """
    title = [(line, True) for line in (drawing.wrapped(plot.title, 44) if plot.title else [])]
    name = drawing.wrapped(plot.name, 48) if isinstance(plot, CellPlot) and _is_written(plot) else []
    return [*title, *((line, False) for line in name)]


def _above(plot: Plot) -> int:
    """Pixels above a plot: its title and the word `planted`."""
    return 4 + 18 * len(_heading(plot)) + 14 * _marked(plot)


def _inner(plot: Plot) -> int:
    """Pixels of a plot's own height."""
    if isinstance(plot, LinePlot):
        return 320 if plot.points_down else 230
    if isinstance(plot, ScatterPlot):
        return 300
    if isinstance(plot, DotPlot):
        labels, n = dict.fromkeys(plot.rows["label"]), len(set(plot.rows["series"]))
        return max(60, sum(max(26, 15 * len(label_lines(name)) + 4, 13 * n + 6) for name in labels))
    written = max((text.count("\n") + 1 for text in _written(plot).to_numpy().ravel()), default=1)
    lines = max(written, *(len(label_lines(name)) for name in plot.row_labels))
    return max(90, len(plot.values) * max(plots._row_height(len(plot.values)), 15 * lines + 3))


def _under(chart: Chart, index: int) -> int:
    """Pixels below a plot: ticks, and the title of its axis."""
    plot = chart.plots[index]
    if chart.goes_on(index):
        return 8
    names: list[str] = []
    if isinstance(plot, CellPlot) and not plot.by_layer:
        names = plot.column_labels
    elif isinstance(plot, LinePlot) and not places(plot.rows)[1]:
        names = [str(name) for name in places(plot.rows)[0]]
    ticks = 22
    if names:
        words, turned = _across(names, _gutter(plot) if isinstance(plot, CellPlot) else 0)
        longest = max(len(line) for lines in words for line in lines)
        ticks = int(_LETTER * longest) + 10 if turned else 16 * max(map(len, words)) + 8
    has_title = not isinstance(plot, CellPlot) or plot.by_layer or bool(plot.column_title)
    return ticks + 26 * has_title


def _span(chart: Chart, column: int, columns: int) -> list[float]:
    """The part of the width that a column of plots has: all the same, beside what stands left and right of each."""
    left, right = np.zeros(columns), np.zeros(columns)
    for i, plot in enumerate(chart.plots):
        left[i % columns] = max(left[i % columns], _gutter(plot) + 36)
        bar = 76 if isinstance(plot, CellPlot) and not _is_written(plot) else 12
        right[i % columns] = max(right[i % columns], bar)
    left[0] = right[-1] = 0.0  # those are in the figure's margins
    share = np.minimum(0.8 / (columns * max(1, columns - 1)), (left + right) / WIDE)
    each = (1 - share.sum()) / columns
    begin = column * each + share[:column].sum() + left[column] / max(1.0, left[column] + right[column]) * share[column]
    return [float(begin), float(begin + each)]


def _legend(figure: go.Figure, chart: Chart, theme: Theme) -> int:
    """Adds what the legend shows, and says how many rows it has on a narrow page."""
    keys: list[tuple[str, dict[str, Any]]] = []
    if len(chart.series) > 1:
        for name, (color, dash) in chart.styles(theme).items():
            own = chart.with_series(name)
            if not own:
                continue
            if all(isinstance(plot, LinePlot) and plot.bars for plot in own):
                keys.append((name, dict(mode="markers", marker=dict(color=color, size=11, symbol="square"))))
            elif any(isinstance(plot, LinePlot) for plot in own):
                look = dict(
                    mode="lines+markers",
                    line=dict(color=color, width=2, dash=_dash(dash)),
                    marker=dict(color=color, size=5),
                )
                keys.append((name, look))
            else:
                keys.append((name, dict(mode="markers", marker=dict(color=color, size=8, symbol=_marker(chart, name)))))
    keys += [(name, dict(mode="lines", line=_rule(chart, name, theme))) for name in chart.lines]
    for name, look in keys:
        figure.add_scatter(x=[None], y=[None], name=plots._safe(name), hoverinfo="skip", showlegend=True, **look)
    if not keys:
        return 0
    each, gutter = 52 + 7 * max(len(name) for name, _ in keys), min(0.6 * NARROW, max(map(_gutter, chart.plots)))
    return -(-len(keys) // max(1, int((NARROW - gutter) // each)))  # a legend is as wide as the plots are


def caption(chart: Chart) -> str:
    """What stands below a chart, without what is said of cells that are too narrow for it."""
    plots_ = [
        replace(plot, texts_are="") if isinstance(plot, CellPlot) and not _is_written(plot) else plot
        for plot in chart.plots
    ]
    return replace(chart, plots=tuple(plots_)).below
