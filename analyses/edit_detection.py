"""Can one tell from a model's insides whether an answer was put there by an edit, or learned?

Youssef et al. 2024 (DEED, "Detecting Edited Knowledge in Language Models", arXiv 2405.02765): classifiers on hidden states and on
the probabilities of the output tell edited from unedited knowledge; logistic regression reaches 99.8 % accuracy, 97.8 % out of
domain (first version), and it gets harder where edited and unedited facts share subjects or objects (third version: AdaBoost).

Protocol. Every fact is edited alone by every editor. Its prompt on that model is an edited answer, where the edit took; the prompt
of another fact that the model still knows, drawn at random, on another subject where there is one, is a known answer. So both come
from the same edited models.

- Features at the last token: `hidden`, the residual stream after every layer; `probabilities`, the logarithms of the ten largest.
- Detectors: logistic regression (L2, C = 1) on standardised features, and AdaBoost with 50 stumps; as scikit-learn has them.
- Five folds such that no subject, or no object (the answer said), is both in training and in test. Trained on one editor's answers,
  tested on each editor's of the other folds: the same editor is `in domain`, the others are not.
- Beside them the largest probability alone, where nothing is trained: an edit is a search for a certain answer; and, by layer, the
  length of the hidden state, which says from where on the last token sees the edit. Measured as the area under the ROC curve
  (AUC), 0.5 for guessing.

Departures. The paper's layers, number of probabilities and settings of AdaBoost could not be found; those here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from sklearn.ensemble import AdaBoostClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from analyses.editing import edit_each, fitted_editors
from analyses.intervals import RESAMPLES
from workbench.charts import CellPlot, Chart, DotPlot, LinePlot
from workbench.facts import Fact, FactError, distinct_facts
from workbench.hooks import run
from workbench.models import LM
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.sites import Site
from workbench.store import Store

Split = Literal["subject", "object"]
"""What training and test do not share."""

SPLITS: tuple[Split, ...] = ("subject", "object")
"""Both of them."""

TOP = 10
"""How many of the largest probabilities are features."""

TRIED = 8
"""Of so many other facts the first is taken that the edited model still knows."""

PUBLISHED = pd.DataFrame(
    [("logistic regression on hidden states, in domain", 0.9981), ("the same, out of domain", 0.9779)],
    columns=["question", "value"],
)
"""The best of arXiv 2405.02765, first version; two editors. The tables of the third version could not be read."""


def edit_detection(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("FineTune", "Rome", "Memit", "AlphaEdit"),
    folds: int = 5,
    stumps: int = 50,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Edits every fact alone by every editor, and has detectors tell edited answers from known ones.

    Args:
        lm: the model.
        facts: with `target_new` and `target_true`.
        editors: which.
        folds: of the cross-validation; fewer where there are fewer subjects or objects.
        stumps: of AdaBoost.
        seed: of the choice of the other facts, the folds, and the intervals.
        store: where edits are kept and looked for.

    Returns:
        One row a prediction: `split`, `features`, `detector`, `trained` and `editor` (trained on whose answers, tested on whose),
        `fact`, `edited` (the truth), `score` (of being edited), `said` (the detector's answer), `right`. Extras: `accuracy` (by
        split, features, detector, trained, editor: `accuracy` with its 95 % bootstrap interval `low`, `high` over facts, `auc`,
        `n` answers), `baseline` (by editor: `auc` of the largest probability, and its mean for edited and for known answers),
        `lengths` (by editor and layer, 0-based: `auc` of the hidden state's length),
        `examples` (one row an answer: `editor`, `model_of` (the fact edited there), `fact`, `edited`, `subject`, `object`,
        `p_max`), `published`. The manifest's `left_out` says which answers are not there and why.

    Raises:
        FactError: fewer than two facts, or too few answers to train on and to test.
    """
    facts = distinct_facts(facts, to="detect")
    if len(facts) < 2:
        raise FactError("There is one fact only, expected at least 2: an edited answer is told from a known one.")
    left_out: dict[str, str] = {}
    answers = list(_answers(lm, facts, editors, seed=seed, left_out=left_out, store=store))
    if not {True, False} <= {answer.edited for answer in answers}:
        raise FactError(
            f"There are no edited and known answers to tell apart. The first reason: {next(iter(left_out.values()), 'none')}"
        )
    examples = pd.DataFrame(answer.told for answer in answers)
    features = {
        "hidden": np.stack([answer.hidden for answer in answers]),
        "probabilities": np.stack([answer.probabilities for answer in answers]),
    }
    jobs = [(split, name, detector) for split in SPLITS for name in features for detector in detectors(stumps, seed)]
    parts = []
    for split, name, detector in track(jobs, "detectors", len(jobs)):
        found = cross_validated(
            features[name], examples, detectors(stumps, seed)[detector], split=split, folds=folds, seed=seed
        )
        parts.append(found.assign(split=split, features=name, detector=detector))
    table = pd.concat(parts, ignore_index=True)
    if table.empty:
        raise FactError(
            f"{len(examples)} answers are too few for folds without a common subject or object. Give more and other facts."
        )
    run_ = manifest(
        "edit_detection", model=lm.protocol, facts=facts, left_out=left_out,
        parameters={"editors": list(editors), "folds": folds, "stumps": stumps, "seed": seed},
    )  # fmt: skip
    extras = {
        "accuracy": accuracy(table, seed=seed), "baseline": baseline(examples),
        "lengths": lengths(features["hidden"], examples, n_layers=lm.n_layers), "examples": examples, "published": PUBLISHED,
    }  # fmt: skip
    return Result(table=table, run=run_, extras=extras)


# --- answers ---


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    """One prompt on one edited model."""

    editor: str
    model_of: str
    fact: Fact
    edited: bool
    hidden: np.ndarray
    probabilities: np.ndarray

    @property
    def told(self) -> dict[str, Any]:
        """Its row among the examples."""
        return {
            "editor": self.editor, "model_of": self.model_of, "fact": self.fact.id, "edited": self.edited,
            "subject": self.fact.subject, "object": (self.fact.target_new if self.edited else self.fact.target_true) or "",
            "p_max": float(np.exp(self.probabilities[0])),
        }  # fmt: skip


def _answers(
    lm: LM,
    facts: Sequence[Fact],
    editors: Sequence[str],
    *,
    seed: int,
    left_out: dict[str, str],
    store: Store | None,
) -> Iterator[_Answer]:
    """Of every edit the edited answer, and a known one: of some other facts, the same for all editors, the first that is kept."""
    rng = np.random.default_rng(seed)
    known = [fact for fact in facts if fact.target_true]
    others: dict[str, list[Fact]] = {}
    for fact in facts:
        drawn = [known[i] for i in rng.permutation(len(known)) if known[i].id != fact.id]
        others[fact.id] = sorted(drawn, key=lambda one: one.subject == fact.subject)[:TRIED]
    for label, fact, edit in edit_each(lm, fitted_editors(lm, editors), facts, left_out=left_out, store=store):
        asked = [(fact, fact.target_new or ""), *((one, one.target_true) for one in others[fact.id])]
        with edit.on(lm):
            read = features_of(lm, [one.text for one, _ in asked])
        right = [
            said == lm.target_ids(one.text, answer)[0] for (one, answer), (*_, said) in zip(asked, read, strict=True)
        ]
        kept = next((i for i, ok in enumerate(right) if ok and i), None)
        if not right[0]:
            left_out[f"{label}: {fact.id}"] = f"The edit did not take: the model says {lm.word(read[0][2])!r}."
        if kept is None:
            left_out[f"{label}: {fact.id}, known"] = (
                f"On its model none of {len(asked) - 1} other facts is answered as before."
            )
        for i in [0] * right[0] + ([] if kept is None else [kept]):
            (one, _), (hidden, log_p, _) = asked[i], read[i]
            yield _Answer(editor=label, model_of=fact.id, fact=one, edited=i == 0, hidden=hidden, probabilities=log_p)


def features_of(lm: LM, prompts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """By prompt, at its last token: the states after all layers, the largest log-probabilities in order, and the token said."""
    sites = [Site(layer=layer, kind="resid_post", token="last") for layer in range(lm.n_layers)]
    acts = run(lm, lm.encode(list(prompts)), read=sites)
    hidden = torch.cat([acts[site].float() for site in sites], dim=-1).cpu().numpy()
    top = acts.last_logits.float().log_softmax(-1).topk(min(TOP, lm.d_vocab))
    return [
        (hidden[i], top.values[i].cpu().numpy(), int(top.indices[i, 0])) for i in range(len(prompts))
    ]  # float32 or better


# --- detectors ---


def detectors(stumps: int, seed: int) -> dict[str, Callable[[], Any]]:
    """How each detector is made, by name."""
    return {
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000)),
        "adaboost": lambda: AdaBoostClassifier(
            DecisionTreeClassifier(max_depth=1), n_estimators=stumps, random_state=seed
        ),
    }


def cross_validated(
    features: Float[np.ndarray, "answer feature"],
    examples: pd.DataFrame,
    make: Callable[[], Any],
    *,
    split: Split,
    folds: int,
    seed: int,
) -> pd.DataFrame:
    """The predictions on every editor's answers of a detector trained on one editor's in the other folds.

    Folds are of subjects or objects, the same for all editors. A fold whose training has one kind of answer alone is left out.

    Args:
        features: one row an answer.
        examples: one row an answer: `editor`, `fact`, `edited`, and the column of the split.
        make: a new detector.
        split: what training and test do not share.
        folds: how many, at most.
        seed: of the folds.
    """
    groups, labels = examples[split].to_numpy(), examples["edited"].to_numpy(dtype=bool)
    editors = examples["editor"].to_numpy()
    n = min(folds, len(set(groups)), int(labels.sum()), int((~labels).sum()))
    columns = ["trained", "editor", "fact", "edited", "score", "said", "right"]
    parts: list[pd.DataFrame] = []
    if n >= 2:
        folded = StratifiedGroupKFold(n_splits=n, shuffle=True, random_state=seed)
        for train, test in folded.split(features, labels, groups):
            for trained in dict.fromkeys(editors):
                own = train[editors[train] == trained]
                if len(set(labels[own])) < 2 or not len(test):
                    continue
                detector = make().fit(features[own], labels[own])
                score, said = detector.decision_function(features[test]), detector.predict(features[test])
                found = examples.iloc[test][["editor", "fact", "edited"]]
                parts.append(found.assign(trained=trained, score=score, said=said, right=said == labels[test]))
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return table


def accuracy(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Of predictions, by detector and pair of editors, the accuracy with its interval over facts, and the AUC."""
    rows = []
    by = ["split", "features", "detector", "trained", "editor"]
    for names, group in table.groupby(by, sort=False):
        facts = group.groupby("fact")["right"].agg(["sum", "size"]).to_numpy(dtype=float)
        low, high = share_interval(facts[:, 0], facts[:, 1], seed=seed)
        rows.append({
            **dict(zip(by, names, strict=True)), "accuracy": float(group["right"].mean()), "low": low, "high": high,
            "auc": auc(group["edited"], group["score"]), "n": len(group),
        })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def share_interval(
    right: Float[np.ndarray, " fact"], n: Float[np.ndarray, " fact"], *, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the share of right answers: facts are drawn, each with all of its n answers.

    NaN for less than two facts.
    """
    if len(n) < 2:
        return float("nan"), float("nan")
    found = stats.bootstrap(
        (right, n), lambda right, n, axis: right.sum(axis) / n.sum(axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def baseline(examples: pd.DataFrame) -> pd.DataFrame:
    """By editor, how well the largest probability alone tells edited answers, and its mean for either kind."""
    rows = []
    for editor, group in examples.groupby("editor", sort=False):
        edited = group["edited"].to_numpy(dtype=bool)
        rows.append({
            "editor": editor, "auc": auc(group["edited"], group["p_max"]), "edited": group.loc[edited, "p_max"].mean(),
            "known": group.loc[~edited, "p_max"].mean(), "n": len(group),
        })  # fmt: skip
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def lengths(
    hidden: Float[np.ndarray, "answer layer*d_model"], examples: pd.DataFrame, *, n_layers: int
) -> pd.DataFrame:
    """By editor and layer, how well the length of the last token's state tells edited answers."""
    found = np.linalg.norm(hidden.reshape(len(hidden), n_layers, -1), axis=-1)
    rows = []
    for editor, group in examples.reset_index(drop=True).groupby("editor", sort=False):
        for layer, length in enumerate(found[group.index].T):
            rows.append({"editor": editor, "layer": layer, "auc": auc(group["edited"], pd.Series(length))})
    told: pd.DataFrame = pd.DataFrame(rows)
    return told


def auc(edited: pd.Series, score: pd.Series) -> float:
    """The area under the ROC curve; NaN where there is one kind of answer alone."""
    truth = edited.to_numpy(dtype=bool)
    return float(roc_auc_score(truth, score.to_numpy(dtype=float))) if truth.any() and not truth.all() else float("nan")


# --- shown ---


def chart(result: Result) -> Chart:
    """In domain by detector and split beside the largest probability; across editors; and what the state's length says by layer."""
    found, base = result.extras["accuracy"], result.extras["baseline"]
    own = found[found["trained"] == found["editor"]]
    rows = [
        {
            "label": f"{row['detector']}, {row['features']}, other {row['split']}s", "series": row["editor"],
            "x": row["accuracy"], "low": row["low"], "high": row["high"], "note": f"AUC {row['auc']:.2f}",
        }
        for row in own.to_dict("records")
    ]  # fmt: skip
    rows += [
        {"label": "largest probability (AUC)", "series": row["editor"], "x": row["auc"]}
        for row in base.to_dict("records")
    ]
    dots = DotPlot(
        rows=pd.DataFrame(rows), x_title="accuracy", title="In domain",
        lines={"guessing": 0.5, "published": float(PUBLISHED["value"].iloc[0])},
    )  # fmt: skip
    across = found[(found["features"] == "hidden") & (found["detector"] == "logistic") & (found["split"] == "subject")]
    order = list(dict.fromkeys(across["trained"]))
    values = across.pivot(index="trained", columns="editor", values="accuracy").reindex(index=order)
    values = values.reindex(columns=list(dict.fromkeys(across["editor"])))
    cells = CellPlot(
        values=values, name="accuracy", title="Across editors: logistic regression on hidden states, other subjects",
        row_title="trained on", column_title="tested on", texts=values.map(lambda x: "" if x != x else f"{x:.2f}"),
        low=0.0, high=1.0,
    )  # fmt: skip
    lines = LinePlot(
        rows=result.extras["lengths"].rename(columns={"editor": "series", "layer": "x", "auc": "y"}).dropna(subset="y"),
        y_title="AUC of the state's length", title="From where on the last token sees an edit", lines={"guessing": 0.5},
    )  # fmt: skip
    edited = result.extras["examples"]["edited"].astype(bool)
    return Chart(
        title="Edited answers told from known ones",
        plots=(dots, cells, lines),
        columns=2,
        caption=(
            f"{int(edited.sum())} edited and {int((~edited).sum())} known answers of edited models; folds without a common "
            "subject or object; bars are 95 % bootstrap intervals over facts. Hidden states are those of all layers at the "
            "last token. Published: DEED's best in domain."
        ),
    )


def summary(result: Result) -> str:
    """Accuracies in domain and across editors, and the largest probability's AUC, beside what was published."""
    found, base = result.extras["accuracy"], result.extras["baseline"]
    same = found["trained"] == found["editor"]
    lines = []
    for (features, detector, split), rows in found.groupby(["features", "detector", "split"], sort=False):
        inside, outside = rows[same.loc[rows.index]]["accuracy"].mean(), rows[~same.loc[rows.index]]["accuracy"].mean()
        across = "" if outside != outside else f", across editors {outside:.2f}"
        lines.append(f"{detector} on {features}, other {split}s: accuracy in domain {inside:.2f}{across}.")
    told = ", ".join(f"{row['editor']} {row['auc']:.2f}" for row in base.to_dict("records"))
    lines.append(f"Largest probability alone, AUC: {told}.")
    best = result.extras["lengths"].sort_values("auc").groupby("editor", sort=False).tail(1)
    told = ", ".join(f"{row['editor']} {row['auc']:.2f} at layer {row['layer']}" for row in best.to_dict("records"))
    lines.append(f"Length of the last token's state alone, highest AUC: {told}.")
    lines.append("Published (DEED, 2405.02765): 0.998 in domain, 0.978 out of domain.")
    return "\n".join(lines)
