"""Can one tell from weights alone that a fact was edited: whether, how, at which layer, which fact, and can it be undone?

Youssef et al. 2025 ("Tracing and Reversing (Rank-One Model) Edits", arXiv 2505.20819): the rows of a rank-one update are scaled
copies of one vector, so that rows of the edited matrix grow alike, which tells the layer without the original weights; the edited
object is inferred from the weights in up to 99 % of cases, and dropping the largest singular components of the edited matrix (a
bottom-rank approximation) undoes up to 94 % of edits (GPT2-XL, GPT-J, Llama-3).

Protocol. Every fact is edited alone by every editor. Then only weights are known, and the facts given as suspects:

1. With the original weights: which matrices changed, at which layers, and of which kind: the rank of the change above what rounding
   leaves. The top singular component of the lowest changed matrix has a key side and a value side. The suspect whose key is most
   parallel to the one is named; the other is read in the vocabulary. Also, the suspect whose predictions moved most.
2. Without: by layer the mean |cosine| of the down projection's rows, and its first singular value over its second; the layer that
   stands out most from the others is named.
3. Undo: the change without its top singular component; and the matrix without its own top ones, in the layers that were changed
   and, which alone needs no original, in the layer named by cosines. A fact is restored where the model says again what it said.

Departures. The paper infers relation and object with trained decoders; here nothing is trained. An editor
that spreads over several layers counts as found if one of them is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from analyses.editing import edit_each, fitted_editors
from analyses.intervals import means_by
from workbench.charts import Chart, DotPlot, LinePlot
from workbench.editors._values import down_path, down_weight
from workbench.edits import Edit, changed
from workbench.errors import InputError
from workbench.facts import Fact, distinct_facts
from workbench.hooks import run
from workbench.metrics import lens_logits
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.sites import Site
from workbench.store import Store

FEW = 0.25
"""A change of at most this part of its full rank is of low rank."""

SCORES = ("cosine", "ratio")
"""What a matrix is told edited by without a reference: `row_cosine`, and the first singular value over the second."""

QUESTIONS = {
    "kind": "kind of change (original known)",
    "layer": "layers (original known)",
    "subject_by_key": "subject, by its key",
    "object_by_value": "object, in the vocabulary",
    "fact_by_behaviour": "fact, by what moved",
    "layer_by_cosine": "layer, by cosines of rows",
    "layer_by_ratio": "layer, by singular values",
    "undone": "undone (original known)",
    "undone_in_place": "undone in the changed layers",
    "undone_where_named": "undone in the layer named",
}
"""By measure, what is asked; in the order of the figure."""

PUBLISHED = pd.DataFrame(
    [
        ("object, inferred from the edited weights", 0.99),
        ("undone without the original weights", 0.94),
    ],
    columns=["question", "value"],
)
"""The best of arXiv 2505.20819, second version; GPT2-XL, GPT-J and Llama-3, rank-one edits."""


def forensics(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("FineTune", "Rome", "Memit", "AlphaEdit"),
    dropped: tuple[int, ...] = (1, 2, 5),
    others: int = 20,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Edits every fact alone by every editor, and examines the weights.

    Args:
        lm: the model.
        facts: with `target_new`; all of them are the suspects.
        editors: which; those that leave the weights alone leave no trace in them.
        dropped: how many singular components of the edited matrix are dropped where the original is not known; each is tried.
        others: how many other facts an undoing is asked whether it leaves them as they were; spread over those given.
        seed: of the intervals.
        store: where edits are kept and looked for.

    Returns:
        One row an editor, fact and measure: `editor`, `fact`, `measure`, `components` (dropped, where that is asked), `value` (0 or
        1, or a share). Measures are those of `QUESTIONS`; `took`, whether the edited model says the new answer; and `others...`,
        the share of the other facts that an undoing leaves as they were. Undoing is asked only of edits that took. Extras:

        - `means`: over facts, with 95 % bootstrap intervals; `published`
        - `matrices`: a row a changed matrix: `relative`, `rank`, `kind`, `first` (share of |dW|^2 in its top component)
        - `layers`: by editor, fact and layer (0-based) `cosine` and `ratio`; editor `unedited` is the model itself
        - `named`: what the examination said: `kind`, `layers`, `subject`, `object`

        The manifest's `chance` has the share of right answers by guessing: `subject`, `fact`, and by editor `layer`, the mean
        share of the layers that its edits change, since any of these counts as found.

    Raises:
        InputError: no fact could be edited by any editor, or all edits stand beside the weights.
    """
    suspects = Suspects.of(lm, distinct_facts(facts, to="examine"))
    own = [score_layer(down_weight(lm, layer)) for layer in range(lm.n_layers)]
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    guessed: dict[str, list[float]] = {}
    matrices, layers = [], [pd.DataFrame(own).assign(editor="unedited", fact="", layer=range(lm.n_layers))]
    named = []
    for label, fact, edit in edit_each(lm, fitted_editors(lm, editors), facts, left_out=left_out, store=store):
        who = {"editor": label, "fact": fact.id}
        if not edit.changes:
            left_out[f"{label}: {fact.id}"] = "The edit stands beside the weights, so that these tell nothing of it."
            continue
        weights = {name: changed(lm.model.get_parameter(name), [change]) for name, change in edit.changes.items()}
        found = examine(lm, weights, suspects, own=own)
        rows += [{**who, **row} for row in _right(lm, found, fact, edit, suspects)]
        rows += [{**who, **row} for row in _undone(lm, found, fact, edit, suspects, dropped=dropped, others=others)]
        guessed.setdefault(label, []).append(sum(layer >= 0 for layer in _layers(lm, edit)) / lm.n_layers)
        matrices.append(found.matrices.assign(**who))
        layers.append(found.layers.assign(**who))
        named.append(
            {**who, "kind": found.kind, "layers": found.changed, "subject": found.subject, "object": found.object}
        )
    if not rows:
        raise InputError(f"No edit could be examined. The first: {next(iter(left_out.values()), 'none was given')}")
    table = pd.DataFrame(rows)
    table["components"] = table["components"].astype("Int64")
    keys = ["editor", "measure", "components"]
    means = means_by(table.assign(components=table["components"].fillna(0)), keys, seed=seed)
    chance = {
        "layer": {label: float(np.mean(shares)) for label, shares in guessed.items()},
        "subject": 1 / len({fact.subject for fact in suspects.facts}),
        "fact": 1 / len(suspects.facts),
    }
    run_ = manifest(
        "forensics", model=lm.protocol, facts=facts, left_out=left_out, chance=chance,
        parameters={"editors": list(editors), "dropped": list(dropped), "others": others, "seed": seed},
    )  # fmt: skip
    extras = {
        "means": means, "matrices": pd.concat(matrices, ignore_index=True), "layers": pd.concat(layers, ignore_index=True),
        "named": pd.DataFrame(named), "published": PUBLISHED,
    }  # fmt: skip
    return Result(table=table, run=run_, extras=extras)


# --- the examination: base and edited weights, nothing of the edit ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Suspects:
    """Facts that may have been edited, and what the unedited model makes of them."""

    facts: tuple[Fact, ...]
    """Which."""

    keys: Mapping[int, Float[Tensor, "fact d_mlp"]]
    """By layer, the key at the last token of each subject."""

    log_p: Float[Tensor, "fact d_vocab"]
    """What follows each prompt."""

    @classmethod
    def of(cls, lm: LM, facts: Sequence[Fact]) -> Suspects:
        """Of a model without the edit."""
        sites = [Site(layer=layer, kind="mlp_post", token="subject_last") for layer in range(lm.n_layers)]
        acts = run(lm, lm.encode(list(facts)), read=sites)
        keys = {site.layer: acts[site].double().cpu() for site in sites}
        return cls(facts=tuple(facts), keys=keys, log_p=acts.last_logits.double().log_softmax(-1).cpu())

    def index(self, fact: Fact) -> int:
        """A fact's place."""
        return [one.id for one in self.facts].index(fact.id)


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What weights tell."""

    kind: str
    """none, rank one, low rank, or dense: of the change that has the largest rank."""

    changed: list[int]
    """The layers whose weights differ (-1: outside of the blocks)."""

    matrices: pd.DataFrame
    """One row a changed tensor; see `forensics`."""

    tops: Mapping[str, tuple[Tensor, Tensor]]
    """By changed matrix its top singular component: rows (times the singular value) and columns."""

    layers: pd.DataFrame
    """One row a layer: what tells an edit without a reference, of the down projection."""

    by_score: Mapping[str, int]
    """By score, the layer that stands out most."""

    subject: str
    """The subject whose key is most parallel to the change's; empty where no down projection changed."""

    object: str
    """The token that the change's value side promotes most, turned to where that key goes."""

    said: Float[Tensor, "fact d_vocab"]
    """Log-probabilities of what follows the suspects' prompts in the edited model."""

    moved: Float[Tensor, " fact"]
    """KL(before || after) of these, in nats."""


def examine(
    lm: LM, weights: Mapping[str, Tensor], suspects: Suspects, *, own: Sequence[dict[str, float]] | None = None
) -> Finding:
    """What base and edited weights tell of an edit.

    Args:
        lm: the base model.
        weights: the edited model's parameters by name; those that are missing are the base's.
        suspects: facts that may have been edited.
        own: `score_layer` of the base's layers, where it is known already.
    """
    rows, tops, deltas = [], {}, {}
    for name, weight in weights.items():
        base = lm.model.get_parameter(name).detach()
        if torch.equal(base, weight):
            continue
        delta = weight.detach().double().cpu() - base.double().cpu()
        row, top = _change(lm, name, base, delta, noise=max(map(rounding, (base, weight))) if base.ndim == 2 else 0.0)
        rows.append(row)
        deltas[name] = weight.detach() - base
        if top is not None:
            tops[name] = top
    columns = ["parameter", "layer", "relative", "rank", "first", "kind"]
    matrices = pd.DataFrame(rows, columns=columns).sort_values("layer", kind="stable", ignore_index=True)
    scores = []
    for layer in range(lm.n_layers):
        name = f"{down_path(lm, layer)}.weight"
        if name in deltas:
            scores.append(score_layer(_from_keys(lm, layer, weights[name])))
        else:
            scores.append(own[layer] if own is not None else score_layer(down_weight(lm, layer)))
    layers = pd.DataFrame(scores).assign(layer=range(lm.n_layers))
    ranks = {"rank one": 1, "low rank": 2, "dense": 3}
    kind = max(matrices["kind"], key=lambda kind: ranks[kind], default="none")
    subject, object_ = _named(lm, matrices, tops, suspects)
    said = suspects.log_p
    if deltas:
        with Edit(base=lm.weight_hash, changes=deltas).on(lm):
            said = run(lm, lm.encode(list(suspects.facts))).last_logits.double().log_softmax(-1).cpu()
    moved = (suspects.log_p.exp() * (suspects.log_p - said)).sum(-1)
    return Finding(
        kind=kind, changed=sorted(set(matrices["layer"])), matrices=matrices, tops=tops, layers=layers,
        by_score={score: stands_out(layers[score].to_numpy(float)) for score in SCORES}, subject=subject, object=object_,
        said=said, moved=moved,
    )  # fmt: skip


def score_layer(weight: Float[Tensor, "d_model d_mlp"]) -> dict[str, float]:
    """What tells a rank-one edit from the matrix alone (arXiv 2505.20819): `cosine` and `ratio`, see `SCORES`."""
    weight = weight.detach().double().cpu()
    values = torch.linalg.eigvalsh(weight @ weight.T).clamp(min=0).sqrt()
    ratio = float(values[-1] / values[-2]) if len(values) > 1 and float(values[-2]) > 0 else float("inf")
    return {"cosine": row_cosine(weight), "ratio": ratio}


def row_cosine(weight: Float[Tensor, "row column"]) -> float:
    """The mean |cosine| of all pairs of different rows."""
    unit = weight / weight.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    n = len(unit)
    return float(((unit @ unit.T).abs().sum() - unit.norm(dim=1).square().sum()) / (n * (n - 1)))


def stands_out(values: Float[np.ndarray, " layer"]) -> int:
    """The layer that lies highest above the others: the largest distance to the median of the rest, in their median deviations."""
    found = []
    for layer, value in enumerate(values):
        rest = np.delete(values, layer)
        middle = np.median(rest)
        spread = max(float(np.median(np.abs(rest - middle))), 1e-12)
        found.append((value - middle) / spread)
    return int(np.argmax(found))


def rounding(weight: Float[Tensor, "row column"]) -> float:
    """Above any singular value that rounding a matrix to its dtype leaves, as a rule: eps times its longest row and column.

    Errors are at most eps / 2 of each number, and the spectral norm of independent ones is about the longest row's norm plus the
    longest column's, whatever the numbers' sizes (Bandeira and van Handel 2016, arXiv 1408.6185).
    """
    weight = weight.detach().cpu()
    squares = weight.double().square()
    return torch.finfo(weight.dtype).eps * float(squares.sum(0).max().sqrt() + squares.sum(1).max().sqrt())


def kind_of_rank(rank: int, full: int) -> str:
    """The name of a change of this rank."""
    return "rank one" if rank <= 1 else "low rank" if rank <= FEW * full else "dense"


def _change(
    lm: LM, name: str, base: Tensor, delta: Tensor, *, noise: float
) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
    """What is told of one changed tensor, and its top singular component."""
    found = re.match(rf"{re.escape(lm.layout.blocks)}\.(\d+)\.", name)
    row = {
        "parameter": name,
        "layer": int(found[1]) if found else -1,
        "relative": float(delta.norm() / base.double().norm().clamp(min=1e-30)),
    }
    if delta.ndim != 2:
        return {**row, "rank": min(delta.shape, default=1), "first": float("nan"), "kind": "dense"}, None
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    rank = int((values > noise).sum())
    first = float(values[0] ** 2 / (values**2).sum())
    return {**row, "rank": rank, "first": first, "kind": kind_of_rank(rank, len(values))}, (u[:, 0] * values[0], v[0])


def _named(
    lm: LM, matrices: pd.DataFrame, tops: Mapping[str, tuple[Tensor, Tensor]], suspects: Suspects
) -> tuple[str, str]:
    """The subject and the object that the lowest changed down projection tells of; its keys are those of the base."""
    down = {f"{down_path(lm, layer)}.weight": layer for layer in range(lm.n_layers)}
    name = next((name for name in matrices["parameter"] if name in down and name in tops), None)
    if name is None:
        return "", ""
    value, key = tops[name] if isinstance(lm.part(down[name], lm.layout.down_proj), nn.Linear) else tops[name][::-1]
    keys = suspects.keys[down[name]]
    along = keys @ key / (keys.norm(dim=1) * key.norm())
    best = int(along.abs().argmax())
    towards = value * along[best].sign()
    ids = lens_logits(lm, towards.to(lm.dtype).to(lm.device))
    return suspects.facts[best].subject, lm.word(int(ids.argmax()))


def _from_keys(lm: LM, layer: int, weight: Tensor) -> Float[Tensor, "d_model d_mlp"]:
    """A down projection as a map from keys to values, whatever the module's orientation."""
    return weight if isinstance(lm.part(layer, lm.layout.down_proj), nn.Linear) else weight.T


# --- the examination against the truth ---


def _right(lm: LM, found: Finding, fact: Fact, edit: Edit, suspects: Suspects) -> list[dict[str, Any]]:
    """Whether what was found is so."""
    place = suspects.index(fact)
    new = lm.target_ids(fact.text, fact.target_new or "")[0]
    layers = _layers(lm, edit)
    right = {
        "kind": found.kind == true_kind(edit),
        "layer": found.changed == layers,
        "subject_by_key": found.subject == fact.subject,
        "object_by_value": found.object == lm.word(new),
        "fact_by_behaviour": int(found.moved.argmax()) == place,
        **{f"layer_by_{score}": found.by_score[score] in layers for score in SCORES},
        "took": int(found.said[place].argmax()) == new,
    }
    return [{"measure": measure, "components": None, "value": float(value)} for measure, value in right.items()]


def true_kind(edit: Edit) -> str:
    """The kind of the change that an editor made, from what it says itself."""
    from workbench.edit_footprints import singular_values

    kinds = []
    for change in edit.changes.values():
        shape = tuple(change.shape) if isinstance(change, Tensor) else (len(change.rows), len(change.columns))
        if len(shape) != 2:
            return "dense"
        values = singular_values(change)
        kinds.append(kind_of_rank(int((values > 1e-5 * values[0]).sum()), min(shape)))
    return max(kinds, key=["rank one", "low rank", "dense"].index)


def _layers(lm: LM, edit: Edit) -> list[int]:
    found = (re.match(rf"{re.escape(lm.layout.blocks)}\.(\d+)\.", name) for name in edit.changes)
    return sorted({int(one[1]) if one else -1 for one in found})


def _undone(
    lm: LM, found: Finding, fact: Fact, edit: Edit, suspects: Suspects, *, dropped: Sequence[int], others: int
) -> list[dict[str, Any]]:
    """Whether the fact is restored when components are dropped; nothing for an edit that did not take."""
    place = suspects.index(fact)
    rest = [i for i in range(len(suspects.facts)) if i != place]
    asked = [place, *(rest[i * len(rest) // others] for i in range(others))] if others < len(rest) else [place, *rest]
    tokens, before = lm.encode([suspects.facts[i] for i in asked]), suspects.log_p[asked].argmax(-1)
    if int(found.said[place].argmax()) != lm.target_ids(fact.text, fact.target_new or "")[0]:
        return []
    weights = {name: changed(lm.model.get_parameter(name), [change]) for name, change in edit.changes.items()}
    rows: list[dict[str, Any]] = []

    def tried(measure: str, components: int | None, replaced: Mapping[str, Tensor]) -> None:
        changes = {
            name: weight - lm.model.get_parameter(name).detach() for name, weight in {**weights, **replaced}.items()
        }
        with Edit(base=lm.weight_hash, changes=changes).on(lm):
            now = run(lm, tokens).last_logits.argmax(-1).cpu()
        same = (now == before).double()
        for name, value in (("undone", same[0]), ("others", same[1:].mean())):  # NaN without others
            rows.append({"measure": f"{name}{measure}", "components": components, "value": float(value)})

    tried("", None, {name: weights[name] - torch.outer(*top).to(weights[name]) for name, top in found.tops.items()})
    places = {
        "_in_place": [
            name for name in weights if name in {f"{down_path(lm, i)}.weight" for i in found.changed if i >= 0}
        ],
        "_where_named": [f"{down_path(lm, found.by_score['cosine'])}.weight"],
    }
    for measure, names in places.items():
        parts = {}
        for name in names:
            weight = weights.get(name, lm.model.get_parameter(name).detach())
            parts[name] = weight, torch.linalg.svd(weight.double().cpu(), full_matrices=False)
        for n in dropped if names else ():
            tried(measure, n, {name: bottom(weight, n, parts=svd) for name, (weight, svd) in parts.items()})
    return rows


def bottom(weight: Float[Tensor, "row column"], n: int, *, parts: Any = None) -> Float[Tensor, "row column"]:
    """A matrix without its n largest singular components.

    Args:
        weight: the matrix.
        n: how many are dropped.
        parts: its singular value decomposition, where it is known already.
    """
    u, values, v = parts if parts is not None else torch.linalg.svd(weight.double().cpu(), full_matrices=False)
    top: Tensor = (u[:, :n] * values[:n]) @ v[:n]
    return weight - top.to(weight)


# --- shown ---


def chart(result: Result) -> Chart:
    """How often each question is answered rightly, and what tells the layer without a reference."""
    means, layers = result.extras["means"], result.extras["layers"]
    rows = means[means["measure"].isin(list(QUESTIONS))].copy()
    rows["label"] = [
        QUESTIONS[measure] + (f", {n} dropped" if n else "")
        for measure, n in zip(rows["measure"], rows["components"], strict=True)
    ]
    rows["place"] = rows["measure"].map(list(QUESTIONS).index)
    rows = rows.sort_values(["place", "components"], kind="stable").rename(columns={"editor": "series", "value": "x"})
    dots = DotPlot(
        rows=rows[["label", "series", "x", "low", "high"]], x_title="share of edits", title="What weights tell"
    )
    curves = []
    for score, title in zip(SCORES, ("mean |cos| of rows", "σ₁ / σ₂"), strict=True):
        mean = layers.groupby(["editor", "layer"], sort=False)[score].mean().reset_index()
        mean = mean.rename(columns={"editor": "series", "layer": "x", score: "y"})
        curves.append(LinePlot(rows=mean[["series", "x", "y"]], y_title=title, title="Without the original weights"))
    edits, chance = int(means["n"].max()), result.run["chance"]
    guessed = ", ".join(f"{editor} {share:.0%}" for editor, share in chance["layer"].items())
    return Chart(
        title="What an edit leaves in the weights",
        plots=(dots, *curves),
        columns=3,
        caption=(
            f"Up to {edits} edits an editor, of one fact each; bars are 95 % bootstrap intervals over facts. Curves are means over "
            f"edits of the down projections; layers count from 0. Guessing names one of an edit's layers in: {guessed} of cases; "
            f"the subject in {chance['subject']:.0%}."
        ),
    )


def summary(result: Result) -> str:
    """What was found of each editor's edits, beside what was published."""
    means, chance = result.extras["means"], result.run["chance"]
    lines = []
    for editor, rows in means.groupby("editor", sort=False):
        values = {(row["measure"], int(row["components"])): row["value"] for row in rows.to_dict("records")}
        kinds = result.extras["named"].query("editor == @editor")["kind"].mode()[0]
        dropped = {
            where: ", ".join(f"{v:.0%} by dropping {n}" for (name, n), v in values.items() if name == f"undone_{where}")
            or "not tried"
            for where in ("in_place", "where_named")
        }
        lines.append(
            f"{editor}: {kinds}; kind right {values['kind', 0]:.0%}, layers {values['layer', 0]:.0%}, subject by key "
            f"{values['subject_by_key', 0]:.0%}, object {values['object_by_value', 0]:.0%}, fact by behaviour "
            f"{values['fact_by_behaviour', 0]:.0%}; without the original: layer by cosines {values['layer_by_cosine', 0]:.0%}, by "
            f"singular values {values['layer_by_ratio', 0]:.0%} (guessing {chance['layer'][editor]:.0%})."
        )
        if ("undone", 0) in values:
            lines.append(
                f"  Undone: {values['undone', 0]:.0%} with the original; in the changed layers, {dropped['in_place']}; "
                f"without the original, {dropped['where_named']}."
            )
    lines.append(f"Guessing: subject {chance['subject']:.0%}.")
    lines.append("Published (2505.20819): object up to 99 %, undone without the original up to 94 %.")
    return "\n".join(lines)
