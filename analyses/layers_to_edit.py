"""Which layers of a model should each editor change? Two answers: where facts are traced to, and where edits turn out well.

ROME and MEMIT chose their layers by the first (arXiv 2202.05262, sec. 2; 2210.07229, sec. 4.2); Hase et al. 2023 (arXiv 2301.04213)
found that it says little about the second. So both are given, with what each costs against the other.

1. Trace: the mean indirect effect of MLP outputs, restored in a window of layers at the last subject token
   (`workbench.editors.recommending`), with 95 % bootstrap intervals over facts. Recommended are the neighbouring layers with the
   largest sum, as many as the editor changes.
2. Sweep: every fact is edited alone by every editor at every place, a window of as many neighbouring layers as the editor changes
   (one for ROME). Measures of ROME's evaluation (sec. 3.4): `efficacy` and `paraphrase`, the new answer is more probable than the
   old one after the prompt and its paraphrases; `neighborhood`, after prompts on other subjects their own answer is more probable
   than the new one; `specificity`, after these and after other relations of the subject the model says what it said before.
   `score` is the harmonic mean of the means of the first three over facts, as in the paper's Table 4. Recommended is the place of
   the largest score, the lower one of equals.

Where it departs: `contexts` limits the texts that the model writes before a prompt while an edit is looked for (ROME has 20), which
makes a sweep several times faster; 0 to `sweep_facts` facts say less than the papers' thousands. So the table tells at how many
places the score is within the best one's interval (`as_good`): a layer is a recommendation only as far as others are worse. The
files for EasyEdit have the recommended layers and the editor's own settings otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from analyses.answers import log_p
from analyses.average_trace import average
from analyses.editing import edit_each, fitted_editors
from workbench.charts import Chart, LinePlot
from workbench.cli_parts import planted_band
from workbench.easyedit import write_hparams
from workbench.editors._values import ValueEditor
from workbench.editors.base import Editor
from workbench.editors.recommending import recommend_layers
from workbench.edits import Edit, EditError
from workbench.facts import Fact, FactError, Probe, distinct_facts, spread
from workbench.hooks import run
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.store import Store

SCORED = ("efficacy", "paraphrase", "neighborhood")
"""Measures whose harmonic mean is the score."""

MEASURES = (*SCORED, "specificity")
"""Columns of the table, shares from 0 to 1; NaN where a fact has no such prompts."""


def layers_to_edit(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    sweep_facts: int = 5,
    contexts: int | None = 2,
    probes: int = 5,
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Traces facts, edits some of them at every place, and recommends layers for every editor.

    Args:
        editors: the editing methods, with the presets of this model but for the layers.
        sweep_facts: how many of the facts are edited at every place, spread over those given.
        contexts: at most so many texts before the prompt while an edit is looked for; none: as many as the editor has.
        probes: at most so many paraphrases, neighbors and other relations of a fact are scored.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.

    Returns:
        One row an editor, place and fact: editor, first and last (layers of the window), fact, and `MEASURES`. Extras:

        - `curve`: layer, value (mean indirect effect in probability), low, high, n (facts)
        - `places`: editor, first, last, `MEASURES` (means over facts), score, low, high, n
        - `recommended`: editor, by (`trace` or `sweep`), layers, score there, low, high, as_good (places within the interval of the
          best one), of (places), yaml (the file of EasyEdit; empty where EasyEdit has no such method). The sweep's score is that of
          each fact at the place which the others choose, so that no fact is scored at a place that it has chosen itself; NaN for
          a single fact.

    Raises:
        FactError: an editor has no layers to choose, no fact can be traced or edited, or a number is below its least.
    """
    facts = distinct_facts(facts, to="edit")
    for name, value, least in (("sweep_facts", sweep_facts, 1), ("contexts", contexts, 0), ("probes", probes, 1)):
        if value is not None and value < least:
            raise FactError(f"{name} is {value}, expected {least} or more.")
    methods = fitted_editors(lm, editors)
    widths = {name: _width(lm, editor, facts) for name, editor in methods.items()}
    if not methods:
        raise FactError("No editor was named. Name at least one, e.g. Rome.")
    traced = {n: recommend_layers(lm, facts, n=n) for n in sorted(set(widths.values()))}
    trace = next(iter(traced.values())).trace
    averaged = average(trace, known_only=False, resamples=resamples, seed=seed).table
    curve = averaged[averaged["token"] == "subject_last"][["layer", "value", "low", "high", "n"]]
    left_out = {f"trace: {fact}": why for fact, why in trace.run.get("left_out", {}).items()}
    table = _sweep(lm, methods, widths, spread(facts, sweep_facts), contexts, probes, left_out, store)
    if table.empty:
        raise FactError(f"No fact could be edited. The first reason: {next(iter(left_out.values()), 'none')}")
    places = _places(table, resamples=resamples, seed=seed)
    recommended = [
        {
            "editor": name, "by": by, "layers": layers, **_score_at(places, name, layers), **held,
            "yaml": _yaml(lm, methods[name], layers),
        }
        for name in dict.fromkeys(places["editor"])
        for by, layers, held in (
            ("trace", list(traced[widths[name]].layers), {}),
            ("sweep", _best(places, name), _chosen_by_others(table[table["editor"] == name], resamples=resamples, seed=seed)),
        )
    ]  # fmt: skip
    told = pd.DataFrame(recommended)
    told["layers"] = [", ".join(map(str, layers)) for layers in told["layers"]]
    band = planted_band(lm.name)
    run_ = manifest(
        "layers_to_edit", model=lm.protocol, facts=facts, left_out=left_out,
        parameters={
            "editors": editors, "sweep_facts": sweep_facts, "contexts": contexts, "probes": probes, "resamples": resamples,
            "seed": seed,
        },
        planted=list(band) if band else None,
    )  # fmt: skip
    return Result(
        table=table, run=run_, extras={"curve": curve.reset_index(drop=True), "places": places, "recommended": told}
    )


def write_recommended(result: Result, folder: Path | str, *, by: Literal["sweep", "trace"] = "sweep") -> list[Path]:
    """Writes the recommended layers as files of hyperparameters for EasyEdit, `EDITOR.yaml` each, and returns their paths.

    Editors that EasyEdit does not have are left out.

    Raises:
        EditError: it has none of them.
    """
    rows = result.extras["recommended"]
    rows = rows[(rows["by"] == by) & (rows["yaml"] != "")]
    if rows.empty:
        raise EditError("EasyEdit has none of these editors, so there is nothing to write. Sweep e.g. Rome or Memit.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for row in rows.to_dict("records"):
        path = folder / f"{row['editor']}.yaml"
        path.write_text(row["yaml"], encoding="utf-8")
        written.append(path)
    return written


def chart(result: Result) -> Chart:
    """The average trace by layer; and by place how well edits there turn out."""
    curve, places = result.extras["curve"], result.extras["places"]
    band = result.run.get("planted")
    shade = range(band[0], band[-1] + 1) if band else None
    traced = curve.rename(columns={"layer": "x", "value": "y"}).assign(series="MLP outputs at the last subject token")
    n = int(places["n"].max())
    told = []
    for editor, rows in result.extras["recommended"].groupby("editor", sort=False):
        ways = rows.groupby("layers", sort=False)["by"].agg(" and ".join)
        told.append(f"{editor} {' or '.join(f'{layers} (by {by})' for layers, by in ways.items())}")
    return Chart(
        title="Which layers to edit",
        plots=(
            LinePlot(rows=traced, y_title="Indirect effect in p", title="Average trace", shade=shade),
            *(
                LinePlot(
                    rows=places.rename(columns={"editor": "series", "last": "x", measure: "y"})[
                        ["series", "x", "y", *(("low", "high") if measure == "score" else ())]
                    ].dropna(subset="y"),
                    x_title="Layer (0-based), last of the editor's window", y_title="Share, 0 to 1", title=title, shade=shade,
                )
                for measure, title in (
                    ("score", "Score: harmonic mean of efficacy, paraphrases and neighborhood"), ("efficacy", "Efficacy"),
                    ("specificity", "Specificity"),
                )
                if places[measure].notna().any()
            ),
        ),
        caption=f"Above a causal trace of {int(curve['n'].max())} facts, below {n} facts edited alone at every place; 95 % "
        f"bootstrap intervals over facts, layers from 0. Recommended: {'; '.join(told)}.",
    )  # fmt: skip


def summary(result: Result) -> str:
    """For every editor the layers that the trace and the sweep recommend, and how edits there turn out."""
    rows = result.extras["recommended"]
    lines = ["Recommended layers (0-based), and the score of edits there [95 % interval]:"]
    for editor, own in rows.groupby("editor", sort=False):
        of = {row["by"]: row for row in own.to_dict("records")}
        told = [f"by {by} {row['layers']}: {_told(row)}" for by, row in of.items()]
        best = of["sweep"]
        lines.append(
            f"  {editor}: {'; '.join(told)}; {best['as_good']} of {best['of']} places are within the interval of the best"
        )
    curve = result.extras["curve"]
    top = max(curve.to_dict("records"), key=lambda row: row["value"])
    lines.append("The sweep's score is that of each fact at the place which the other facts choose.")
    lines.append(f"The average trace peaks at layer {top['layer']} with {_told(top)} (indirect effect in p).")
    return "\n".join(lines)


# --- parts ---


def _width(lm: LM, editor: Editor, facts: Sequence[Fact]) -> int:
    """How many layers an editor changes.

    Raises:
        FactError: it has no layers to choose.
    """
    if not hasattr(editor, "layers"):
        raise FactError(f"{type(editor).__name__} has no layers to choose. Leave it out.")
    if editor.layers is None and isinstance(editor, ValueEditor):
        return editor.n_layers(lm)
    layers = editor.layers or getattr(editor.resolved(lm, facts), "layers", None)
    return len(layers) if layers else lm.n_layers


def _sweep(
    lm: LM, methods: Mapping[str, Editor], widths: Mapping[str, int], facts: Sequence[Fact], contexts: int | None,
    probes: int, left_out: dict[str, str], store: Store | None,
) -> pd.DataFrame:  # fmt: skip
    """Every editor at every place."""
    places = {
        f"{name} at {first}": (name, first, replace(_quick(editor, contexts), layers=tuple(range(first, first + widths[name]))))
        for name, editor in methods.items()
        for first in range(lm.n_layers - widths[name] + 1)
    }  # fmt: skip
    before = {fact.id: _says(lm, _others(fact, probes)) for fact in facts}
    rows = []
    for label, fact, edit in edit_each(
        lm, {label: editor for label, (_, _, editor) in places.items()}, facts, left_out=left_out, store=store
    ):
        name, first, _ = places[label]
        place = {"editor": name, "first": first, "last": first + widths[name] - 1, "fact": fact.id}
        rows.append({**place, **_scored(lm, fact, edit, before[fact.id], probes)})
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _quick(editor: Editor, contexts: int | None) -> Any:
    """The editor with fewer texts before the prompt."""
    own = getattr(editor, "prefix_lengths", None)
    return editor if own is None or contexts is None else replace(editor, prefix_lengths=own[:contexts])  # type: ignore[call-arg]


def _scored(lm: LM, fact: Fact, edit: Edit, before: Sequence[int], probes: int) -> dict[str, float]:
    """The measures of one edit."""
    new, old = fact.target_new or "", fact.target_true
    neighbors = [probe for probe in fact.neighbors[:probes] if probe.target != new]
    asked: list[tuple[str, str, str, str]] = []
    if old:
        asked += [("efficacy", fact.text, new, old)]
        asked += [("paraphrase", text, new, old) for text in fact.paraphrases[:probes]]
    asked += [("neighborhood", probe.prompt, probe.target, new) for probe in neighbors]
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    with edit.on(lm):
        if asked:
            prompts = [prompt for _, prompt, _, _ in asked]
            scores = log_p(lm, [*prompts, *prompts], [row[2] for row in asked] + [row[3] for row in asked])
            for (measure, *_), wins in zip(asked, scores[: len(asked)] > scores[len(asked) :], strict=True):
                found[measure].append(float(wins))
        after = _says(lm, _others(fact, probes))
    found["specificity"] = [float(a == b) for a, b in zip(before, after, strict=True)]
    return {measure: float(np.mean(values)) if values else np.nan for measure, values in found.items()}


def _others(fact: Fact, probes: int) -> tuple[Probe, ...]:
    return (*fact.neighbors[:probes], *fact.locality[:probes])


def _says(lm: LM, probes: Sequence[Probe]) -> list[int]:
    """The most probable next token after each prompt."""
    if not probes:
        return []
    found: list[int] = run(lm, lm.encode([probe.prompt for probe in probes])).last_logits.argmax(-1).tolist()
    return found


def harmonic(values: np.ndarray) -> np.ndarray:
    """The harmonic mean along the last dimension, of those that are there; 0 where one of them is 0, NaN where none is there."""
    there = np.isfinite(values)
    parts = np.divide(1.0, values, out=np.full(values.shape, np.inf), where=there & (values > 0))
    total = np.where(there, parts, 0.0).sum(-1)
    count = there.sum(-1)
    found: np.ndarray = np.divide(count, total, out=np.full(np.shape(total), np.nan), where=count > 0)
    return found


def _places(table: pd.DataFrame, *, resamples: int, seed: int) -> pd.DataFrame:
    """By editor and place: means over facts, the score and its interval (facts are drawn, the score is that of their means)."""
    rows = []
    for (editor, first, last), own in table.groupby(["editor", "first", "last"], sort=False):
        values = own[list(SCORED)].to_numpy(dtype=float)
        low = high = np.nan
        if len(values) > 1:
            drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
            scores = harmonic(_mean(values[drawn], axis=1))
            low, high = np.nanquantile(scores, (0.025, 0.975)) if np.isfinite(scores).any() else (np.nan, np.nan)
        rows.append({
            "editor": editor, "first": first, "last": last,
            **{measure: float(_mean(own[measure].to_numpy(dtype=float), axis=0)) for measure in MEASURES},
            "score": float(harmonic(_mean(values, axis=0))), "low": float(low), "high": float(high), "n": len(own),
        })  # fmt: skip
    places: pd.DataFrame = pd.DataFrame(rows)
    return places


def _mean(values: np.ndarray, *, axis: int) -> np.ndarray:
    """The mean of the values that are there; NaN where none is."""
    there = np.isfinite(values)
    count = there.sum(axis)
    total = np.where(there, values, 0.0).sum(axis)
    found: np.ndarray = np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
    return found


def _best(places: pd.DataFrame, editor: str) -> list[int]:
    """The layers of the place with the largest score, the lower one of equals."""
    own = places[places["editor"] == editor]
    row = own.loc[own["score"].fillna(-1.0).idxmax()]
    return list(range(int(row["first"]), int(row["last"]) + 1))


def _chosen_by_others(table: pd.DataFrame, *, resamples: int, seed: int) -> dict[str, float]:
    """One editor's score and its interval, of each fact at the place where the other facts are edited best."""
    parts = []
    for fact in table["fact"].unique():
        others = table[table["fact"] != fact]
        if len(others):
            first = _best(_places(others, resamples=1, seed=seed), others["editor"].iloc[0])[0]
            parts.append(table[(table["fact"] == fact) & (table["first"] == first)])
    if not parts:
        return dict.fromkeys(("score", "low", "high"), np.nan)
    scored = _places(pd.concat(parts).assign(first=0, last=0), resamples=resamples, seed=seed).iloc[0]
    return {name: float(scored[name]) for name in ("score", "low", "high")}


def _score_at(places: pd.DataFrame, editor: str, layers: Sequence[int]) -> dict[str, Any]:
    """How edits of these layers turned out; NaN where none was made there."""
    own = places[places["editor"] == editor]
    here = own[own["first"] == layers[0]]
    best = own.loc[own["score"].fillna(-1.0).idxmax()]
    least = best["low"] if np.isfinite(best["low"]) else best["score"]
    of = {name: float(here[name].iloc[0]) if len(here) else np.nan for name in ("score", "low", "high")}
    return {**of, "as_good": int((own["score"] >= least).sum()), "of": len(own)}


def _yaml(lm: LM, editor: Editor, layers: Sequence[int]) -> str:
    """The editor at these layers as a file of EasyEdit; empty where EasyEdit has no such method."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return write_hparams(replace(editor, layers=tuple(layers)), lm, Path(folder) / "hparams.yaml").read_text(  # type: ignore[call-arg]
                encoding="utf-8"
            )
        except EditError:
            return ""


def _told(row: Mapping[Any, Any]) -> str:
    value = row["score"] if "score" in row else row["value"]
    ends = f" [{row['low']:.2f}, {row['high']:.2f}]" if np.isfinite(row["low"]) else ""
    return f"{value:.2f}{ends}" if np.isfinite(value) else "not known of a single fact"
