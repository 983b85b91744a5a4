"""What an analysis shows, as data: a `Chart` of one or several plots, which the screen and the paper draw each in their own way.

`charts_screen.draw` makes it a plotly figure for a page, `charts_paper.draw` a matplotlib figure for a paper, of the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from workbench.results import ResultError


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


def _check(rows: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in rows.columns]
    if missing:
        raise ResultError(
            f"The rows of a plot lack {', '.join(missing)}; they have {', '.join(map(str, rows.columns))}."
        )
