"""Figures for papers: matplotlib, all vector, sized for a column or a page, from the same numbers that `workbench.plots` shows.

A `PaperFigure` carries its protocol and puts it into the files it saves. Nothing here touches pyplot, so figures may be made and
saved in several threads.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from workbench import drawing, profiles
from workbench.drawing import Column, Panel
from workbench.export import figure_metadata
from workbench.results import Footprint, Result, ResultError
from workbench.sites import Role

__all__ = ["PaperFigure", "agreement", "average", "compare", "heads", "heatmap", "profile"]

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
    column: Column | None = None,
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
        kinds: several; none of both: all kinds that have a map. Side by side, or below each other in a column.
        fact: which fact; None for the only one.
        column: raw scores, or effects; None: effects where they are shares of a whole, else raw scores as ROME draws them.
        planted: layers in which a model is known to hold its facts; marked above the maps.
        shared: one scale for all maps.
        vmin: lower end of the colour scale; None: the corrupted run's score, or an effect of 0 (which is the middle of the scale
            where a method without a corrupted run finds effects of both signs).
        vmax: upper end; None: the best cell.
        size: None: a column for one map, a page for several.

    Raises:
        ResultError: no such fact or kind, or no map of it: it is of single heads or neurons, or of no token.
    """
    chosen = _chosen(kind, kinds, drawing.mapped_kinds(footprint))
    if fact is None and len(footprint.facts) == 1:
        fact = footprint.facts[0]
    drawn: Column = column or ("value" if str(footprint.run.get("unit", "")).startswith("share") else "score")
    panels = [drawing.panel(footprint, kind=each, fact=fact, column=drawn) for each in chosen]
    prompt = drawing.fact_row(footprint, fact).get("prompt", fact)
    return _maps(
        _scaled(panels, shared, vmin, vmax), run=footprint.run, title=f"{footprint.run.get('what', 'Map')}: {prompt}",
        planted=planted, size=size,
    )  # fmt: skip


def heads(
    footprint: Footprint,
    *,
    kind: str = "z",
    fact: str | None = None,
    token: Role | None = None,
    planted: range | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """The effects of a fact's attention heads: heads down, layers across (both 0-based).

    A cell is the head's largest token, or with `token` the mean over the tokens of that role. Other arguments as of `heatmap`.

    Raises:
        ResultError: the method looked at no single heads, or no token has this role.
    """
    panel = drawing.heads_panel(footprint, kind=kind, fact=fact, token=token).on(vmin, vmax)
    title = f"{footprint.run.get('what', 'Map')}: heads"
    return _maps([panel], run=footprint.run, title=title, planted=planted, size=size)


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
    panels = [drawing.average_panel(result, kind=each) for each in _chosen(kind, kinds, result.table["kind"].unique())]
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
    chosen = _chosen(kind, kinds, result.table["kind"].unique())
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
            styles = {role: (drawing.ROLE_COLORS[role]["light"], ()) for role in dict.fromkeys(table["role"])}
            _draw_lines(ax, table, by="role", styles=styles, planted=planted)
            _write(ax.title, drawing.KIND_WORDS.get(each, each), size=8)
            _write(ax.xaxis.label, drawing.layer_title(result, kind=each))
            if ax is axes[0] or not across:
                _write(ax.yaxis.label, drawing.curve_name(result))
        _legend(figure, axes[0], names=[drawing.ROLE_WORDS[role] for role in styles], columns=3 if width > 5 else 2)
        _settle(figure)
    return figure


def compare(
    footprints: Sequence[Footprint],
    *,
    kinds: Sequence[str] | None = None,
    token: Role | None = None,
    form: Literal["lines", "strips"] = "lines",
    planted: range | None = None,
    size: Size | None = None,
) -> PaperFigure:
    """Several methods by layer (0-based), each normalised fact by fact, as means over facts: see `profiles.layer_profiles`.

    Args:
        footprints: of one model, with at least one fact in common.
        kinds: which kinds of sites; None: all.
        token: the role of the tokens that count; None: the largest of all tokens.
        form: `lines`, methods in colours and kinds in dashes, with bands of 95 % (Student's t over facts; none for a single fact);
            or `strips`, a row of cells for each series, which stays readable for many.
        planted: layers in which a model is known to hold its facts; shaded, or marked above the strips.
        size: None: a column.

    Raises:
        ResultError: nothing to compare, other weights, no fact or no such kind in common, or one series twice.
    """
    run = profiles.comparison_manifest("Comparison", footprints, kinds=kinds, role=token)
    if form == "strips":
        panel = drawing.comparison_panel(footprints, kinds=kinds, token=token)
        return _maps([panel], run=run, title=panel.title, planted=planted, size=size)
    table = drawing.comparison(footprints, kinds=kinds, token=token)
    styles = {label: (colors["light"], dash) for label, (colors, dash) in drawing.series_styles(table).items()}
    columns = 2 if size == "page" or (isinstance(size, tuple) and size[0] > 5) else 1
    with _settings():
        width, height = _inches(size, n=1, one=1.7, extra=0.55 + 0.12 * -(-len(styles) // columns))
        figure = PaperFigure(run=run, title="Methods by layer", figsize=(width, height), layout="constrained")
        ax = figure.subplots()
        _draw_lines(ax, table, by="label", styles=styles, planted=planted)
        _write(ax.xaxis.label, drawing.comparison_layers(footprints, kinds=table["kind"].unique()))
        _write(ax.yaxis.label, drawing.comparison_name(table))
        _legend(figure, ax, names=list(styles), columns=columns)
        _settle(figure)
    return figure


def agreement(result: Result, *, measure: str = "spearman", size: Size | None = None) -> PaperFigure:
    """How well methods agree, every series against every other (`analyses.locator_agreement`); `*`: adjusted p by layers < 0.05.

    Args:
        result: the agreement.
        measure: `spearman`, `kendall`, `overlap` or `distance`.
        size: None: a column for up to 6 series, a page for more.

    Raises:
        ResultError: the table is of something else, or has no such measure.
    """
    panel, texts = drawing.agreement_panel(result, measure=measure)
    n, colors = len(panel.labels), LinearSegmentedColormap.from_list("agreement", panel.colors("light"))
    if panel.reverse:
        colors = colors.reversed()
    with _settings():
        width, height = _inches(size or ("column" if n <= 6 else "page"), n=1, one=max(0.8, 0.2 * n), extra=0.35)
        figure = PaperFigure(run=result.run, title=panel.title, figsize=(width, height), layout="constrained")
        ax, values = figure.subplots(), panel.values.to_numpy(dtype=float)
        mesh = ax.pcolormesh(
            range(n + 1), range(n + 1), values, cmap=colors, norm=Normalize(panel.low, panel.high),
            edgecolors="face", linewidth=0.2, rasterized=False,
        )  # fmt: skip
        for (row, column), words in np.ndenumerate(texts.to_numpy()):
            dark = np.isfinite(values[row, column]) and sum(colors(mesh.norm(values[row, column]))[:3]) < 1.5
            text = ax.text(column + 0.5, row + 0.5, "", ha="center", va="center", color="#ffffff" if dark else _INK)
            _write(text, words, size=min(6.5, 90 / n))
        ax.set_ylim(n, 0)
        ax.xaxis.tick_top()
        places = [i + 0.5 for i in range(n)]
        ax.set_xticks(places, [str(i + 1) for i in range(n)])
        ax.set_yticks(places, [_with_fonts(label)[1] for label in panel.labels])
        _frame(ax, sides=("left", "right", "top", "bottom"))
        ax.tick_params(length=0)
        for text, label in zip(ax.get_yticklabels(), panel.labels, strict=True):
            _write(text, label)
        _bar(figure, ax, mesh, panel.score)
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


def _chosen(kind: str | None, kinds: Sequence[str], there: Iterable[str]) -> list[str]:
    named = [kinds] if isinstance(kinds, str) else list(kinds)
    chosen = ([kind] if kind else named) or list(there)
    if not chosen:
        raise ResultError("No kind of this footprint has a map. Draw it with heads() or compare().")
    return chosen


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
    figure.set_dpi(300)  # letters' widths are rounded to dots: fewer dots make labels too short for their place
    engine.execute(figure)
    figure.set_layout_engine("none")


def _draw_map(figure: Figure, ax: Axes, panel: Panel, *, named: bool, planted: range | None) -> None:
    values, layers = panel.values.to_numpy(), [int(layer) for layer in panel.values.columns]
    planted = panel.marked(planted)
    colors = LinearSegmentedColormap.from_list(panel.kind, panel.colors("light"))
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
    labels = list(panel.labels) if named else []
    ax.set_yticklabels(
        [_with_fonts(label)[1] for label in labels]
    )  # what is drawn; the texts below only get their fonts
    for text, label, strong in zip(ax.get_yticklabels(), labels, panel.strong, strict=False):
        _write(text, label, weight="bold" if strong else "normal")
    _write(ax.title, panel.title, size=8)
    _write(ax.xaxis.label, panel.layer_title)
    if planted:
        _mark(figure, ax, planted, panel.title)
    _bar(figure, ax, mesh, panel.score)


def _mark(figure: Figure, ax: Axes, planted: range, title: str) -> None:
    """The planted band as a line above a map, below its title."""
    above = ax.get_xaxis_transform() + ScaledTranslation(0, 3 / 72, figure.dpi_scale_trans)
    ax.plot(
        [planted[0] - 0.45, planted[-1] + 0.45], [1, 1], transform=above, clip_on=False,
        color=_INK, linewidth=1, solid_capstyle="butt",
    )  # fmt: skip
    note = ax.annotate(
        "planted", ((planted[0] + planted[-1]) / 2, 1), xycoords=ax.get_xaxis_transform(), xytext=(0, 4.5),
        textcoords="offset points", ha="center", va="bottom", annotation_clip=False,
    )  # fmt: skip
    _write(note, "planted", size=6)
    ax.title.set_y(1.0)
    ax.set_title(ax.title.get_text(), pad=13)
    _write(ax.title, title, size=8)


def _draw_lines(
    ax: Axes,
    table: pd.DataFrame,
    *,
    by: str,
    styles: Mapping[str, tuple[str, tuple[float, ...]]],
    planted: range | None,
) -> None:
    """Lines over the layers with what lies between `low` and `high`, in the colours and dashes given."""
    if planted:
        ax.axvspan(planted[0] - 0.5, planted[-1] + 0.5, color="#ededed", linewidth=0, zorder=0)
    ax.axhline(0, color=_FRAME, linewidth=0.5, zorder=1)
    for name, (color, dash) in styles.items():
        line = table[table[by] == name]
        ax.fill_between(line["layer"], line["low"], line["high"], color=color, alpha=0.18, linewidth=0)
        ax.plot(
            line["layer"], line["value"], color=color, linewidth=1.1, marker="o", markersize=1.8,
            linestyle=(0, dash) if dash else "-",
        )  # fmt: skip
    layers = sorted(set(table["layer"]))
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.set_xticks(drawing.layer_ticks(layers))
    _frame(ax, sides=("left", "bottom"))
    ax.yaxis.set_major_locator(MaxNLocator(5))


def _legend(figure: Figure, ax: Axes, *, names: Sequence[str], columns: int) -> None:
    """The names of the lines of some axes, below the figure."""
    lines = [line for line in ax.get_lines() if line.get_marker() == "o"]
    legend = figure.legend(
        lines, names, loc="outside lower center", ncols=min(len(names), columns), frameon=False, fontsize=7,
        handlelength=2.6, columnspacing=1.2, labelspacing=0.25, borderaxespad=0,
    )  # fmt: skip
    for text in legend.get_texts():
        _write(text, text.get_text())


def _bar(figure: Figure, ax: Axes, mesh: ScalarMappable, score: str) -> None:
    """The colour bar; a short name stands above it, a long one beside it."""
    bar = figure.colorbar(mesh, ax=ax, fraction=0.05, pad=0.02, aspect=18)
    assert bar.solids is not None  # a bar of a mesh has them
    bar.solids.set(rasterized=False, edgecolor="face", linewidth=0.2)
    bar.outline.set_linewidth(0.4)
    bar.outline.set_edgecolor(_FRAME)
    bar.ax.tick_params(length=1.5, width=0.4, color=_FRAME, labelsize=6, labelfontfamily=list(FONTS), pad=1.5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    if len(score) <= 10:
        bar.ax.set_title("", pad=4)
        _write(bar.ax.title, score, size=6.5)
    else:
        bar.ax.yaxis.labelpad = 2
        tall = ax.get_position().height * figure.get_figheight()
        bar.ax.yaxis.label.set_linespacing(0.9)
        _write(bar.ax.yaxis.label, "\n".join(drawing.wrapped(score, int(18 * tall))), size=6.5)


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
    for letter in dict.fromkeys(words.replace("\n", "")):
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
