"""What is left of a model, and of its edits, after 1, 10, 100 or 1,000 edits one after the other?

Wang et al. 2024 (WISE, arXiv 2405.14768, section 3): in a stream of edits no editor keeps reliability, generalisation and locality
at once ("the impossible triangle"). Gupta et al. 2024 (arXiv 2401.07453) and Hu et al. 2024 (arXiv 2408.07413) find that ROME and
MEMIT break models within tens to thousands of edits, as the changed weights grow; AlphaEdit (arXiv 2410.02355) keeps earlier keys.

Protocol. Some facts are held out, the others are edited in a random order, each on top of all before. At every checkpoint all is
measured anew, on all facts asked for so far (also those that an editor refused) and on those held out:

- `reliability`: the new answer is what the model says, greedily
- `generalisation`: so after the paraphrases
- `locality`: the next token is what it was, after the prompts and paraphrases of held-out facts
- `neighborhood`, `other_relations`: so after prompts on other subjects that are never edited, and on other relations of the subject
- `recall`: held-out facts are still answered as `target_true` says

With them the growth of the changed weights, and how far the causal trace's centre of mass moves on held-out facts: of those that
are still traceable, whose number is told, since a ruined model may have no trace left to move. Held-out facts are all facts of
some subjects, so that no edit is about a subject on which locality is asked.

Departures. WISE scores the share of right tokens, here all tokens of an answer have to be right; its locality prompts are Natural
Questions, here they are held-out facts, which share relations and templates with the edited ones: locality is harder to keep.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from analyses.answers import is_said, next_tokens
from analyses.editing import fitted_editors
from analyses.intervals import means_by
from workbench.charts import Chart, LinePlot
from workbench.editors.base import Editor, reserving
from workbench.edits import Edit, EditError, LowRank
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts
from workbench.locators import locate
from workbench.locators.causal_trace import CausalTrace
from workbench.models import LM
from workbench.profiles import layer_profiles, mass_centre
from workbench.progress import track
from workbench.results import Result, manifest, question_key, record
from workbench.store import Store

TRIANGLE = ("reliability", "generalisation", "locality")
"""What no editor is said to keep at once."""

SAVED_EVERY = 10
"""After so many edits of a stream the edit so far is saved, besides at checkpoints."""

PUBLISHED = pd.DataFrame(
    [
        ("Wise", 1, 0.98, 0.92, 1.00),
        ("Wise", 10, 0.94, 0.88, 1.00),
        ("Wise", 100, 0.90, 0.81, 1.00),
        ("Wise", 1000, 0.77, 0.72, 1.00),
        ("Memit", 1000, 0.69, 0.65, 0.62),
        ("Rome", 1000, 0.01, 0.01, 0.00),
    ],
    columns=["editor", "edits", *TRIANGLE],
)
"""WISE's Table 2: Llama-2-7B, zsRE. Its MEMIT edits all facts of the stream as one batch (MEMIT-MASS)."""


def lifelong(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("FineTune", "Rome", "Memit", "AlphaEdit"),
    checkpoints: tuple[int, ...] = (1, 10, 100),
    held_out: int = 20,
    traced: int = 3,
    samples: int = 5,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Streams of edits, one an editor, measured at checkpoints.

    Args:
        lm: the model.
        facts: with `target_new`; those not held out are edited.
        editors: which; also Lora, Grace, Wise and all the others.
        checkpoints: after how many edits all is measured; those beyond the facts given become one after the last of them.
        held_out: how many facts are never edited; at most a quarter of those given.
        traced: on how many of the held-out facts the causal trace is drawn at every checkpoint; 0: none.
        samples: noise samples of each trace.
        seed: of the order of the facts, and of the intervals.
        store: where streams and checkpoints are kept, so that a stopped run goes on.

    Returns:
        One row an editor, checkpoint, fact and measure: `editor`, `edits`, `group` (edited, held out), `fact`, `measure`, `value`
        (0 to 1: the share of the fact's prompts). Extras:

        - `means`: over facts, with 95 % bootstrap intervals; `triangle`: the three corners and the `weakest`; `published`
        - `norms`: by changed parameter `relative` |dW| / |W| and `growth` |W + dW| / |W|; a row for what stands beside the weights,
          with its count of numbers, `beside`
        - `drift`: by traced fact `centre` of mass in layers (0-based), `before` any edit, and `shift`; NaN where its trace is gone

        The manifest's `left_out` says which facts were refused and why.

    Raises:
        FactError: fewer than two facts can be used, or no checkpoint is above 0.
        InputError: no editor could edit any fact.
    """
    usable, left_out = _usable(lm, facts)
    stream, held = split(usable, held_out=held_out, seed=seed)
    steps = reachable(checkpoints, len(stream))
    stream = stream[: steps[-1]]
    before = _Before.of(lm, stream, held, traced=traced, samples=samples, store=store, left_out=left_out)
    tables: dict[str, list[pd.DataFrame]] = {"table": [], "norms": [], "drift": []}
    for label, editor in fitted_editors(lm, editors).items():
        for part in _of_one(lm, editor, label, stream, steps, before, store=store):
            left_out |= part.run["left_out"]
            for name, table in (("table", part.table), *part.extras.items()):
                tables[name].append(table.assign(editor=label))
    whole = {name: pd.concat(parts, ignore_index=True) if parts else pd.DataFrame() for name, parts in tables.items()}
    table = whole.pop("table")
    if table.empty:
        raise InputError(f"No editor could edit any fact. The first: {next(iter(left_out.values()), 'none was given')}")
    means = means_by(table, ["editor", "edits", "group", "measure"], seed=seed)
    own = {
        "editors": list(editors), "checkpoints": list(checkpoints), "held_out": held_out, "traced": traced, "samples": samples,
        "seed": seed,
    }  # fmt: skip
    run_ = manifest(
        "lifelong", model=lm.protocol, parameters=own, facts=facts, left_out=left_out,
        stream=[fact.id for fact in stream], held=[fact.id for fact in held],
    )  # fmt: skip
    extras = {**whole, "means": means, "triangle": triangle(means), "published": PUBLISHED}
    return Result(table=table, run=run_, extras=extras)


def split(facts: Sequence[Fact], *, held_out: int, seed: int) -> tuple[list[Fact], list[Fact]]:
    """The facts to edit in a random order, and those held out: at most a quarter, at least one.

    Subjects are held out whole; only where none has few enough facts, some of its facts are held out and others edited.

    Raises:
        FactError: fewer than two facts.
    """
    if len(facts) < 2:
        raise FactError(f"{len(facts)} fact can be used, expected at least 2: one to edit, one to hold out.")
    order = [facts[i] for i in np.random.default_rng(seed).permutation(len(facts))]
    n = max(1, min(held_out, len(facts) // 4))
    of_subject: dict[str, list[Fact]] = {}
    for fact in order:
        of_subject.setdefault(fact.subject, []).append(fact)
    held: list[Fact] = []
    for own in of_subject.values():
        if len(held) + len(own) <= n:
            held += own
    held = held or order[:n]
    return [fact for fact in order if fact not in held], held


def reachable(checkpoints: Sequence[int], n: int) -> list[int]:
    """The checkpoints in order; those beyond n facts become n.

    Raises:
        FactError: none is above 0.
    """
    found = sorted({min(step, n) for step in checkpoints if step > 0})
    if not found:
        raise FactError(f"checkpoints is {tuple(checkpoints)}, expected numbers of edits above 0, e.g. 1,10,100.")
    return found


def triangle(means: pd.DataFrame) -> pd.DataFrame:
    """By editor and checkpoint the three corners, and the weakest of them."""
    corners = means[means["measure"].isin(TRIANGLE)]
    table = corners.pivot(index=["editor", "edits"], columns="measure", values="value").reindex(columns=list(TRIANGLE))
    table["weakest"] = table.min(axis=1, skipna=False)
    order = means[["editor", "edits"]].drop_duplicates()
    found: pd.DataFrame = table.loc[pd.MultiIndex.from_frame(order)].reset_index()
    found.columns.name = None
    return found


def chart(result: Result) -> Chart:
    """The corners of the triangle by number of edits, the weakest of them, the growth of the weights, and the drift."""
    means, norm, drift = (result.extras[name] for name in ("means", "norms", "drift"))
    seed = int(result.run["parameters"]["seed"])
    plots = []
    for measure in TRIANGLE:
        rows = means[means["measure"] == measure].rename(columns={"editor": "series", "edits": "x", "value": "y"})
        plots.append(_lines(rows, measure.capitalize(), "share"))
    weakest = result.extras["triangle"].rename(columns={"editor": "series", "edits": "x", "weakest": "y"})
    plots.append(_lines(weakest.dropna(subset="y"), "Weakest of the three", "share"))
    most = norm.groupby(["editor", "edits"], sort=False)["growth"].max().reset_index()
    plots.append(
        _lines(
            most.rename(columns={"editor": "series", "edits": "x", "growth": "y"}),
            "Growth of weights",
            "|W + ΔW| / |W|",
        )
    )
    if len(drift):
        moved = means_by(drift.assign(shift=drift["shift"].abs()), ["editor", "edits"], value="shift", seed=seed)
        moved = moved.rename(columns={"editor": "series", "edits": "x", "value": "y"})
        moved["note"] = [f"{n} facts still traceable" for n in moved["n"]]
        plots.append(_lines(moved, "Drift of located layers", "layers"))
    n = int(means.loc[means["measure"] == "reliability", "n"].max())
    return Chart(
        title="The impossible triangle: what a stream of edits leaves",
        plots=tuple(plots),
        columns=3,
        caption=(
            f"Edits one after the other, all measured anew at every checkpoint on up to {n} edited and "
            f"{len(result.run['held'])} held-out facts; bands are 95 % bootstrap intervals over facts. Growth: of "
            "the changed matrix that grew most. Drift: mean distance in layers between the causal trace's centre of mass now and "
            f"before any edit, on held-out facts whose trace is still there{_gone(drift)}."
        ),
    )


def _lines(rows: pd.DataFrame, title: str, y_title: str) -> LinePlot:
    columns = [name for name in ("series", "x", "y", "low", "high", "note") if name in rows]
    return LinePlot(
        rows=rows[columns].reset_index(drop=True), x_title="Edits", y_title=y_title, title=title, log_x=True
    )


def _gone(drift: pd.DataFrame) -> str:
    """How many traces are gone at the last checkpoint of any editor, for the caption."""
    if drift.empty:
        return ""
    last = drift[drift["edits"] == drift["edits"].max()]
    lost = last["shift"].isna().groupby(last["editor"], sort=False).sum()
    told = ", ".join(f"{n} of {editor}'s" for editor, n in lost.items() if n)
    return f" (gone after {int(drift['edits'].max())} edits: {told})" if told else ""


def summary(result: Result) -> str:
    """Each editor's triangle at the last checkpoint, beside what was published; growth and drift."""
    corners, norm, drift = (result.extras[name] for name in ("triangle", "norms", "drift"))
    lines = []
    for editor, rows in corners.groupby("editor", sort=False):
        last = rows.iloc[-1]
        now = norm[(norm["editor"] == editor) & (norm["edits"] == last["edits"])]
        beside = int(now["beside"].sum())
        grown = f"{beside} numbers beside the weights" if beside else f"weights x{now['growth'].max():.3g}"
        moved = drift[(drift["editor"] == editor) & (drift["edits"] == last["edits"])] if len(drift) else drift
        left = moved["shift"].dropna().abs() if len(moved) else moved
        shift = f", trace moved by {left.mean():.2f} layers" if len(left) else ""
        shift += f" ({len(left)} of {len(moved)} facts still traceable)" if len(left) < len(moved) else ""
        values = ", ".join(f"{name} {last[name]:.2f}" for name in TRIANGLE)
        lines.append(f"{editor}, edits: {int(last['edits'])}: {values}; {grown}{shift}.")
    best = corners[corners["edits"] == corners["edits"].max()].sort_values("weakest").iloc[-1]
    lines.append(f"Best weakest corner: {best['weakest']:.2f} ({best['editor']}).")
    for row in PUBLISHED[PUBLISHED["editor"].isin(set(corners["editor"]))].to_dict("records"):
        values = ", ".join(f"{name} {row[name]:.2f}" for name in TRIANGLE)
        lines.append(f"Published (WISE, Llama-2-7B, zsRE): {row['editor']} after {row['edits']} edits: {values}.")
    return "\n".join(lines)


# --- what is measured ---


@dataclass(frozen=True, kw_only=True)
class _Before:
    """What is asked at every checkpoint, and what the model says to it without any edit."""

    stream: tuple[Fact, ...]
    held: tuple[Fact, ...]
    answers: Mapping[str, int]
    """By prompt the next token."""

    kept: Mapping[str, Sequence[tuple[str, str]]]
    """By fact of the stream, measures and prompts of what no edit of it should change."""

    traced: tuple[Fact, ...]
    """The held-out facts whose trace is drawn, each with the answer that it follows."""

    centres: Mapping[str, float]
    """By traced fact the centre of mass of its causal trace."""

    trace: CausalTrace

    @classmethod
    def of(
        cls, lm: LM, stream: Sequence[Fact], held: Sequence[Fact], *, traced: int, samples: int, store: Store | None,
        left_out: dict[str, str],
    ) -> _Before:  # fmt: skip
        kept = _kept(stream)
        probes = [probe for own in kept.values() for probe in own] + [p for fact in held for p in _own(fact)]
        prompts = list(dict.fromkeys(probe for _, probe in probes))
        trace = CausalTrace.fitted(lm, kinds=("mlp_out",), samples=samples)
        centres, followed = {}, []
        for fact in held[:traced]:
            try:
                if not fact.target_true:  # what the model says now is traced later too
                    said = next_tokens(lm, [fact.text])[0]
                    fact = replace(fact, target_true=lm.word(said).strip())
                centres[fact.id] = _centre(lm, trace, fact, store)
            except InputError as error:
                left_out[f"CausalTrace: {fact.id}"] = str(error)
            else:
                followed.append(fact)
        answers = dict(zip(prompts, next_tokens(lm, prompts), strict=True))
        return cls(
            stream=tuple(stream), held=tuple(held), answers=answers, kept=kept, traced=tuple(followed), centres=centres,
            trace=trace,
        )  # fmt: skip

    def measure(self, lm: LM, n: int) -> pd.DataFrame:
        """Every measure of every fact after n edits, which are on the model."""
        edited = self.stream[:n]
        asked = [(f, "edited", "reliability", f.text, f.target_new or "") for f in edited]
        asked += [(f, "edited", "generalisation", text, f.target_new or "") for f in edited for text in f.paraphrases]
        asked += [(f, "held out", "recall", f.text, f.target_true) for f in self.held if f.target_true]
        right = is_said(lm, [one[3] for one in asked], [one[4] for one in asked])
        kept = [(f, "edited", measure, text) for f in edited for measure, text in self.kept[f.id]]
        kept += [(f, "held out", measure, text) for f in self.held for measure, text in _own(f)]
        prompts = list(dict.fromkeys(one[3] for one in kept))
        now = dict(zip(prompts, next_tokens(lm, prompts), strict=True))
        rows = [(f.id, group, measure, float(ok)) for (f, group, measure, *_), ok in zip(asked, right, strict=True)]
        rows += [(f.id, group, measure, float(now[text] == self.answers[text])) for f, group, measure, text in kept]
        table = pd.DataFrame(rows, columns=["fact", "group", "measure", "value"])
        means = table.groupby(["group", "measure", "fact"], sort=False)["value"].mean()
        found: pd.DataFrame = means.reset_index().assign(edits=n)
        return found

    def drift(self, lm: LM, n: int, *, label: str, left_out: dict[str, str]) -> pd.DataFrame:
        """Where the held-out facts are located after n edits, which are on the model."""
        rows = []
        for fact in self.traced:
            try:
                centre = _centre(lm, self.trace, fact, None)
            except InputError as error:
                left_out[f"{label}: CausalTrace of {fact.id} after {n} edits"] = str(error)
                centre = float("nan")
            before = self.centres[fact.id]
            rows.append({"edits": n, "fact": fact.id, "centre": centre, "before": before, "shift": centre - before})
        drift: pd.DataFrame = pd.DataFrame(rows, columns=["edits", "fact", "centre", "before", "shift"])
        return drift


def _kept(stream: Sequence[Fact]) -> dict[str, list[tuple[str, str]]]:
    """By fact, prompts about what an edit of it should leave alone and no other edit of the stream is about."""
    subjects = {one.subject for one in stream}
    edited = {one.text for one in stream} | {text for one in stream for text in one.paraphrases}
    found = {}
    for fact in stream:
        near = [probe.prompt for probe in fact.neighbors if not any(subject in probe.prompt for subject in subjects)]
        others = [probe.prompt for probe in fact.locality if probe.prompt not in edited]
        found[fact.id] = [("neighborhood", text) for text in near] + [("other_relations", text) for text in others]
    return found


def _own(fact: Fact) -> list[tuple[str, str]]:
    return [("locality", text) for text in (fact.text, *fact.paraphrases)]


def _centre(lm: LM, trace: CausalTrace, fact: Fact, store: Store | None) -> float:
    """The centre of mass by layer of a fact's trace; NaN where restoring helps nowhere."""
    profile = layer_profiles([locate(trace, lm, [fact], store=store)])
    return float(mass_centre(profile["value"].to_numpy(float), profile["layer"].to_numpy(float)))


def norms(lm: LM, edit: Edit, n: int) -> pd.DataFrame:
    """How much the weights have grown, by changed parameter; what stands beside them has a row of its own."""
    rows: list[dict[str, Any]] = []
    for name, change in edit.changes.items():
        weight = lm.model.get_parameter(name).detach().double().cpu()
        delta = (change.dense() if isinstance(change, LowRank) else change).double().cpu()
        rows.append({
            "edits": n, "parameter": name, "relative": float(delta.norm() / weight.norm()),
            "growth": float((weight + delta).norm() / weight.norm()), "beside": 0,
        })  # fmt: skip
    for side in edit.sides:
        held = sum(value.numel() for value in vars(side).values() if isinstance(value, torch.Tensor))
        rows.append({
            "edits": n, "parameter": f"{type(side).__name__} {getattr(side, 'module', '')}".strip(), "relative": 0.0,
            "growth": 1.0, "beside": held,
        })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


# --- streams ---


def _of_one(
    lm: LM, editor: Editor, label: str, stream: Sequence[Fact], steps: Sequence[int], before: _Before, *,
    store: Store | None,
) -> Iterator[Result]:  # fmt: skip
    """The checkpoints of one editor, from the store where they are there."""
    whole = question_key({"facts": [record(fact) for fact in (*stream, *before.held)]})
    asked = {
        n: manifest(
            "Lifelong checkpoint", model=lm.protocol, facts=stream[:n],
            parameters={
                "editor": repr(editor), "edits": n, "stream": [fact.id for fact in stream],
                "held": [fact.id for fact in before.held], "stream and held": whole, "traced": list(before.centres),
                "trace": repr(before.trace),
            },
        )
        for n in steps
    }  # fmt: skip
    found = {n: store.find(run_, Result) if store else None for n, run_ in asked.items()}
    missing = [n for n in steps if found[n] is None]
    made = edited_stream(lm, editor, stream, missing, tested=sorted(before.answers), store=store)
    for n in steps:
        part = found[n]
        if part is None:
            _, edit, refused = next(made)
            left_out = {f"{label}: {name}": why for name, why in refused.items()}
            part = _checkpoint(lm, edit, n, label, before, asked[n], left_out)
            if store:
                store.save(part)
        yield part


def _checkpoint(
    lm: LM, edit: Edit | None, n: int, label: str, before: _Before, run_: dict[str, Any], left_out: dict[str, str]
) -> Result:
    """Everything that is measured after n edits; empty where all of them were refused."""
    if edit is None:
        empty = {name: pd.DataFrame() for name in ("norms", "drift")}
        return Result(table=pd.DataFrame(), run={**run_, "left_out": left_out}, extras=empty)
    grown = norms(lm, edit, n)
    with edit.on(lm):
        table, drift = before.measure(lm, n), before.drift(lm, n, label=label, left_out=left_out)
    return Result(table=table, run={**run_, "left_out": left_out}, extras={"norms": grown, "drift": drift})


def edited_stream(
    lm: LM,
    editor: Editor,
    facts: Sequence[Fact],
    steps: Sequence[int],
    *,
    tested: Sequence[str] = (),
    store: Store | None = None,
) -> Iterator[tuple[int, Edit | None, dict[str, str]]]:
    """Edits one fact after the other; gives the whole edit so far after each of some numbers of edits.

    An editor that edits the facts of a batch one by one gets `SAVED_EVERY` at a time: what it does once a call is done less often.
    None draws the prompts `tested` from its pool.

    With a store the edit is kept at these steps and, until the next time, every `SAVED_EVERY` edits.

    Returns:
        The step, the edit (None where the editor refused all facts), and by id why facts were refused.
    """

    def folder(n: int) -> Path:
        assert store is not None
        asked = {"editor": repr(editor), "tested": list(tested)}
        run_ = manifest(type(editor).__name__, model=lm.protocol, parameters=asked, facts=facts[:n])
        return store.folder / "streams" / question_key(run_)

    edit: Edit | None = None
    refused: dict[str, str] = {}
    done, newest = 0, None
    for step in steps:
        if store is not None and (kept := _kept_edit(lm, folder, after=done, most=step)):
            edit, done = kept
            refused = dict(edit.run.get("refused", {}))
            newest = None if done == step else folder(done)
        waiting: list[Fact] = []
        for n in track(range(done + 1, step + 1), "edits", step - done):
            waiting.append(facts[n - 1])
            if editor.one_by_one and n < step and n % SAVED_EVERY:
                continue
            with reserving(tested):
                edit = _gone_on(lm, editor, waiting, edit, refused)
            waiting = []
            if store is not None and edit is not None and (n == step or n % SAVED_EVERY == 0):
                replace(edit, run={**edit.run, "refused": refused}).save(folder(n))
                if newest is not None:
                    shutil.rmtree(newest, ignore_errors=True)
                newest = None if n == step else folder(n)
        done = step
        yield step, edit, dict(refused)


def _gone_on(lm: LM, editor: Editor, facts: Sequence[Fact], edit: Edit | None, refused: dict[str, str]) -> Edit | None:
    """The edit with these facts too; those that the editor refuses are left out, and `refused` says why."""
    try:
        return editor(lm, facts, after=edit)
    except InputError as error:
        if len(facts) == 1:
            refused[facts[0].id] = str(error)
            return edit
    for fact in facts:
        edit = _gone_on(lm, editor, [fact], edit, refused)
    return edit


def _kept_edit(lm: LM, folder: Callable[[int], Path], *, after: int, most: int) -> tuple[Edit, int] | None:
    """The longest stream that is kept whole in its folder, of more than `after` and at most so many edits."""
    for n in dict.fromkeys((most, *range(most - most % SAVED_EVERY, after, -SAVED_EVERY))):
        if n > after and folder(n).is_dir():
            try:
                edit = Edit.load(folder(n))
                edit.check(lm)
            except EditError:
                continue  # damaged: made anew
            return edit, n
    return None


def _usable(lm: LM, facts: Sequence[Fact]) -> tuple[list[Fact], dict[str, str]]:
    """The facts with an answer to give, and why others are left out."""
    usable, left_out = [], {}
    for fact in distinct_facts(facts, to="edit"):
        try:
            if not (fact.target_new or "").strip():
                raise FactError(f"The fact {fact.id!r} has no target_new. Say what the model shall answer.")
            lm.encode([fact])
            for text in (fact.text, *fact.paraphrases):
                lm.target_ids(text, fact.target_new or "")
            if fact.target_true:
                lm.target_ids(fact.text, fact.target_true)
        except InputError as error:
            left_out[f"lifelong: {fact.id}"] = str(error)
        else:
            usable.append(fact)
    return usable, left_out
