"""What does an edit do to the weights: in which layers, how strongly, and of what structure?

After a figure of the survey by Wang et al. (arXiv 2401.01286, sec. 5.1, Fig. 6). Its claim: ROME's and MEMIT's changes are
concentrated in a few columns of the value matrix, fine-tuning's are spread over all of it. It shows a picture per editor, each with
a scale of its own and no numbers; here all editors are on one scale, and structure is told in numbers.

Each fact is edited alone. Of every changed matrix: the relative Frobenius norm |dW| / |W|; the numerical rank; the stable rank
|dW|_F^2 / |dW|_2^2, which counts directions that matter; the share of |dW|_F^2 in the 1, 5 and 20 most changed neurons (columns of
a matrix that writes to the stream), beside what 20 of them would have if all changed alike (`even_20`). `usual` is the root of
E |dW k|^2 over usual keys k, divided by |dW|: how much of the change text in general would meet.

What the algebra of an editor says about its change stands in `expected` and is checked edit by edit (`as_expected`): for a single
fact ROME, R-ROME, MEMIT, PMET and EMMET change a matrix by rank one; AlphaEdit too, and only where usual keys have strength below
its threshold (so `usual` <= sqrt(threshold)); edits of knowledge neurons are zero off the neurons picked; MEND's rank is at most
the number of tokens read, LoRA's at most `r`, in attention alone; fine-tuning has full rank, within its bound; memories and texts
change nothing.

A rank of one and few hot columns are two things: a product of two vectors has as many hot columns as its key has large entries.
Adam's first step is the gradient's sign, so that fine-tuning of full rank can still have a stable rank near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from analyses.editing import edit_each, fitted_editors
from analyses.injection import interval
from workbench.charts import CellPlot, Chart, DotPlot
from workbench.cli_parts import planted_band
from workbench.edit_footprints import TOP, weight_footprint
from workbench.editors._values import ValueEditor
from workbench.editors.base import Editor
from workbench.edits import Change, Edit, LowRank
from workbench.facts import Fact, FactError, distinct_facts
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.store import Store

EXACT = 1e-6
"""A share or a bound may be missed by so much, for rounding to float32."""

STRUCTURE = ("relative", "rank", "full_rank", "stable_rank", *(f"share_{k}" for k in TOP), "even_20", "usual", "cosine")
"""Columns that are numbers of one matrix."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """One edit of one fact, for the checks."""

    editor: Editor
    """Who made it."""

    edit: Edit
    """What it is."""

    rows: pd.DataFrame
    """Its changed matrices, as in the table."""

    tokens: int
    """How many tokens of prompt and answer an editor reads."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What the algebra says about an editor's change of one fact."""

    says: str
    """In words."""

    holds: Callable[[Made], bool]
    """Whether an edit is so."""


def _rank_one(one: Made) -> bool:
    return bool((one.rows["rank"] == 1).all())


def _spares_usual_keys(one: Made) -> bool:
    bound = vars(one.editor)["threshold"] ** 0.5
    return _rank_one(one) and bool((one.rows["usual"] <= bound * (1 + EXACT)).all())


def _picked_only(one: Made) -> bool:
    most = int(vars(one.editor)["most"])
    k = next((k for k in TOP if k >= most), TOP[-1])
    return bool((one.rows[f"share_{k}"] >= 1 - EXACT).all())


def _full_rank_within_bound(one: Made) -> bool:
    bound = vars(one.editor)["norm_constraint"]
    largest = max(float(_dense(change).abs().max()) for change in one.edit.changes.values())
    return bool((one.rows["rank"] == one.rows["full_rank"]).all()) and (bound is None or largest <= bound)


def _rank_of_tokens(one: Made) -> bool:
    return bool((one.rows["rank"] <= one.tokens).all())


def _low_rank_attention(one: Made) -> bool:
    attention = one.rows["kind"].isin(("z", "attn_out")).all()
    return bool(attention and one.rows["rank"].mean() <= vars(one.editor)["r"])


def _nothing(one: Made) -> bool:
    return not one.edit.changes


_ONE = Structure(says="rank 1 in every matrix", holds=_rank_one)
_BESIDE = Structure(says="no weight changes", holds=_nothing)

EXPECTED: Mapping[str, Structure] = {
    **dict.fromkeys(("Rome", "RRome", "Memit", "Pmet", "Emmet"), _ONE),
    "AlphaEdit": Structure(says="rank 1, and usual keys spared: usual <= sqrt(threshold)", holds=_spares_usual_keys),
    "KnowledgeNeuronEdit": Structure(says="zero off the neurons picked", holds=_picked_only),
    "FineTune": Structure(says="full rank, no entry beyond its bound", holds=_full_rank_within_bound),
    "Mend": Structure(says="rank at most the number of tokens read", holds=_rank_of_tokens),
    "Lora": Structure(says="attention alone, rank at most r", holds=_low_rank_attention),
    "AdaLora": Structure(says="attention alone, mean rank at most r", holds=_low_rank_attention),
    **dict.fromkeys(("Wise", "Grace", "Ike", "InContext"), _BESIDE),
}
"""By editor. One that is not here is shown without an expectation."""


def weight_change(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    resamples: int = 2000,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Edits every fact alone by every editor and measures what changes.

    Args:
        editors: the editing methods, with the presets of this model.
        resamples: bootstrap resamples of the facts.
        seed: of the bootstrap.

    Returns:
        One row an editor, fact and changed matrix: `layer` (missing where an edit changes no weights: one row of zeros), `kind`
        (of the site that it acts on), `parameter`, `norm`, the columns of `STRUCTURE`, `expected`, `as_expected`. Extras:

        - `layers`: editor, fact, layer, relative: of all changed matrices of a layer together, 0 where none is changed
        - `structure`: editor, measure, value (mean over facts of the mean over matrices), low, high, n
        - `expectations`: editor, expected, as_expected (share of the edits), n

    Raises:
        FactError: no fact could be edited.
    """
    facts = distinct_facts(facts, to="edit")
    left_out: dict[str, str] = {}
    methods = fitted_editors(lm, editors)
    tables = []
    for name, fact, edit in edit_each(lm, methods, facts, left_out=left_out, store=store):
        rows = _matrices(lm, methods[name], edit)
        tokens = lm.encode([fact], targets=[fact.target_new or ""]).ids.shape[1]
        told = _expectation(name, Made(editor=methods[name], edit=edit, rows=rows, tokens=tokens))
        tables.append(rows.assign(editor=name, fact=fact.id, **told))
    if not tables:
        raise FactError(f"No fact could be edited. The first reason: {next(iter(left_out.values()), 'none')}")
    table = pd.concat(tables, ignore_index=True).astype({"layer": "Int64", "as_expected": "boolean"})
    band = planted_band(lm.name)
    run = manifest(
        "weight_change", model=lm.protocol, parameters={"editors": editors, "resamples": resamples, "seed": seed},
        facts=facts, left_out=left_out, planted=list(band) if band else None,
    )  # fmt: skip
    columns = [
        "editor",
        "fact",
        "layer",
        "kind",
        "parameter",
        "norm",
        "base_norm",
        *STRUCTURE,
        "expected",
        "as_expected",
    ]
    extras = {
        "layers": _by_layer(lm, table),
        "structure": _structure(table, resamples=resamples, seed=seed),
        "expectations": _expectations(table),
    }
    return Result(table=table[columns], run=run, extras=extras)


def chart(result: Result) -> Chart:
    """How much every editor changes every layer; how concentrated and of what rank the changes are."""
    layers, structure = result.extras["layers"], result.extras["structure"]
    means = layers.groupby(["editor", "layer"], sort=False)["relative"].mean().unstack()
    expected = result.extras["expectations"].to_dict("records")
    notes = {row["editor"]: f"expected: {row['expected']}; {_kept(row)}" for row in expected}
    band = result.run.get("planted")
    shares = structure[structure["measure"].str.startswith("share_")]
    ranks = structure[structure["measure"].isin(["rank", "stable_rank"])]
    names = {**{f"share_{k}": f"{k} most changed" for k in TOP}, "rank": "rank", "stable_rank": "stable rank"}
    dots = [
        rows.rename(columns={"editor": "label", "value": "x"}).assign(
            series=rows["measure"].map(names), note=rows["editor"].map(notes)
        )
        for rows in (shares, ranks)
    ]
    n = int(layers["fact"].nunique())
    return Chart(
        title="What edits do to the weights",
        plots=(
            CellPlot(
                values=np.log10(means.where(means > 0)), texts=means.map(lambda value: f"{value:.2g}" if value else ""),
                texts_are="|ΔW| / |W|", name="log10 |ΔW| / |W|", title="|ΔW| / |W| by layer, one scale for all editors",
                row_title="Editor",
                column_title="Layer (0-based)", shade=range(band[0], band[-1] + 1) if band else None,
            ),
            DotPlot(rows=dots[0], x_title="Share of |ΔW|² in the most changed neurons", title="Concentration"),
            DotPlot(rows=dots[1], x_title="Rank of the changed matrices", title="Rank"),
        ),
        caption=f"Means over {n} fact{'s' * (n > 1)}, each edited alone, with 95 % bootstrap intervals; layers count from 0. "
        + " ".join(f"{editor}: {note}." for editor, note in notes.items()),
    )  # fmt: skip


def summary(result: Result) -> str:
    """For every editor: where and how strongly it changes weights, of what structure, and whether that is what it should be."""
    layers, structure = result.extras["layers"], result.extras["structure"].set_index(["editor", "measure"])["value"]
    lines = ["Change of weights by edits of single facts, means over facts (layers count from 0):"]
    for row in result.extras["expectations"].to_dict("records"):
        means = layers[layers["editor"] == row["editor"]].groupby("layer")["relative"].mean()
        changed = ", ".join(f"{layer}: {value:.2g}" for layer, value in means.items() if value) or "none"
        of = structure.loc[row["editor"]].to_dict()
        told = f"|dW| / |W| in layers {changed}"
        if np.isfinite(of["stable_rank"]):
            told += (
                f"; rank {of['rank']:.1f} of {of['full_rank']:.0f}, stable rank {of['stable_rank']:.2f}; in the 20 most changed "
                f"neurons {of['share_20']:.2f} of |dW|^2 (evenly: {of['even_20']:.2f})"
            )
        lines.append(f"  {row['editor']}: {told}. Expected: {row['expected']}; {_kept(row)}")
    return "\n".join(lines)


# --- parts ---


def _matrices(lm: LM, editor: Editor, edit: Edit) -> pd.DataFrame:
    """The changed matrices of one edit, or one row of zeros."""
    if not edit.changes:
        empty = {
            "layer": pd.NA,
            "kind": "",
            "parameter": "",
            "norm": 0.0,
            "base_norm": np.nan,
            "relative": 0.0,
            "rank": 0,
        }
        nothing: pd.DataFrame = pd.DataFrame([{**dict.fromkeys(STRUCTURE, np.nan), **empty}])
        return nothing
    rows = weight_footprint(lm, edit).extras["matrices"]
    matrices = rows.to_dict("records")
    found: pd.DataFrame = rows.assign(
        full_rank=[min(lm.model.get_parameter(row["parameter"]).shape) for row in matrices],
        even_20=[min(1.0, max(TOP) / _neurons(lm, row)) for row in matrices],
        usual=[_usual(lm, editor, row["layer"], row["kind"], edit.changes[row["parameter"]]) for row in matrices],
    )
    return found


def _neurons(lm: LM, row: Mapping[Any, Any]) -> int:
    """How many neurons a matrix has: inputs of one that writes to the stream, outputs of any other."""
    weight, module = lm.model.get_parameter(row["parameter"]), lm.part(row["layer"], row["module"])
    outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
    return int(inputs if row["kind"] in ("mlp_out", "attn_out") else outputs)


def _usual(lm: LM, editor: Editor, layer: int, kind: str, change: Change) -> float:
    """Root of E |dW k|^2 over usual keys, over |dW|; NaN for an editor that knows no usual keys."""
    if kind != "mlp_out" or not isinstance(editor, ValueEditor) or not editor.covariance:
        return float("nan")
    moment = replace(editor, layers=(layer,)).moments(lm)[layer]
    delta = _dense(change).double().cpu()
    delta = delta if isinstance(lm.part(layer, lm.layout.down_proj), torch.nn.Linear) else delta.T
    return float(torch.einsum("om,mn,on->", delta, moment, delta).clamp(min=0).sqrt() / delta.norm())


def _dense(change: Change) -> torch.Tensor:
    return change.dense() if isinstance(change, LowRank) else change


def _expectation(name: str, one: Made) -> dict[str, Any]:
    """What was expected of an edit, and whether it is so."""
    structure = EXPECTED.get(name)
    if structure is None:
        return {"expected": "", "as_expected": pd.NA}
    return {"expected": structure.says, "as_expected": structure.holds(one)}


def _by_layer(lm: LM, table: pd.DataFrame) -> pd.DataFrame:
    """Of every edit and layer the relative norm of all changed matrices together."""
    squares = table.assign(new=table["norm"] ** 2, old=table["base_norm"] ** 2)
    sums = squares.dropna(subset="layer").groupby(["editor", "fact", "layer"], sort=False)[["new", "old"]].sum()
    edits = table[["editor", "fact"]].drop_duplicates()
    every = edits.merge(pd.DataFrame({"layer": pd.array(range(lm.n_layers), dtype="Int64")}), how="cross")
    merged = every.merge(sums.reset_index(), on=["editor", "fact", "layer"], how="left")
    relative = np.sqrt(merged["new"] / merged["old"]).fillna(0.0)
    found: pd.DataFrame = merged[["editor", "fact"]].assign(layer=merged["layer"].astype(int), relative=relative)
    return found


def _structure(table: pd.DataFrame, *, resamples: int, seed: int) -> pd.DataFrame:
    """Means over facts of the means over an edit's matrices."""
    rows = []
    for editor, own in table.groupby("editor", sort=False):
        for measure in STRUCTURE:
            values = own[measure].astype(float).groupby(own["fact"]).mean().to_numpy()
            there = values[np.isfinite(values)]
            low, high = interval(values, resamples=resamples, seed=seed)
            mean = float(there.mean()) if len(there) else np.nan
            rows.append({
                "editor": editor, "measure": measure, "value": mean, "low": low, "high": high, "n": len(there),
            })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _expectations(table: pd.DataFrame) -> pd.DataFrame:
    """By editor how many of its edits are as expected."""
    edits = table.drop_duplicates(["editor", "fact"])
    rows = [
        {
            "editor": editor,
            "expected": expected or "nothing known",
            "as_expected": _share(own["as_expected"]),
            "n": len(own),
        }
        for (editor, expected), own in edits.groupby(["editor", "expected"], sort=False)
    ]
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _share(kept: pd.Series) -> float:
    return float(kept.astype(float).mean()) if kept.notna().any() else np.nan


def _kept(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row["as_expected"]):
        return "not checked"
    return f"so in {round(row['as_expected'] * row['n'])} of {row['n']} edits"
