"""Charts on paper: matplotlib, all vector, sized for a column or a page.

Looks are those of `workbench.paper`, whose parts are used here. The legend and the caption stand below all plots.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from workbench import drawing, paper
from workbench.charts import CellPlot, Chart, DotPlot, LinePlot, Plot, ScatterPlot, dodged, label_lines, places
from workbench.paper import PaperFigure, Size

__all__ = ["draw"]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
"""Shapes of dots, so that series differ not by colour alone."""

_LETTER = 0.047
"""Inches of a letter of 7 points, on average and with some room."""

_NICE: Mapping[str, Any] = {"nbins": 5, "steps": [1, 2, 2.5, 5, 10]}

_SHADE = "#ededed"


def draw(chart: Chart, *, run: Mapping[str, Any], size: Size | None = None) -> PaperFigure:
    """The figure of a chart; its files carry the manifest `run`.

    Args:
        chart: what to draw.
        run: where the numbers come from.
        size: None: a column, or a page for plots side by side, wide matrices and long labels.
    """
    grid = chart.grid
    with paper._settings():
        width, _ = paper._inches(size or ("page" if _is_wide(chart) else "column"), n=1, one=0, extra=0)
        legend, caption = _legend_rows(chart, width), _wrapped(chart.below, width)
        bottom = 0.04 + 0.13 * legend + 0.1 * len(caption) + 0.05 * bool(legend) + 0.05 * bool(caption)
        inner = [max(_inner(plot, chart, width) for plot in row) for row in grid]
        around = [
            max(_around(plot, chart, width, joined=chart.goes_on(i * chart.columns)) for plot in row)
            for i, row in enumerate(grid)
        ]
        height = sum(inner) + sum(around) + bottom + 0.05
        if isinstance(size, tuple):
            width, height = size
        figure = PaperFigure(run=run, title=chart.title, figsize=(width, height), layout="constrained")
        share = bottom / height
        figure.get_layout_engine().set(rect=(0, share, 1, 1 - share), w_pad=0.06, h_pad=0.03, hspace=0.03, wspace=0.03)  # type: ignore[union-attr, call-arg]  # constrained
        columns = max(map(len, grid))
        spec = figure.add_gridspec(len(grid), columns, height_ratios=inner)
        axes: list[Axes] = []
        for i, plot in enumerate(chart.plots):
            above = i - chart.columns
            shared = axes[above] if above >= 0 and chart.goes_on(above) else None
            ax = figure.add_subplot(spec[i // chart.columns, i % chart.columns], sharex=shared)
            axes.append(ax)
            _draw(figure, ax, plot, chart)
            paper._write(ax.title, plot.title, size=8)
        for i, ax in enumerate(axes):
            if chart.goes_on(i):
                ax.tick_params(labelbottom=False)
                ax.set_xlabel("")
        figure.align_ylabels([ax for ax, plot in zip(axes, chart.plots, strict=True) if isinstance(plot, LinePlot)])
        paper._settle(figure)
        _below(figure, chart, legend=legend, caption=caption)
    return figure


# --- the four plots ---


def _draw(figure: PaperFigure, ax: Axes, plot: Plot, chart: Chart) -> None:
    if isinstance(plot, CellPlot):
        _draw_cells(figure, ax, plot, chart)
        return
    if isinstance(plot, LinePlot):
        _draw_lines(figure, ax, plot, chart)
    elif isinstance(plot, DotPlot):
        _draw_dots(ax, plot, chart)
    else:
        _draw_points(ax, plot, chart)
    paper._write(ax.xaxis.label, plot.x_title)
    if not isinstance(plot, DotPlot):
        paper._write(ax.yaxis.label, _broken(plot.y_title, _inner(plot, chart, figure.get_figwidth())))


def _draw_lines(figure: PaperFigure, ax: Axes, plot: LinePlot, chart: Chart) -> None:
    styles, (where, _) = chart.styles("light"), places(plot.rows)
    if plot.shade and plot.by_layer:
        ax.axvspan(plot.shade[0] - 0.5, plot.shade[-1] + 0.5, color=_SHADE, linewidth=0, zorder=0)
    ax.axhline(0, color=paper._MUTED if plot.points_down else paper._FRAME, linewidth=0.5, zorder=1)
    for name, y in plot.lines.items():
        ax.axhline(y, **_rule(chart, name))
    for name, offset, thick in dodged(plot):
        rows = plot.rows[plot.rows["series"].astype(str) == name].sort_values("x", key=lambda x: x.map(where))
        (color, dash), x = styles[name], rows["x"].map(where).to_numpy(dtype=float)
        y = rows["y"].to_numpy(dtype=float)
        low, high = _ends(rows)
        if plot.bars:
            ax.bar(x + offset, y, thick, color=color, linewidth=0, zorder=2, alpha=0.9)
            if np.isfinite(low).any():
                ax.vlines(x + offset, low, high, color=paper._INK, linewidth=0.5, zorder=3)
            continue
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        if plot.points_down:
            ax.fill_between(x, 0, y, color=color, alpha=0.08, linewidth=0)
        many = len(x) > 40
        ax.plot(
            x, y, color=color, linewidth=1.1, marker="" if many else "o", markersize=1.8, linestyle=(0, dash) if dash else "-",
            zorder=2.5,
        )  # fmt: skip
    paper._frame(ax, sides=("left", "bottom"))
    if plot.log_x:
        ax.set_xscale("log")
    if plot.by_layer:
        layers = sorted(int(layer) for layer in where.values())
        ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        ax.set_xticks(drawing.layer_ticks(layers, most=13 if chart.columns < 3 else 7))
    elif (named := _crosswise(plot, chart, figure.get_figwidth())) is not None:
        _across(ax, named)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(**_NICE))
    ax.yaxis.set_major_locator(MaxNLocator(**_NICE))
    if plot.points_down:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):g}"))


def _draw_dots(ax: Axes, plot: DotPlot, chart: Chart) -> None:
    styles, labels = chart.styles("light"), list(dict.fromkeys(plot.rows["label"].astype(str)))
    for name, x in plot.lines.items():
        ax.axvline(x, **_rule(chart, name))
    for line in range(1, len(labels)):
        ax.axhline(line - 0.5, color=_SHADE, linewidth=0.5, zorder=0)
    for name, offset, _ in dodged(plot):
        rows = plot.rows[plot.rows["series"].astype(str) == name]
        x, y = rows["x"].to_numpy(dtype=float), rows["label"].astype(str).map(labels.index).to_numpy() + offset
        low, high = _ends(rows)
        ax.hlines(y, low, high, color=styles[name][0], linewidth=0.9, zorder=2)
        ax.plot(x, y, linestyle="", marker=_marker(chart, name), markersize=3, color=styles[name][0], zorder=3)
        for place in y[~np.isfinite(x)]:
            text = ax.text(
                0.01, place, "", transform=ax.get_yaxis_transform(), ha="left", va="center", color=styles[name][0]
            )
            paper._write(text, "no value", size=5.5)
    paper._frame(ax, sides=("left", "bottom"))
    ax.set_ylim(len(labels) - 0.5, -0.5)
    _labels(ax, labels, up=True)
    ax.xaxis.set_major_locator(MaxNLocator(**_NICE))
    ax.margins(x=0.04)


def _draw_points(ax: Axes, plot: ScatterPlot, chart: Chart) -> None:
    styles = chart.styles("light")
    for name in dict.fromkeys(plot.rows["series"].astype(str)):
        rows = plot.rows[plot.rows["series"].astype(str) == name]
        ax.plot(
            rows["x"], rows["y"], linestyle="", marker=_marker(chart, name), markersize=2.8, color=styles[name][0],
            alpha=0.75, markeredgewidth=0,
        )  # fmt: skip
    paper._frame(ax, sides=("left", "bottom"))
    ax.xaxis.set_major_locator(MaxNLocator(**_NICE))
    ax.yaxis.set_major_locator(MaxNLocator(**_NICE))
    if plot.diagonal:
        low, high = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([low, high], [low, high], color=paper._FRAME, linewidth=0.6, zorder=0)
        ax.set(xlim=(low, high), ylim=(low, high), box_aspect=1)


def _draw_cells(figure: PaperFigure, ax: Axes, plot: CellPlot, chart: Chart) -> None:
    values = plot.values.to_numpy(dtype=float)
    n_rows, n_columns = values.shape
    names = [int(name) for name in plot.values.columns] if plot.by_layer else list(range(n_columns))
    edges, colors = paper._edges(names), LinearSegmentedColormap.from_list("cells", plot.colors("light"))
    mesh = ax.pcolormesh(
        edges, range(n_rows + 1), values, cmap=colors, norm=Normalize(*plot.ends),
        edgecolors="face", linewidth=0.2, rasterized=False,
    )  # fmt: skip
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(n_rows, 0)
    paper._frame(ax, sides=("left", "right", "top", "bottom"))
    ax.tick_params(length=0)
    if plot.by_layer:
        ax.set_xticks(drawing.layer_ticks(names, most=13 if chart.columns < 3 else 7))
        ax.tick_params(axis="x", length=2)
    else:
        named = _crosswise(plot, chart, figure.get_figwidth())
        assert named is not None  # cells that are not by layer have words
        _across(ax, named)
    rows = plot.row_labels
    if all(isinstance(name, (int, np.integer)) for name in plot.values.index):
        shown = drawing.layer_ticks([int(name) for name in plot.values.index], most=16)
        ax.set_yticks([rows.index(str(name)) + 0.5 for name in shown], [str(name) for name in shown])
    else:
        _labels(ax, rows, up=False)
    paper._write(ax.title, plot.title, size=8)
    paper._write(ax.xaxis.label, plot.column_title or ("Layer (0-based)" if plot.by_layer else ""))
    paper._write(ax.yaxis.label, plot.row_title)
    words = plot.words.to_numpy()
    size = min(6.5, 72 * _cell_width(plot, chart, figure.get_figwidth()) / (0.52 * max(1, *map(len, words.ravel()))))
    for (row, column), word in np.ndenumerate(words):
        if not word:
            continue
        there, color = np.isfinite(values[row, column]), colors(mesh.norm(values[row, column]))[:3]
        is_dark = there and float(np.dot(color, (0.299, 0.587, 0.114))) < 0.55
        ink = "#ffffff" if is_dark else paper._INK if there else paper._MUTED
        text = ax.text(names[column], row + 0.5, "", ha="center", va="center", color=ink)
        paper._write(text, word, size=max(3.0, size))
    if (shaded := plot.shaded) is not None:
        paper._mark(figure, ax, shaded, plot.title)
    paper._bar(figure, ax, mesh, plot.name)


# --- parts ---


def _ends(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The columns `low` and `high`; NaN where there are none."""
    low, high = (
        rows[name].to_numpy(dtype=float) if name in rows else np.full(len(rows), np.nan) for name in ("low", "high")
    )
    return low, high


def _rule(chart: Chart, name: str) -> dict[str, Any]:
    """How a line like chance is drawn."""
    dash = drawing.DASHES[1 + chart.lines.index(name) % (len(drawing.DASHES) - 1)]
    return dict(color=paper._MUTED, linewidth=0.7, linestyle=(0, dash), zorder=1.5)


def _marker(chart: Chart, name: str) -> str:
    return MARKERS[chart.series.index(name) % len(MARKERS)]


@dataclass(frozen=True, kw_only=True)
class _Crosswise:
    """Words along the axis across."""

    places: list[float]
    """Where they stand."""

    words: list[str]
    """In lines that fit beside each other, where there are such."""

    turned: bool
    """Whether they stand aslant, since they do not."""

    @property
    def height(self) -> float:
        """Inches, about."""
        if self.turned:
            return 0.74 * _LETTER * max(map(len, self.words))
        return 0.1 * max(word.count("\n") + 1 for word in self.words)


def _crosswise(plot: Plot, chart: Chart, width: float) -> _Crosswise | None:
    """The words that stand along the axis across; None where numbers do that matplotlib chooses."""
    if isinstance(plot, CellPlot):
        named = {float(i): name for i, name in enumerate(plot.column_labels)}
    elif isinstance(plot, LinePlot):
        where, numeric = places(plot.rows)
        if plot.by_layer or (numeric and not plot.log_x and len(where) > 6):
            return None
        named = {place: drawing.short_number(name) if numeric else str(name) for name, place in where.items()}
    else:
        return None
    slot = _cell_width(plot, chart, width) if isinstance(plot, CellPlot) else (width / chart.columns - 0.6) / len(named)
    letters = int(slot / _LETTER)
    lines = {
        place: textwrap.wrap(word, max(4, letters), break_long_words=False) or [""] for place, word in named.items()
    }
    turned = any(len(line) > letters for own in lines.values() for line in own)
    words = list(named.values()) if turned else ["\n".join(own) for own in lines.values()]
    return _Crosswise(places=list(named), words=words, turned=turned)


def _across(ax: Axes, named: _Crosswise) -> None:
    """Ticks of their own, across."""
    ax.set_xticks(named.places, [paper._with_fonts(word)[1] for word in named.words])
    ax.xaxis.set_minor_locator(NullLocator())
    for text, word in zip(ax.get_xticklabels(), named.words, strict=True):
        paper._write(text, word, size=6.5)
        text.set_linespacing(0.9)
        if named.turned:
            text.set(rotation=45, ha="right", rotation_mode="anchor")


def _labels(ax: Axes, labels: list[str], *, up: bool) -> None:
    """Names of rows, long ones in two lines."""
    words = ["\n".join(label_lines(label)) for label in labels]
    ax.set_yticks([i + (0 if up else 0.5) for i in range(len(words))], [paper._with_fonts(word)[1] for word in words])
    ax.tick_params(axis="y", length=0)
    for text, word in zip(ax.get_yticklabels(), words, strict=True):
        paper._write(text, word)
        text.set_linespacing(0.9)


def _broken(title: str, height: float) -> str:
    """The title of an axis up in as many lines as its height asks for."""
    return "\n".join(drawing.wrapped(title, int(height / _LETTER)))


def _is_wide(chart: Chart) -> bool:
    """Whether a column is too narrow."""
    if chart.columns > 1:
        return True
    for plot in chart.plots:
        if isinstance(plot, CellPlot):
            cell = 0.07 if plot.texts is None else max(0.16, 0.035 * plot.texts.astype(str).map(len).to_numpy().max())
            if _gutter(plot) + cell * plot.values.shape[1] > 2.9 or _gutter(plot) > 1.3:
                return True
        elif (isinstance(plot, DotPlot) and _gutter(plot) > 1.3) or (
            isinstance(plot, LinePlot)
            and (plot.by_layer or plot.bars)
            and len(set(plot.rows["x"])) * len(chart.series) > 130
        ):
            return True
    return False


def _gutter(plot: Plot) -> float:
    """Inches left of a plot, about."""
    names = plot.row_labels if isinstance(plot, CellPlot) else plot.rows["label"] if isinstance(plot, DotPlot) else ()
    longest = max((len(line) for name in names for line in label_lines(name)), default=6)
    return _LETTER * longest + 0.2 * bool(isinstance(plot, CellPlot) and plot.row_title)


def _cell_width(plot: CellPlot, chart: Chart, width: float) -> float:
    """Inches of a cell, about."""
    return max(0.3, width / chart.columns - _gutter(plot) - 0.6) / plot.values.shape[1]


def _inner(plot: Plot, chart: Chart, width: float) -> float:
    """Inches of a plot's own height."""
    if isinstance(plot, LinePlot):
        return 1.7 if plot.points_down else 1.2
    if isinstance(plot, ScatterPlot):
        return min(2.0, 0.8 * width / chart.columns)
    if isinstance(plot, DotPlot):
        lines = sum(max(len(label_lines(name)), 1.4) for name in dict.fromkeys(plot.rows["label"]))
        return max(0.5, 0.1 * lines + 0.055 * len(set(plot.rows["series"])) * len(set(plot.rows["label"])))
    lines = max(len(label_lines(name)) for name in plot.row_labels)
    return max(0.7, len(plot.values) * (0.125 if lines == 1 and plot.texts is None else 0.1 + 0.08 * lines))


def _around(plot: Plot, chart: Chart, width: float, *, joined: bool) -> float:
    """Inches above and below a plot: its title, ticks, and what stands below them."""
    title = 0.17 * bool(plot.title)
    if joined:
        return title + 0.08
    named = _crosswise(plot, chart, width) if not (isinstance(plot, CellPlot) and plot.by_layer) else None
    shaded = isinstance(plot, CellPlot) and plot.shaded is not None
    return title + 0.28 + (named.height if named else 0.1) + 0.12 * shaded


# --- below the plots ---


def _keys(chart: Chart) -> list[tuple[Any, str]]:
    """What the legend explains."""
    keys: list[tuple[Any, str]] = []
    if len(chart.series) > 1:
        for name, (color, dash) in chart.styles("light").items():
            own = chart.with_series(name)
            if not own:
                continue
            if all(isinstance(plot, LinePlot) and plot.bars for plot in own):
                keys.append((Patch(color=color, linewidth=0, alpha=0.9), name))
            elif any(isinstance(plot, LinePlot) for plot in own):
                keys.append((
                    Line2D([], [], color=color, linewidth=1.1, marker="o", markersize=1.8, linestyle=(0, dash) if dash else "-"),
                    name,
                ))  # fmt: skip
            else:
                keys.append(
                    (Line2D([], [], color=color, linestyle="", marker=_marker(chart, name), markersize=3), name)
                )
    keys += [(Line2D([], [], **_rule(chart, name)), name) for name in chart.lines]
    if any(isinstance(plot, LinePlot) and plot.shade and plot.by_layer for plot in chart.plots):
        keys.append((Patch(color=_SHADE, linewidth=0), "planted layers"))
    return keys


def _legend_columns(chart: Chart, width: float) -> int:
    longest = max(len(name) for _, name in _keys(chart))
    return max(1, int((width - 0.1) / (0.42 + 0.9 * _LETTER * longest)))


def _legend_rows(chart: Chart, width: float) -> int:
    keys = _keys(chart)
    return -(-len(keys) // min(len(keys), _legend_columns(chart, width))) if keys else 0


def _wrapped(caption: str, width: float) -> list[str]:
    """A caption in lines of 6 points."""
    return drawing.wrapped(caption, int((width - 0.15) / 0.0375)) if caption else []


def _below(figure: PaperFigure, chart: Chart, *, legend: int, caption: list[str]) -> None:
    """The legend, and the caption below it, in the room that was kept for them."""
    width, height = figure.get_size_inches()
    caption_top = 0.04 + 0.1 * len(caption)
    if caption:
        text = figure.text(0.07 / width, caption_top / height, "", ha="left", va="top", color=paper._MUTED)
        paper._write(text, "\n".join(caption), size=6)
        text.set_linespacing(1.1)
    if not legend:
        return
    keys = _keys(chart)
    shown = figure.legend(
        [handle for handle, _ in keys], [name for _, name in keys], loc="lower center",
        bbox_to_anchor=(0.5, (caption_top + 0.05 * bool(caption)) / height), ncols=min(len(keys), _legend_columns(chart, width)),
        frameon=False, fontsize=7, handlelength=2.2, columnspacing=1.2, labelspacing=0.25, borderaxespad=0, borderpad=0,
    )  # fmt: skip
    for text, (_, name) in zip(shown.get_texts(), keys, strict=True):
        paper._write(text, name)
