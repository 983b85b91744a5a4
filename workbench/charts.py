"""What an analysis shows, as data: a `Chart` of one or several plots, which the screen and the paper draw each in their own way.

`charts_screen.draw` makes it a plotly figure for a page, `charts_paper.draw` a matplotlib figure for a paper, of the same numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from workbench import drawing
from workbench.drawing import Theme
from workbench.results import ResultError

BROAD = 24
"""Letters of a label beyond which it goes on in a second line."""

NONE = "–"
"""What stands in a cell without a value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinePlot:
    """Curves with intervals, by layer or by anything else.

    Raises:
        ResultError: `rows` lacks a column.
    """

    rows: pd.DataFrame
    """One row a point: `series`, `x`, `y`; optional `low`, `high` (a band) and `note` (said where one points at it)."""

    x_title: str = "Layer (0-based)"
    """Title of the axis across; with this one, `x` are layers."""

    y_title: str
    """Title of the axis up, with the unit."""

    title: str = ""
    """What stands above the plot."""

    shade: range | None = None
    """Layers in which the model is known to hold its facts."""

    lines: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines by name, e.g. chance."""

    log_x: bool = False
    """Whether x is drawn by its logarithm."""

    bars: bool = False
    """Whether each series is drawn as bars instead of a curve; of two, one may point down with negative values."""

    mirrored: bool = False
    """Whether what points down are sizes too, so that the axis shows them without a sign; so are bars of series that are all of
    one sign each."""

    def __post_init__(self) -> None:
        _check(self.rows, "series", "x", "y")

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the curves, in order of appearance."""
        return tuple(self.rows["series"].unique())

    @property
    def by_layer(self) -> bool:
        """Whether x are layers."""
        return self.x_title.startswith("Layer")

    @property
    def points_down(self) -> bool:
        """Whether there is no sign on the axis up: see `mirrored`."""
        signs = {name: set(np.sign(rows["y"].dropna())) - {0.0} for name, rows in self.rows.groupby("series")}
        opposite = set().union(*signs.values()) == {-1.0, 1.0} and all(len(own) < 2 for own in signs.values())
        return self.mirrored or (self.bars and opposite)


@dataclass(frozen=True, kw_only=True, eq=False)
class CellPlot:
    """A matrix in colours: every row against every column."""

    values: pd.DataFrame
    """What is drawn; its index and columns are the labels (columns that are whole numbers are layers). NaN is left blank."""

    name: str
    """What the colours stand for, with the unit."""

    title: str = ""
    """What stands above the matrix."""

    row_title: str = ""
    """What the rows are."""

    column_title: str = ""
    """What the columns are; `Layer (0-based)` where they are layers."""

    texts: pd.DataFrame | None = None
    """What is written into the cells, in the same shape; None: nothing."""

    texts_are: str = ""
    """What the texts are, for the caption."""

    notes: pd.DataFrame | None = None
    """What is said where one points at a cell, in the same shape."""

    low: float | None = None
    """Value at the lower end of the colours; None: the smallest."""

    high: float | None = None
    """Value at the upper end; None: the largest."""

    signed: bool = False
    """Whether 0 is the middle of a scale with two hues."""

    shade: range | None = None
    """Layers, among the columns, in which the model is known to hold its facts."""

    @property
    def by_layer(self) -> bool:
        """Whether the columns are layers."""
        return all(isinstance(name, (int, np.integer)) for name in self.values.columns)

    @property
    def shaded(self) -> range | None:
        """The part of `shade` that is among the columns."""
        layers = [int(name) for name in self.values.columns if name in (self.shade or ())] if self.by_layer else []
        return range(layers[0], layers[-1] + 1) if layers else None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the scale of colours."""
        values = self.values.to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        low = self.low if self.low is not None else float(values.min(initial=np.inf))
        high = self.high if self.high is not None else float(values.max(initial=-np.inf))
        if not np.isfinite([low, high]).all():
            low, high = 0.0, 1.0
        if self.signed:
            low, high = min(low, -high), max(high, -low)
        return (low, high) if high > low else (low, low + max(1e-9, abs(low) * 1e-6))

    @property
    def row_labels(self) -> list[str]:
        """Names of the rows; of those that are the columns' too and many, with a number that stands for them there."""
        return [f"{i}  {name}" if self._numbered else str(name) for i, name in enumerate(self.values.index, start=1)]

    @property
    def column_labels(self) -> list[str]:
        """Names of the columns, or their numbers."""
        return [str(i) if self._numbered else str(name) for i, name in enumerate(self.values.columns, start=1)]

    @property
    def _numbered(self) -> bool:
        return len(self.values) > 6 and list(self.values.index) == list(self.values.columns) and not self.by_layer

    @property
    def words(self) -> pd.DataFrame:
        """What stands in the cells: their texts, and a dash where there is no value."""
        empty = pd.DataFrame("", index=self.values.index, columns=self.values.columns)
        words: pd.DataFrame = empty if self.texts is None else self.texts.fillna("").astype(str)
        words[self.values.isna() & (words == "")] = NONE
        return words

    def colors(self, theme: Theme) -> tuple[str, ...]:
        """The colours from the lower end of the scale to its upper end."""
        up = drawing.SCALES["blue"][theme]
        return (*drawing.SCALES[drawing.OPPOSITES["blue"]][theme][:0:-1], *up) if self.signed else up


@dataclass(frozen=True, kw_only=True, eq=False)
class DotPlot:
    """Values with intervals by label, one below the other.

    Raises:
        ResultError: `rows` lacks a column.
    """

    rows: pd.DataFrame
    """One row a dot: `label`, `series`, `x`; optional `low`, `high` and `note`."""

    x_title: str
    """Title of the axis across, with the unit."""

    title: str = ""
    """What stands above the plot."""

    lines: Mapping[str, float] = field(default_factory=dict)
    """Vertical lines by name, e.g. chance."""

    def __post_init__(self) -> None:
        _check(self.rows, "label", "series", "x")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScatterPlot:
    """Points in the plane.

    Raises:
        ResultError: `rows` lacks a column.
    """

    rows: pd.DataFrame
    """One row a point: `series`, `x`, `y`; optional `note`."""

    x_title: str
    """Title of the axis across, with the unit."""

    y_title: str
    """Title of the axis up, with the unit."""

    title: str = ""
    """What stands above the plot."""

    diagonal: bool = False
    """Whether the line y = x is drawn."""

    def __post_init__(self) -> None:
        _check(self.rows, "series", "x", "y")


Plot = LinePlot | CellPlot | DotPlot | ScatterPlot


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """One figure."""

    title: str
    """What it shows, in a few words."""

    plots: tuple[Plot, ...]
    """Its parts, row by row; line plots above each other share their layers."""

    columns: int = 1
    """How many plots stand side by side."""

    caption: str = ""
    """One or two sentences a reader needs below the figure: n, what the intervals are, that layers count from 0."""

    names: tuple[str, ...] = ()
    """Names of series in the order of their looks; those that are not named here follow."""

    hidden: Mapping[str, int] = field(default_factory=dict)
    """By series how many others it would hide in plots that are not here; see `styles`."""

    def __post_init__(self) -> None:
        """Leaves out what has nothing to show, e.g. a measure that no fact has."""
        there = tuple(plot for plot in self.plots if not _is_empty(plot))
        if self.plots and not there:
            raise ResultError(
                f"There is nothing to draw of {self.title or 'this'!r}: no fact has a value. Take other facts."
            )
        object.__setattr__(self, "plots", there)

    @property
    def grid(self) -> tuple[tuple[Plot, ...], ...]:
        """The plots, row by row."""
        return tuple(self.plots[i : i + self.columns] for i in range(0, len(self.plots), self.columns))

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the series of all plots, in order of appearance; each has one look in all of them."""
        rows = [plot.rows for plot in self.plots if not isinstance(plot, CellPlot)]
        return tuple(dict.fromkeys([*self.names, *(str(name) for own in rows for name in own["series"])]))

    def with_series(self, name: str) -> list[LinePlot | DotPlot | ScatterPlot]:
        """The plots in which a series is."""
        drawn = [plot for plot in self.plots if not isinstance(plot, CellPlot)]
        return [plot for plot in drawn if name in set(plot.rows["series"].astype(str))]

    def alone(self, index: int) -> Chart:
        """One of the plots as a chart, for pages that place plots themselves; without title and caption."""
        return Chart(title="", plots=(self.plots[index],), names=self.series, hidden=self._hidden())

    @property
    def lines(self) -> tuple[str, ...]:
        """Names of the lines across or up in all plots."""
        return tuple(
            dict.fromkeys(name for plot in self.plots if isinstance(plot, (LinePlot, DotPlot)) for name in plot.lines)
        )

    @property
    def below(self) -> str:
        """The caption, what stands in the cells, and what dashes mean where there are some."""
        cells = [plot for plot in self.plots if isinstance(plot, CellPlot)]
        told = [f"In the cells: {words}." for words in dict.fromkeys(plot.texts_are for plot in cells) if words]
        blank = [f"{NONE}: no value."] if any((plot.words == NONE).to_numpy().any() for plot in cells) else []
        return " ".join(part for part in (self.caption, *told, *blank) if part)

    def goes_on(self, index: int) -> bool:
        """Whether the plot below a line plot is one with the same axis across, which then is drawn once, below both."""
        below = self.plots[index + self.columns] if index + self.columns < len(self.plots) else None
        here = self.plots[index]
        return (
            isinstance(here, LinePlot)
            and isinstance(below, LinePlot)
            and here.by_layer
            and (here.x_title, here.log_x) == (below.x_title, below.log_x)
        )

    def styles(self, theme: Theme) -> dict[str, tuple[str, tuple[float, ...]]]:
        """Colour and dash of every series; a curve that would hide an earlier one is dashed."""
        n, hidden = len(drawing.SERIES_COLORS), self._hidden()
        return {
            name: (
                drawing.SERIES_COLORS[i % n][theme],
                drawing.DASHES[(i // n + hidden.get(name, 0)) % len(drawing.DASHES)],
            )
            for i, name in enumerate(self.series)
        }

    def _hidden(self) -> dict[str, int]:
        """By series the number of earlier ones with the same curve, in the plot where these are most."""
        found = dict(self.hidden)
        for plot in self.plots:
            if isinstance(plot, LinePlot) and not plot.bars:
                curves = [
                    (str(name), tuple(zip(rows["x"], rows["y"].round(6), strict=True)))
                    for name, rows in plot.rows.groupby("series", sort=False)
                ]
                for i, (name, curve) in enumerate(curves):
                    same = sum(other == curve for _, other in curves[:i])
                    found[name] = max(found.get(name, 0), same)
        return found


def label_lines(label: object) -> list[str]:
    """A label in lines that are not too long for a figure's margin."""
    return textwrap.wrap(str(label), BROAD) or [""]


def places(rows: pd.DataFrame) -> tuple[dict[object, float], bool]:
    """Where the values of `x` stand on the axis, and whether they are numbers; words stand one beside the other."""
    values = list(dict.fromkeys(rows["x"]))
    if pd.api.types.is_numeric_dtype(rows["x"]):
        return {value: float(value) for value in values}, True
    return {value: float(i) for i, value in enumerate(values)}, False


def _is_empty(plot: Plot) -> bool:
    return plot.values.empty if isinstance(plot, CellPlot) else plot.rows.empty


def _check(rows: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise ResultError(
            f"The rows of a plot lack {', '.join(missing)}; they have {', '.join(map(str, rows.columns))}."
        )


def dodged(plot: LinePlot | DotPlot) -> Iterator[tuple[str, float, float]]:
    """The series of a plot with how far each is moved aside, and how thick it may be; a whole place is 1 wide.

    Bars that point up and down have their places each for themselves.
    """
    names = [str(name) for name in dict.fromkeys(plot.rows["series"])]
    if isinstance(plot, LinePlot) and not plot.bars:
        yield from ((name, 0.0, 1.0) for name in names)
        return
    groups = [names]
    if isinstance(plot, LinePlot) and plot.points_down:
        down = set(plot.rows["series"][plot.rows["y"] < 0].astype(str))
        groups = [[name for name in names if name not in down], [name for name in names if name in down]]
    room = 0.8 if isinstance(plot, LinePlot) else 0.64
    for group in groups:
        for i, name in enumerate(group):
            yield name, room * ((i + 0.5) / len(group) - 0.5), room / len(group)
