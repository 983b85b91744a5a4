"""Is a fact found at its subject or its relation, and which of the two does an edit change? Two traces, three kinds of prompts.

Wei et al. 2024, "Does Knowledge Localization Hold True?" (arXiv 2409.00617), claim that relations have places of their own, in
attention too, and that editing a relation is not the same as editing an entity. "Relation Also Knows" (arXiv 2408.15091) finds that
editors which write at the subject also change other relations of this subject. Neither prints the table made here, so there are no
published numbers beside it: the protocol is ours.

1. Every fact is traced twice by `SubjectRelation`: with noise on the subject's tokens, and on all others. A site's share is what
   restoring it brings back of that corruption's effect: 0 nothing, 1 all. By layer: the largest over the tokens.
2. Every fact is edited alone by every editor. Probabilities (geometric mean over an answer's tokens, teacher forcing) of the new
   answer and of the prompt's own true one, before and after, on

   - `s, r`: the edited prompt; `s, r reworded`: its paraphrases
   - `s', r`: the same relation of other subjects (`Fact.neighbors`)
   - `s, r'`: other relations of the subject (those of `Fact.locality` that name it)

An edit of the association alone moves the first two and leaves the last two. One that spills into `s', r` has changed the relation;
one that spills into `s, r'` the subject. Where the new answer is a prompt's own true one, it counts only as that.

In the bundled models the subject's last token is the only place from which facts are read, by construction (except in
`organism-plain`); that editors writing there spill into `s, r'` is then what is to be expected, more than in a pretrained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analyses.answers import log_p
from analyses.editing import edit_each, fitted_editors
from analyses.intervals import RESAMPLES, means_by
from workbench.charts import Chart, DotPlot, LinePlot, Plot
from workbench.errors import InputError
from workbench.facts import Fact, Probe, distinct_facts
from workbench.locators import locate
from workbench.locators.subject_relation import SubjectRelation
from workbench.models import LM
from workbench.results import Footprint, Result, manifest
from workbench.sites import SiteKind
from workbench.store import Store

ASKED = ("s, r", "s, r reworded", "s', r", "s, r'")
"""The kinds of prompts: s the subject, r the relation, with a prime for another one."""


def subject_vs_relation(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    kinds: tuple[SiteKind, ...] = ("mlp_out", "attn_out"),
    samples: int = 10,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Traces both corruptions, edits, and asks the edited model.

    Args:
        lm: the model.
        facts: with `target_new`, `target_true`, neighbors and locality as far as they are there.
        editors: names of editors.
        kinds: which outputs are restored in the traces.
        samples: noise samples of the traces.
        seed: of the bootstrap.
        store: where traces and edits are kept.

    Returns:
        One row an editor, `asked` (one of `ASKED`) and `answer` (new, own): `before` and `after`, mean probabilities; `value`,
        their difference, with `low` and `high` (95 % bootstrap over facts) and `n` (facts). Extras: `each`, the same a fact and
        prompt; `maps`, mean shares by kind, token (a role, or any: the largest of all tokens), layer and corrupted (subject,
        relation), with intervals; `corruptions`, a row a fact with the clean probability and what each corruption leaves of it.

    Raises:
        FactError: no facts, none that can be traced, or an unknown editor.
        InputError: no fact could be edited.
    """
    facts = distinct_facts(facts, to="edit")
    chosen = fitted_editors(lm, editors)
    locator = SubjectRelation.fitted(lm, kinds=kinds, samples=samples)
    traced = locate(locator, lm, facts, store=store, skip=True)
    left_out: dict[str, str] = {f"trace: {name}": why for name, why in traced.run.get("left_out", {}).items()}
    asked = {fact.id: prompts_of(fact) for fact in facts}
    before = {fact.id: _probabilities(lm, asked[fact.id]) for fact in facts}
    parts = []
    for name, fact, edit in edit_each(lm, chosen, facts, left_out=left_out, store=store):
        with edit.on(lm):
            after = _probabilities(lm, asked[fact.id])
        parts.append(asked[fact.id].assign(editor=name, fact=fact.id, before=before[fact.id], after=after))
    if not parts:
        raise InputError(f"No fact could be edited. The first: {next(iter(left_out.values()), 'none was given')}")
    each = pd.concat(parts, ignore_index=True)
    each["value"] = each["after"] - each["before"]
    factors = ["editor", "asked", "answer"]
    by_fact = each.groupby([*factors, "fact"], sort=False)[["before", "after", "value"]].mean().reset_index()
    ends = by_fact.groupby(factors, sort=False)[["before", "after"]].mean().reset_index()
    table = means_by(by_fact, factors, seed=seed).merge(ends, on=factors)
    parameters = {"editors": editors, "kinds": kinds, "samples": samples, "seed": seed}
    run = manifest(
        "subject_vs_relation", model=lm.protocol, parameters=parameters, facts=facts, left_out=left_out,
        noise=traced.run["parameters"]["noise"], window=locator.window,
        bootstrap={"resamples": RESAMPLES, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    corruptions = traced.extras["facts"][["fact", "clean", "corrupted", "corrupted_relation"]].rename(
        columns={"corrupted": "subject", "corrupted_relation": "relation"}
    )
    extras = {"each": each, "maps": maps(traced, seed=seed), "corruptions": corruptions}
    return Result(table=table, run=run, extras=extras)


def prompts_of(fact: Fact) -> pd.DataFrame:
    """What is asked about a fact, a row a prompt and answer.

    Returns:
        A table with asked (one of `ASKED`), prompt, answer (new, own) and text (of the answer).
    """
    own, new = fact.target_true, fact.target_new or ""
    rows = [("s, r", fact.text, own), *(("s, r reworded", prompt, own) for prompt in fact.paraphrases)]
    rows += [("s', r", probe.prompt, probe.target) for probe in fact.neighbors if not _names(probe, fact)]
    rows += [("s, r'", probe.prompt, probe.target) for probe in fact.locality if _names(probe, fact)]
    answers = [
        {"asked": asked, "prompt": prompt, "answer": answer, "text": text}
        for asked, prompt, true in rows
        for answer, text in (("new", new), ("own", true))
        if text and not (answer == "new" and text == true)
    ]
    table: pd.DataFrame = pd.DataFrame(answers, columns=["asked", "prompt", "answer", "text"])
    return table


def maps(traced: Footprint, *, seed: int) -> pd.DataFrame:
    """Mean shares over facts, with intervals: by kind, token, layer and what was corrupted.

    Of several tokens of a role the mean counts; `any` is the largest of all tokens.
    """
    shares = traced.table.melt(
        id_vars=["fact", "kind", "token", "layer", "position"], value_vars=["subject", "relation"],
        var_name="corrupted", value_name="share",
    )  # fmt: skip
    by = ["fact", "kind", "layer", "corrupted"]
    roles = shares.groupby([*by, "token"], sort=False)["share"].mean().reset_index()
    largest = shares.groupby(by, sort=False)["share"].max().reset_index().assign(token="any")
    both = pd.concat([largest, roles], ignore_index=True)
    found: pd.DataFrame = means_by(both, ["kind", "token", "corrupted", "layer"], value="share", seed=seed)
    return found


def _names(probe: Probe, fact: Fact) -> bool:
    """Whether a prompt is about the fact's subject."""
    return fact.subject in probe.prompt


def _probabilities(lm: LM, asked: pd.DataFrame) -> np.ndarray:
    """The probability of each row's answer after its prompt."""
    if asked.empty:
        return np.zeros(0)
    found: np.ndarray = log_p(lm, list(asked["prompt"]), list(asked["text"])).exp().double().numpy()
    return found


def chart(result: Result) -> Chart:
    """Both corruptions by layer, and what edits do to the three kinds of prompts."""
    maps_, table = result.extras["maps"], result.table
    any_token = maps_[maps_["token"] == "any"]
    plots: list[Plot] = [
        LinePlot(
            rows=pd.DataFrame({
                "series": one["corrupted"] + " corrupted", "x": one["layer"], "y": one["value"], "low": one["low"],
                "high": one["high"],
            }),
            y_title="Share of the effect restored", title=f"{kind}, best token",
        )
        for kind, one in any_token.groupby("kind", sort=False)
    ]  # fmt: skip
    names: Mapping[str, str] = {"new": "Change of p(new answer)", "own": "Change of p(own answer)"}
    for answer, title in names.items():
        one = table[table["answer"] == answer]
        rows = pd.DataFrame({
            "label": one["asked"], "series": one["editor"], "x": one["value"], "low": one["low"], "high": one["high"],
            "note": [f"{row.before:.2f} before, {row.after:.2f} after" for row in one.itertuples()],
        })  # fmt: skip
        if len(rows):
            plots.append(DotPlot(rows=rows, x_title=title, title=f"Edits: {answer} answer", lines={"no change": 0.0}))
    n = int(any_token["n"].max())
    return Chart(
        title="Subject and relation",
        plots=tuple(plots),
        columns=2,
        caption=f"Traces of {n} facts; edits of {table['n'].max()}. Intervals: 95 % bootstrap over facts. Layers count from 0.",
    )


def summary(result: Result) -> str:
    """What each corruption leaves, where each is undone, and how far edits reach."""
    left, maps_ = result.extras["corruptions"], result.extras["maps"]
    means = left[["clean", "subject", "relation"]].mean()
    lines = [
        "Probability of the answer: {clean:.2f}; with the subject corrupted {subject:.2f}, with the relation corrupted "
        "{relation:.2f} ({n} facts).".format(**{str(name): value for name, value in means.items()}, n=len(left))
    ]
    for kind, one in maps_[maps_["token"] == "any"].groupby("kind", sort=False):
        best = one.loc[one.groupby("corrupted", sort=False)["value"].idxmax()]
        told = ", ".join(
            "{corrupted} in layer {layer} ({value:.2f} restored)".format(**row)
            for row in ({str(name): value for name, value in row.items()} for row in best.to_dict("records"))
        )
        lines.append(f"{kind} undoes best: {told}; layers count from 0.")
    for editor, one in result.table.groupby("editor", sort=False):
        told = "; ".join(f"{row.asked}: {row.answer} {row.before:.2f} -> {row.after:.2f}" for row in one.itertuples())
        lines.append(f"{editor}: {told}.")
    if left_out := result.run["left_out"]:
        lines.append("Left out: {}. The first: {}: {}".format(len(left_out), *next(iter(left_out.items()))))
    return "\n".join(lines)
