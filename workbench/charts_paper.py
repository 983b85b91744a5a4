"""Charts on paper: matplotlib, all vector, sized for a column or a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.charts import Chart
from workbench.paper import PaperFigure, Size


def draw(chart: Chart, *, run: Mapping[str, Any], size: Size | None = None) -> PaperFigure:
    """The figure of a chart; its files carry the manifest `run`."""
    raise NotImplementedError
