"""Figures for papers: matplotlib, all vector, sized for a column or a page, from the same numbers that `workbench.plots` shows.

A `PaperFigure` carries its protocol and puts it into the files it saves. Nothing here touches pyplot, so figures may be made and
saved in several threads.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from workbench import drawing
from workbench.drawing import Column, Panel
from workbench.export import figure_metadata
from workbench.results import Footprint, Result
from workbench.sites import Role

__all__ = ["PaperFigure", "average", "heatmap", "profile"]

logger = logging.getLogger(__name__)

Size = Literal["column", "page"] | tuple[float, float]
"""Width of a column (3.5 in) or of a page (7 in) with a height that fits, or width and height in inches."""

FONTS = ("STIXGeneral", "DejaVu Sans")
"""A Times that comes with matplotlib, so that a figure looks the same everywhere; then what has most other letters and signs."""

_SVG_FAMILIES = (
    b"'STIXGeneral', ",
    b"'STIXGeneral', 'STIX Two Text', 'Times New Roman', ",
)  # text is set by the viewer
_WIDTHS: Mapping[str, float] = {"column": 3.5, "page": 7.0}
_INK, _MUTED, _FRAME = "#000000", "#4d4d4d", "#b3b3b3"
_SETTINGS: Mapping[str, Any] = {
    "pdf.fonttype": 42,  # TrueType, so that text stays text and journals accept the file
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "workbench",  # ids that do not change from run to run
    "path.simplify": False,
}
_LOCK = threading.RLock()  # matplotlib's settings are global


class PaperFigure(Figure):
    """A matplotlib figure that knows where its numbers come from and writes that into its files."""

    def __init__(self, *, run: Mapping[str, Any], title: str, **more: Any) -> None:
        super().__init__(**more)
        self.run = run
        self.title = title
        FigureCanvasAgg(self)

    def savefig(self, fname: Any, **options: Any) -> None:
        """As matplotlib's, with fonts as TrueType (pdf) or text (svg), 300 dpi (png), the protocol as metadata, and no dates."""
        name = Path(fname).suffix[1:] if isinstance(fname, (str, Path)) else ""
        format_ = str(options.pop("format", None) or name or "png").lower()
        metadata = {**figure_metadata(self.run, title=self.title, format=format_), **options.pop("metadata", {})}
        options = {"format": format_, "dpi": 300, "metadata": metadata, **options}
        if format_ != "svg":
            with _settings():
                super().savefig(fname, **options)
            return
        buffer = io.BytesIO()
        with _settings():
            super().savefig(buffer, **options)
        data = buffer.getvalue().replace(*_SVG_FAMILIES)
        if isinstance(fname, (str, Path)):
            Path(fname).write_bytes(data)
        else:
            fname.write(data)

    def _repr_png_(self) -> bytes:
        """How a notebook shows it, without pyplot."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=200)
        return buffer.getvalue()


def heatmap(
    footprint: Footprint,
    *,
    kind: str | None = None,
    kinds: Sequence[str] = (),
    fact: str | None = None,
    column: Column = "score",
    planted: range | None = None,
    shared: bool = True,
    vmin: float | None = None,
    vmax: float | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """The maps of one fact, as ROME draws them: tokens down, the subject's with `*`; layers across (0-based).

    Args:
        footprint: what to draw.
        kind: one kind, or
        kinds: several; none of both: all kinds of the footprint. Side by side, or below each other in a column.
        fact: which fact; None for the only one.
        column: raw scores, or effects.
        planted: layers in which a model is known to hold its facts; marked above the maps.
        shared: one scale for all maps.
        vmin: lower end of the colour scale; None: the corrupted run's score (or an effect of 0).
        vmax: upper end; None: the best cell.
        size: None: a column for one map, a page for several.

    Raises:
        ResultError: there is no such fact or kind.
    """
    chosen = _chosen(kind, kinds, footprint)
    if fact is None and len(footprint.facts) == 1:
        fact = footprint.facts[0]
    panels = [drawing.panel(footprint, kind=each, fact=fact, column=column) for each in chosen]
    prompt = drawing.fact_row(footprint, fact).get("prompt", fact)
    return _maps(
        _scaled(panels, shared, vmin, vmax), run=footprint.run, title=f"{footprint.run.get('what', 'Map')}: {prompt}",
        planted=planted, size=size,
    )  # fmt: skip


def average(
    result: Result,
    *,
    kind: str | None = None,
    kinds: Sequence[str] = (),
    planted: range | None = None,
    shared: bool = True,
    vmin: float | None = None,
    vmax: float | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """The maps of an average over facts (`analyses.average_trace`): roles of tokens down, layers across.

    Arguments as of `heatmap`.
    """
    panels = [drawing.average_panel(result, kind=each) for each in _chosen(kind, kinds, result)]
    title = f"Average over {result.run.get('n_facts', len(result.run.get('facts', ())))} facts"
    return _maps(_scaled(panels, shared, vmin, vmax), run=result.run, title=title, planted=planted, size=size)


def profile(
    result: Result,
    *,
    kind: str | None = None,
    kinds: Sequence[str] = (),
    roles: Sequence[Role] = (),
    planted: range | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """Mean effect by layer, a line for each role of a token, with bands of 95 %; one scale for all kinds.

    Args:
        result: a footprint of several facts (t intervals over facts) or an average (its own bootstrap intervals).
        kind: one kind, or
        kinds: several; none of both: all.
        roles: which roles; none: all that occur.
        planted: layers in which a model is known to hold its facts; shaded.
        size: None: a column for one kind, a page for several.

    Raises:
        ResultError: there is no such kind or role.
    """
    chosen = _chosen(kind, kinds, result)
    with _settings():
        across = size != "column"
        width, height = _inches(size, n=len(chosen), one=1.55, extra=0.55)
        figure = PaperFigure(
            run=result.run, title=drawing.curve_name(result), figsize=(width, height), layout="constrained"
        )
        rows, columns = (1, len(chosen)) if across else (len(chosen), 1)
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for ax, each in zip(axes, chosen, strict=True):
            table = drawing.curves(result, kind=each, roles=roles)
            if planted:
                ax.axvspan(planted[0] - 0.5, planted[-1] + 0.5, color="#ededed", linewidth=0, zorder=0)
            ax.axhline(0, color=_FRAME, linewidth=0.5, zorder=1)
            for role in dict.fromkeys(table["role"]):
                line, color = table[table["role"] == role], drawing.ROLE_COLORS[role]["light"]
                ax.fill_between(line["layer"], line["low"], line["high"], color=color, alpha=0.18, linewidth=0)
                ax.plot(
                    line["layer"], line["value"], color=color, linewidth=1.1, marker="o", markersize=1.8,
                    label=drawing.ROLE_WORDS[role],
                )  # fmt: skip
            layers = sorted(set(table["layer"]))
            ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
            ax.set_xticks(drawing.layer_ticks(layers))
            _write(ax.title, drawing.KIND_WORDS.get(each, each), size=8)
            _write(ax.xaxis.label, drawing.layer_title(result, kind=each))
            _frame(ax, sides=("left", "bottom"))
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if ax is axes[0] or not across:
                _write(ax.yaxis.label, drawing.curve_name(result))
        handles, labels = axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 3 if width > 5 else 2), frameon=False,
            fontsize=7, handlelength=1.4, columnspacing=1.2, labelspacing=0.25, borderaxespad=0,
        )  # fmt: skip
        for text in legend.get_texts():
            _write(text, text.get_text())
        _settle(figure)
    return figure


# --- parts ---


class _settings:
    """Matplotlib's own defaults and ours, whatever the caller's style; one thread at a time, since they are global."""

    def __enter__(self) -> None:
        _LOCK.acquire()
        self.context = mpl.style.context(["default", dict(_SETTINGS)])
        self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        self.context.__exit__(None, None, None)
        _LOCK.release()


def _chosen(kind: str | None, kinds: Sequence[str], result: Result) -> list[str]:
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    return ([kind] if kind else named) or list(result.table["kind"].unique())


def _scaled(panels: Sequence[Panel], shared: bool, vmin: float | None, vmax: float | None) -> list[Panel]:
    low, high = min(panel.low for panel in panels), max(panel.high for panel in panels)
    return [
        panel.on(low if vmin is None and shared else vmin, high if vmax is None and shared else vmax)
        for panel in panels
    ]


def _inches(size: Size | None, *, n: int, one: float, extra: float) -> tuple[float, float]:
    """Width and height: of `one` map or axes each, and what stands around it."""
    if isinstance(size, tuple):
        return size
    word = size or ("column" if n == 1 else "page")
    stacked = n if word == "column" else 1
    return _WIDTHS[word], stacked * one + extra + 0.45 * (stacked - 1)


def _maps(
    panels: Sequence[Panel], *, run: Mapping[str, Any], title: str, planted: range | None, size: Size | None
) -> PaperFigure:
    """Maps side by side, or below each other in a column; rows are named on the left."""
    with _settings():
        n_rows = max(len(panel.values) for panel in panels)
        width, height = _inches(size, n=len(panels), one=max(0.8, 0.125 * n_rows), extra=0.62)
        across = size != "column"
        figure = PaperFigure(run=run, title=title, figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02)  # type: ignore[union-attr, call-arg]  # constrained
        rows, columns = (1, len(panels)) if across else (len(panels), 1)
        for index, (ax, panel) in enumerate(
            zip(figure.subplots(rows, columns, squeeze=False).ravel(), panels, strict=True)
        ):
            _draw_map(figure, ax, panel, named=index == 0 or not across, planted=planted)
        _settle(figure)
    return figure


def _settle(figure: PaperFigure) -> None:
    """Lays the figure out once and for all, so that every file of it is the same."""
    engine = figure.get_layout_engine()
    assert engine is not None  # as the figure was made
    engine.execute(figure)
    figure.set_layout_engine("none")


def _draw_map(figure: Figure, ax: Axes, panel: Panel, *, named: bool, planted: range | None) -> None:
    values, layers = panel.values.to_numpy(), [int(layer) for layer in panel.values.columns]
    colors = LinearSegmentedColormap.from_list(
        panel.kind, drawing.SCALES[drawing.HUES.get(panel.kind, "blue")]["light"]
    )
    mesh = ax.pcolormesh(
        _edges(layers), range(len(values) + 1), values, cmap=colors.reversed() if panel.reverse else colors,
        norm=Normalize(panel.low, panel.high), edgecolors="face", linewidth=0.2, rasterized=False,
    )  # fmt: skip
    y, x = panel.estimated.to_numpy(dtype=bool).nonzero()
    ax.plot([layers[i] for i in x], y + 0.5, ".", markersize=0.9, color=_INK, alpha=0.5)
    ax.set_ylim(len(values), 0)
    ax.set_xlim(_edges(layers)[0], _edges(layers)[-1])
    ax.set_xticks(drawing.layer_ticks(layers, most=13 if ax.get_subplotspec().get_gridspec().ncols < 3 else 7))  # type: ignore[union-attr]
    ax.set_yticks([i + 0.5 for i in range(len(values))])
    _frame(ax, sides=("left", "right", "top", "bottom"))
    ax.tick_params(axis="y", length=0)
    labels = [drawing.shortened(label, 24) for label in panel.labels] if named else []
    ax.set_yticklabels(
        [_with_fonts(label)[1] for label in labels]
    )  # what is drawn; the texts below only get their fonts
    for text, label, strong in zip(ax.get_yticklabels(), labels, panel.strong, strict=False):
        _write(text, label, weight="bold" if strong else "normal")
    _write(ax.title, panel.title, size=8)
    _write(ax.xaxis.label, panel.layer_title)
    if planted:
        ax.plot(
            [planted[0] - 0.45, planted[-1] + 0.45], [1.03, 1.03], transform=ax.get_xaxis_transform(), clip_on=False,
            color=_INK, linewidth=1, solid_capstyle="butt",
        )  # fmt: skip
        note = ax.annotate(
            "planted", ((planted[0] + planted[-1]) / 2, 1.03), xycoords=ax.get_xaxis_transform(), xytext=(0, 1.5),
            textcoords="offset points", ha="center", va="bottom", annotation_clip=False,
        )  # fmt: skip
        _write(note, "planted", size=6)
        ax.title.set_y(1.0)
        ax.set_title(ax.title.get_text(), pad=13)
        _write(ax.title, panel.title, size=8)
    _bar(figure, ax, mesh, panel)


def _bar(figure: Figure, ax: Axes, mesh: ScalarMappable, panel: Panel) -> None:
    """The colour bar; a short name stands above it, a long one beside it."""
    bar = figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02, aspect=18)
    assert bar.solids is not None  # a bar of a mesh has them
    bar.solids.set(rasterized=False, edgecolor="face", linewidth=0.2)
    bar.outline.set_linewidth(0.4)
    bar.outline.set_edgecolor(_FRAME)
    bar.ax.tick_params(length=1.5, width=0.4, color=_FRAME, labelsize=6, labelfontfamily=list(FONTS), pad=1.5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    if len(panel.score) <= 10:
        bar.ax.set_title("", pad=4)
        _write(bar.ax.title, panel.score, size=6.5)
    else:
        bar.ax.yaxis.labelpad = 2
        _write(bar.ax.yaxis.label, panel.score, size=6.5)


def _edges(centres: Sequence[int]) -> list[float]:
    """Where cells end: half way between layers."""
    inner = [(a + b) / 2 for a, b in pairwise(centres)]
    return [centres[0] - 0.5, *inner, centres[-1] + 0.5]


def _frame(ax: Axes, *, sides: Sequence[str]) -> None:
    for side, spine in ax.spines.items():
        spine.set_visible(side in sides)
        spine.set_linewidth(0.4)
        spine.set_edgecolor(_FRAME)
    ax.xaxis.labelpad = ax.yaxis.labelpad = 2
    ax.tick_params(length=2, width=0.4, color=_FRAME, labelsize=6.5, labelfontfamily=list(FONTS), pad=2)


def _write(text: Text, words: str, *, size: float = 7, weight: str = "normal") -> None:
    """Puts words into a text of the figure: in fonts that have their letters, and never as a formula."""
    others, words = _with_fonts(words)
    text.set(
        text=words,
        fontfamily=[*FONTS, *others],
        fontsize=size,
        fontweight="normal" if others else weight,  # few of the others come in bold
        parse_math=False,
    )


@lru_cache(maxsize=4096)
def _with_fonts(words: str) -> tuple[tuple[str, ...], str]:
    """Families beyond `FONTS` that the words need, and the words with a box for each letter that no installed font has."""
    others: list[str] = []
    missing: list[str] = []
    for letter in dict.fromkeys(words):
        family = _family_with(letter)
        if family is None:
            missing.append(letter)
        elif family not in (*FONTS, *others):
            others.append(family)
    if missing:
        logger.warning("No installed font has %s; a box stands there. Install e.g. the Noto fonts.", " ".join(missing))
    return tuple(others), "".join("□" if letter in missing else letter for letter in words)


@lru_cache(maxsize=4096)
def _family_with(letter: str) -> str | None:
    """The first family that has a letter: of `FONTS`, of Noto, of all others by name."""
    upright = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal"
        and font.weight in (400, "normal", "regular")
        and not font.name.startswith("Last Resort")
    }
    order = [name for name in FONTS if name in upright]
    order += sorted(upright.keys() - set(FONTS), key=lambda name: (not name.startswith("Noto Sans"), name))
    return next((name for name in order if ord(letter) in _letters(upright[name])), None)


@lru_cache(maxsize=512)
def _letters(file: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(file).get_charmap())
