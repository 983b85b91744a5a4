"""Does an edit move a fact, or cover it? Causal traces of the same prompt before and after an edit, cell by cell.

Background: a trace (Meng et al. 2022, arXiv 2202.05262, sec. 2) finds where a fact comes from; ROME then writes another one there
(sec. 3). Hase et al. 2023 (arXiv 2301.04213) doubt that the two places have to do with each other. What nobody publishes is the map
of the edited model. Here every fact is edited alone, and traced three times with the same noise:

1. `before`: the model as it is, and the old answer (of a fact that has none, what this model says);
2. `after_new`: the edited model, and the new answer;
3. `after_old`: the edited model, and still the old answer.

Values are indirect effects in probability: what restoring one output (of a window of layers) at one token brings back. The
*difference* is `after_new` minus `before`, cell by cell. Per fact it says, in the extra table `moved`,

- `shift`: how far the profile over layers (the largest value over tokens, negative ones as 0, as shares) was carried, in layers
  (1-Wasserstein distance); `peak_before`, `peak_after`: its highest layers; `alike`: the correlation of the two maps;
- `edited_before`, `edited_after`: how much of the profile is in the layers that the edit changed. The new fact *moved* to the edit
  where this rises; an edit into layers which already carried the old fact leaves it where it was;
- `old_left`: the largest effect of the old answer in the edited model, over that before. Towards 1 the old fact is *covered*: its
  parts still bring it back wherever the edit's key is not met; towards 0 it cannot be brought back by restoring one place.

Where this departs from the trace: roles average over the tokens of a role, and tokens are counted from the prompt's end, so that an
editor that puts text before the prompt is compared on the prompt's own tokens. A window smears an effect over its layers, in all
three maps alike. The noise's scale is that of the unedited model. An edited model's maps are stored under the edit's own key, since
memories and texts before the prompt leave the weights, and so their hash, as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd

from analyses.editing import edit_each, fitted_editors
from analyses.injection import interval
from analyses.located_vs_edited import changed_layers, compare, masses
from workbench import zoo
from workbench.charts import CellPlot, Chart
from workbench.checks import self_checks
from workbench.cli_parts import planted_band
from workbench.edits import Edit, edits_on
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts
from workbench.hooks import run as run_model
from workbench.locators import Locator, locate
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.tracing import find_answer
from workbench.models import LM
from workbench.results import Footprint, Result, manifest
from workbench.sites import TOKEN_ROLES
from workbench.store import Store

RUNS = {
    "before": "before, old answer",
    "after_new": "after, new answer",
    "difference": "difference",
    "after_old": "after, old answer",
}
"""The maps, and what is above them."""


def trace_before_after(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "FineTune"),
    kind: Literal["mlp_out", "attn_out", "resid_post"] = "mlp_out",
    width: int | None = None,
    samples: int = 10,
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Traces every fact before and after its edit.

    Args:
        editors: the editing methods, with the presets of this model.
        kind: which outputs are restored.
        width: how many layers of MLP or attention outputs are restored together; none: as many as fit the model's depth.
        samples: noise samples of every cell.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.

    Returns:
        One row a fact, editor, run (`before`, `after_new`, `after_old`, `difference`) and cell: kind, layer, token (role), position
        (from the prompt's end: -1 is its last token), text, value. Extras:

        - `moved`: one row a fact and editor, see the module; and total_before, total_new, total_old: clean minus corrupted score
        - `means`: editor, measure, value (mean over facts), low, high, n: of the numbers in `moved`
        - `roles`: editor, run, token, layer, value (mean over a fact's tokens of the role, then over facts), n

    Raises:
        FactError: no fact could be edited and traced.
    """
    facts = distinct_facts(facts, to="edit and trace")
    left_out: dict[str, str] = {}
    options = {} if width is None else {"window": width}
    known = zoo.load_facts(lm.name) if lm.name in zoo.NAMES else facts
    locator = CausalTrace.fitted(lm, kinds=(kind,), samples=samples, **options).resolved(lm, known)
    tables, moved = [], []
    for editor, fact, edit in edit_each(lm, fitted_editors(lm, editors), facts, left_out=left_out, store=store):
        try:
            old, new = _answers(lm, fact)
            maps = {
                "before": locate(locator, lm, [old], store=store),
                "after_new": trace_edited(lm, locator, new, edit, store=store),
                "after_old": trace_edited(lm, locator, old, edit, store=store),
            }
        except InputError as error:
            left_out[f"{editor}: {fact.id}"] = str(error)
            continue
        cells = _cells(maps)
        tables.append(cells.assign(fact=fact.id, editor=editor, kind=kind))
        moved.append({"fact": fact.id, "editor": editor, **_moved(lm, maps, cells, edit)})
    if not moved:
        raise FactError(
            f"No fact could be edited and traced. The first reason: {next(iter(left_out.values()), 'none')}"
        )
    table = pd.concat(tables, ignore_index=True)
    told = pd.DataFrame(moved)
    by_fact = table.groupby(["editor", "run", "token", "layer", "fact"], sort=False)["value"].mean()
    roles = by_fact.groupby(["editor", "run", "token", "layer"], sort=False).agg(value="mean", n="count").reset_index()
    band = planted_band(lm.name)
    run = manifest(
        "trace_before_after", model=lm.protocol, facts=facts, left_out=left_out,
        parameters={
            "editors": editors, "kind": kind, "width": width, "samples": samples, "resamples": resamples, "seed": seed,
        },
        trace=repr(locator), unit="indirect effect in p", planted=list(band) if band else None,
    )  # fmt: skip
    columns = ["fact", "editor", "run", "kind", "layer", "token", "position", "text", "value"]
    extras = {"moved": told, "means": _means(told, resamples=resamples, seed=seed), "roles": roles}
    return Result(table=table[columns], run=run, extras=extras)


def trace_edited(lm: LM, locator: Locator, fact: Fact, edit: Edit, *, store: Store | None = None) -> Footprint:
    """A locator's map of the edited model.

    It is stored under the key of the edit, never under the weights alone: what stands beside them does not change their hash. A
    fact without `target_true` is traced for what the edited model says.

    Raises:
        InputError: the edit does not belong to this model as it is now, or the locator cannot take the fact.
    """
    below = [one.key for one in edits_on(lm)]
    parameters = {"locator": repr(locator), "edit": edit.key, "on": below}
    asked = manifest(
        f"{type(locator).__name__} of an edited model", model=lm.protocol, parameters=parameters, facts=[fact]
    )
    found = store.find(asked, Footprint) if store else None
    if found is not None:
        edit.check(lm)
        return found
    if edit.sides:
        self_checks(lm)  # of the model itself: what stands beside a module may do without the sums that are checked
    with edit.on(lm):
        found = locate(locator, lm, [fact])
    found = replace(found, run={**found.run, **asked})
    if store:
        store.save(found)
    return found


def chart(result: Result) -> Chart:
    """A row of maps for every editor: before, after, the difference, and what is left of the old answer; means over facts."""
    roles = result.extras["roles"]
    n = int(result.extras["moved"]["fact"].nunique())
    plots = tuple(
        _map(own[own["run"] == run], result, index="token", title=f"{editor}: {title}", signed=run == "difference")
        for editor, own in roles.groupby("editor", sort=False)
        for run, title in RUNS.items()
    )
    return Chart(title="Traces before and after an edit", plots=plots, columns=2, caption=_caption(result, n))


def fact_chart(result: Result, *, fact: str) -> Chart:
    """The same for the tokens of one fact.

    Raises:
        FactError: the result has no such fact.
    """
    rows = result.table[result.table["fact"] == fact]
    if rows.empty:
        raise FactError(f"There is no fact {fact!r}. Take one of {', '.join(result.table['fact'].unique()[:5])}.")
    plots = tuple(
        _map(own[own["run"] == run], result, index="position", title=f"{editor}: {title}", signed=run == "difference")
        for editor, own in rows.groupby("editor", sort=False)
        for run, title in RUNS.items()
    )
    return Chart(title=f"Before and after an edit: {fact}", plots=plots, columns=2, caption=_caption(result, 1))


def summary(result: Result) -> str:
    """For every editor: how far the fact moved, into the edited layers or not, and how much of the old one can be brought back."""
    means = result.extras["means"].set_index(["editor", "measure"])
    lines = [
        f"Causal traces of {result.run['parameters']['kind']} before and after an edit, means over facts [95 % interval]:"
    ]
    for editor in dict.fromkeys(means.index.get_level_values("editor")):
        of = {str(name): _told(row) for name, row in means.loc[editor].iterrows()}
        lines.append(
            f"  {editor}: the profile is carried {of['shift']} layers, the maps correlate {of['alike']}; in the edited layers "
            f"{of['edited_before']} of it before, {of['edited_after']} after; of the old answer's largest effect "
            f"{of['old_left']} is left"
        )
    return "\n".join([*lines, "Layers count from 0; a window of restored layers smears what it finds."])


# --- parts ---


def _answers(lm: LM, fact: Fact) -> tuple[Fact, Fact]:
    """The fact with its old answer and with its new one; they differ in nothing that a trace of `p` sees but the answer.

    A fact without an answer gets the one that the model gives now: left open, the edited model would be asked for its own.

    Raises:
        FactError: the model's answer, written after the prompt, is another token.
    """
    if not fact.target_true:
        answer = find_answer(lm, fact, run_model(lm, lm.encode([fact])))
        if not answer.text or tuple(lm.target_ids(fact.text, answer.text)) != answer.ids:
            raise FactError(
                f"The model goes on with {lm.word(answer.ids[0])!r} after {fact.text!r}, expected a word after a space. "
                "Give the fact a target_true."
            )
        fact = replace(fact, target_true=answer.text)
    return fact, replace(fact, target_true=fact.target_new or "", target_new=fact.target_true)


def _cells(maps: dict[str, Footprint]) -> pd.DataFrame:
    """All maps, cell by cell, by the tokens that they share, counted from the prompt's end; and the difference."""
    parts = []
    for run, footprint in maps.items():
        rows = footprint.table[["layer", "token", "position", "text", "value"]]
        parts.append(rows.assign(run=run, position=rows["position"] - rows["position"].max() - 1))
    shortest = max(part["position"].min() for part in parts)
    names = parts[0].set_index(["layer", "position"])[["token", "text"]]
    parts = [part[part["position"] >= shortest].drop(columns=["token", "text"]) for part in parts]
    values = {part["run"].iloc[0]: part.set_index(["layer", "position"])["value"] for part in parts}
    difference = (values["after_new"] - values["before"]).reset_index().assign(run="difference")
    cells: pd.DataFrame = pd.concat([*parts, difference], ignore_index=True).join(names, on=["layer", "position"])
    return cells


def _moved(lm: LM, maps: dict[str, Footprint], cells: pd.DataFrame, edit: Edit) -> dict[str, object]:
    """What the maps of one fact say; see the module."""
    largest = cells.groupby(["run", "layer"])["value"].max().unstack()
    before, after = (masses(largest.loc[run].to_numpy()) for run in ("before", "after_new"))
    grids = {run: own.set_index(["position", "layer"])["value"].sort_index() for run, own in cells.groupby("run")}
    edited = [layer for layer in changed_layers(lm, edit) if layer in largest.columns]
    totals = {run: float(one.extras["facts"]["total_effect"].iloc[0]) for run, one in maps.items()}
    top = float(grids["before"].max())
    return {
        "shift": float(compare(before, after)["earth_mover"]),
        "peak_before": int(largest.loc["before"].to_numpy().argmax()),
        "peak_after": int(largest.loc["after_new"].to_numpy().argmax()),
        "alike": float(np.corrcoef(grids["before"], grids["after_new"])[0, 1]),
        "edited_before": float(before[edited].sum()) if edited else np.nan,
        "edited_after": float(after[edited].sum()) if edited else np.nan,
        "old_left": max(float(grids["after_old"].max()), 0.0) / top if top > 0 else np.nan,
        "total_before": totals["before"], "total_new": totals["after_new"], "total_old": totals["after_old"],
        "edited_layers": ", ".join(map(str, sorted(edited))),
    }  # fmt: skip


def _means(moved: pd.DataFrame, *, resamples: int, seed: int) -> pd.DataFrame:
    """Means over facts of the numbers, with their intervals."""
    rows = []
    for editor, own in moved.groupby("editor", sort=False):
        for measure in own.columns.drop(["fact", "editor", "edited_layers"]):
            values = own[measure].to_numpy(dtype=float)
            low, high = interval(values, resamples=resamples, seed=seed)
            there = values[np.isfinite(values)]
            mean = float(there.mean()) if len(there) else np.nan
            rows.append({
                "editor": editor, "measure": measure, "value": mean, "low": low, "high": high, "n": len(there),
            })  # fmt: skip
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def _map(rows: pd.DataFrame, result: Result, *, index: str, title: str, signed: bool) -> CellPlot:
    """One map: roles or tokens down, layers across; maps of a result share one scale, differences another."""
    values = rows.pivot(index=index, columns="layer", values="value")
    if index == "token":
        values = values.loc[[role for role in TOKEN_ROLES if role in values.index]]
    else:
        texts = rows.drop_duplicates("position").set_index("position")["text"]
        values.index = pd.Index([f"{position} {texts[position]}" for position in values.index])
    shown = result.extras["roles"] if index == "token" else result.table[result.table["fact"] == rows["fact"].iloc[0]]
    same = shown.loc[(shown["run"] == "difference") == signed, "value"]
    most = float(same.abs().max()) or 1.0
    band = result.run.get("planted")
    return CellPlot(
        values=values, name=f"{'change of ' * signed}{result.run['unit']}", title=title,
        row_title="Token" if index == "token" else "Token, from the prompt's end", column_title="Layer (0-based)",
        low=-most if signed else min(0.0, float(same.min())), high=most, signed=signed,
        shade=range(band[0], band[-1] + 1) if band else None,
    )  # fmt: skip


def _caption(result: Result, n: int) -> str:
    edited = result.extras["moved"].groupby("editor", sort=False)["edited_layers"].unique()
    told = "; ".join(f"{editor} {' or '.join(layers) or 'none'}" for editor, layers in edited.items())
    return (
        f"{'Means over ' if n > 1 else ''}{n} fact{'s' * (n > 1)}; layers count from 0. Colours: {result.run['unit']} of restored "
        f"{result.run['parameters']['kind']}. Layers changed by the edits: {told}."
    )


def _told(row: pd.Series) -> str:
    ends = f" [{row['low']:.2f}, {row['high']:.2f}]" if np.isfinite(row["low"]) else ""
    return f"{row['value']:.2f}{ends}"
