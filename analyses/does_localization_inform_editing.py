"""Does localization inform editing? Edits at every layer, against what a locator says about the layer.

Hase et al. 2023 (arXiv 2301.04213), sections 4 and 5. Claim: which layer is edited explains most of how well an edit works, and how
large the causal trace of the very fact is there adds next to nothing (at most 3.2 points of R^2).

1. The trace of a fact at a layer: the largest fraction of the corrupted probability that MLP outputs around it restore, over
   tokens, not below 0 (sec. 4.1). Any other locator can stand in its place; then it is the largest value over tokens.
2. Every fact is edited at every layer by each editor, for five problems (sec. 5.1). The answer o after the prompt (s, r):
   `error_injection` raises p(o_false); `tracing_reversal` raises p(o_noise), what the model says when s is noised; `fact_erasure`
   lowers p(o_true); `fact_amplification` raises p(o_true); `fact_forcing` raises p(o_true) after the prompt with the noised s.
3. Scores (sec. 4.2), p* after the edit: Rewrite (p* - p) / (1 - p), not below 0, for erasure (p - p*) / p; Paraphrase the same
   after paraphrases; Neighborhood 1 - |p* - p| / (0.5 + |p - 0.5|) for o after neighbors' prompts; Overall the mean of the three;
   Essence 1 minus a fifth of the rise in perplexity of texts about s, cut to 0..1. Of several prompts the mean.
4. Score ~ layer (categorical), score ~ trace, and score ~ layer * trace, as in the published notebook; R^2 of each, and the F-test
   of the last against the first. With few facts the slopes gain by chance alone: `chance` is the mean gain with the traces
   shuffled over the facts, `p_permuted` how often that is as large as `gain`, and `more` is `gain` - `chance`.

Departures: all layers, not nine of 28; the window of FT5 and MEMIT is narrower below 20 layers; editors see the prompt alone,
without random prefixes and essence prompts (`analyses.layer_edits`), with their settings for the model in all problems, but
fine-tuning takes twice the steps in forcing, as published, and amplification takes all of its steps, since the bundled models are
almost sure of their facts; one draw of the noise; o_noise has as many tokens as o_true where the paper has up to 12; facts that the
model does not say are left out, those with o_noise = o_true from reversal, and those with p(o_true) < 0.02 from erasure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from analyses.injection import interval
from analyses.layer_edits import (
    Ascent,
    EditorName,
    LayerEditor,
    Moments,
    edit_every_layer,
    layer_editor,
    log_p_with,
    noised,
)
from analyses.series import locate_each
from workbench import zoo
from workbench.charts import Chart, DotPlot, LinePlot, Plot
from workbench.editors.fine_tune import FineTune
from workbench.editors.memit import spread_over
from workbench.errors import InputError
from workbench.facts import Fact, FactError, distinct_facts
from workbench.generation import continue_prompts, continue_tokens
from workbench.hooks import patched, run
from workbench.locators import Locator, locator_named
from workbench.models import LM
from workbench.noise import Noise, draw, subject_sigma
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.sites import Site
from workbench.store import Store

Problem = Literal["error_injection", "tracing_reversal", "fact_erasure", "fact_amplification", "fact_forcing"]

LocatorName = Literal[
    "ActivationPatching", "AttentionKnockout", "AttributionPatching", "CausalTrace", "CircuitEdges", "DirectLogitAttribution",
    "HardConcrete", "KnowledgeNeurons", "LogitLens", "RepresentationZeroing", "SubjectRelation", "ValueVectors",
]  # fmt: skip

SCORES = ("rewrite", "paraphrase", "neighborhood", "overall", "essence")
"""Columns of the table that are scores, 0 to 1; larger is better."""

PUBLISHED: Mapping[tuple[Problem, EditorName], tuple[float, float, float]] = {
    ("error_injection", "FT"): (0.756, 0.062, 0.758),
    ("error_injection", "FT5"): (0.775, 0.055, 0.777),
    ("error_injection", "ROME"): (0.947, 0.016, 0.948),
    ("error_injection", "MEMIT"): (0.677, 0.024, 0.678),
    ("tracing_reversal", "FT"): (0.067, 0.000, 0.067),
    ("tracing_reversal", "FT5"): (0.751, 0.045, 0.752),
    ("tracing_reversal", "ROME"): (0.294, 0.017, 0.310),
    ("tracing_reversal", "MEMIT"): (0.212, 0.036, 0.218),
    ("fact_erasure", "FT"): (0.643, 0.028, 0.646),
    ("fact_erasure", "FT5"): (0.698, 0.025, 0.700),
    ("fact_erasure", "ROME"): (0.857, 0.019, 0.858),
    ("fact_erasure", "MEMIT"): (0.925, 0.019, 0.925),
    ("fact_amplification", "FT"): (0.383, 0.014, 0.393),
    ("fact_amplification", "FT5"): (0.424, 0.010, 0.436),
    ("fact_amplification", "ROME"): (0.880, 0.020, 0.880),
    ("fact_amplification", "MEMIT"): (0.905, 0.018, 0.906),
    ("fact_forcing", "FT"): (0.697, 0.104, 0.724),
    ("fact_forcing", "FT5"): (0.634, 0.100, 0.666),
    ("fact_forcing", "ROME"): (0.422, 0.004, 0.425),
    ("fact_forcing", "MEMIT"): (0.345, 0.041, 0.354),
}
"""R^2 of layer, tracing and both for the Rewrite score of GPT-J, Tables 1 and 3 of the paper (n = 652, erasure 489)."""

LEAST_P = 0.02
"""Answers less probable than this are not erased (App. A)."""

NOISE = "s3"
"""Of the subject's embeddings, as in the trace."""

_SURE = 1e-7
"""Probabilities this near to 0 or 1 are not divided by their distance."""

_PERMUTATIONS = 200


def does_localization_inform_editing(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[EditorName, ...] = ("FT", "FT5", "ROME", "MEMIT"),
    problems: tuple[Problem, ...] = (
        "error_injection",
        "tracing_reversal",
        "fact_erasure",
        "fact_amplification",
        "fact_forcing",
    ),
    locator: LocatorName = "CausalTrace",
    width: int | None = None,
    bound: float | None = 0.01,
    probes: int = 2,
    essence: int = 0,
    resamples: int = 200,
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Edits every fact at every layer, and asks what explains how well that works.

    Args:
        lm: the model.
        facts: with `target_true` and `target_new`; paraphrases and neighbors as far as they are there.
        editors: FT changes one layer, FT5 and MEMIT a window of them.
        problems: what edits are to do, see the paper's section 5.1.
        locator: what says where a fact is, instead of the causal trace of MLP outputs.
        width: layers that FT5, MEMIT and the trace take together; default: a quarter of all, at most 5.
        bound: the most by which fine-tuning changes a weight, and twice of what FT5 may; it is tuned to a model so that edits do
            not all succeed (GPT-J: 0.0001); none: no bound.
        probes: how many paraphrases and how many neighbors are scored; the published code takes one.
        essence: how many texts about the subject are scored; the paper takes 5, none are quicker.
        resamples: bootstrap resamples of the facts, for the correlations' intervals.
        seed: of the noise, of the texts, of the bootstrap, and of the permutations.
        store: where the scores of each fact, problem and editor are kept, and traces.

    Returns:
        One row a problem, editor, fact and layer (0-based) with `SCORES` (NaN without such prompts), `before` and `after` (the
        probability of the answer after the prompt) and `trace`. Extras: `r2` (a row a problem, editor and score: r2_layer with
        r2_layer_low and r2_layer_high, r2_trace, r2_both, gain, chance, more with low and high, f, p, p_permuted, n facts, and
        `published_`... where there are; see `explained`), `correlation` (of trace and Rewrite over facts, by layer), `cost`
        (seconds).

    Raises:
        InputError: no fact is left that can be edited and located.
        ModelError: the model normalises what its MLPs add.
    """
    facts = distinct_facts(facts, to="edit")
    together = spread_over(lm) if width is None else width
    left_out: dict[str, str] = {}
    known = []
    for fact in facts:
        if why := _unfit(lm, fact):
            left_out[f"all: {fact.id}"] = why
        else:
            known.append(fact)
    if not known:
        raise FactError(f"No fact can be edited. The first: {next(iter(left_out.values()))}")
    traces = _traces(lm, known, locator, together, left_out, store)
    sigma = subject_sigma(lm, [fact.subject for fact in known])
    noise = str(Noise.parse(NOISE).absolute(sigma))
    options = {"width": together, "bound": bound, "probes": probes, "essence": essence, "seed": seed, "noise": noise}
    bench = _Bench(lm=lm, options=options, store=store)
    steps = [(fact, problem) for fact in known if fact.id in traces.index for problem in problems]
    parts = []
    for fact, problem in track(steps, "facts", len(steps)):
        try:
            parts.append(bench.scores(fact, problem, editors))
        except InputError as error:
            left_out[f"{problem}: {fact.id}"] = str(error)
    if not parts:
        raise FactError(f"No fact can be edited and located. The first: {next(iter(left_out.values()))}")
    table = pd.concat(parts, ignore_index=True)
    where = traces.rename_axis(columns="layer").stack().rename("trace").reset_index()
    table = table.merge(where, on=["fact", "layer"], how="left", sort=False)
    r2, correlation = [], []
    for (problem_, editor), own in table.groupby(["problem", "editor"], sort=False):
        told = {"problem": problem_, "editor": editor}
        for score in SCORES:
            y, x = _matrices(own, score)
            if len(y) > 2:
                found = explained(y, x, seed=seed)
                r2.append({**told, "score": score, **found, **_published(problem_, editor, score)})
        y, x = _matrices(own, "rewrite")
        correlation += [{**told, **row} for row in _correlations(y, x, own, resamples, seed)]
    run_ = manifest(
        "does_localization_inform_editing", model=lm.protocol, parameters={**options, "locator": locator}, facts=facts,
        left_out=left_out, jackknife={"of": "r2", "level": 0.95},
        bootstrap={"of": "correlation", "resamples": resamples, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    cost = pd.DataFrame([{"what": what, "seconds": round(seconds, 2)} for what, seconds in bench.seconds.items()])
    told_of = [
        "problem", "editor", "score", "r2_layer", "r2_trace", "r2_both", "gain", "chance", "more", "published_layer",
    ]  # fmt: skip
    extras = {
        "r2": pd.DataFrame(r2, columns=None if r2 else told_of),
        "correlation": pd.DataFrame(correlation),
        "cost": cost,
    }
    return Result(table=table, run=run_, extras=extras)


# --- where the facts are ---


def _unfit(lm: LM, fact: Fact) -> str:
    """Why a fact is left out of everything; empty where it is not."""
    if not fact.target_true or not fact.target_new:
        return f"{fact.id!r} has no {'target_new' if fact.target_true else 'target_true'}. Give both answers."
    said = int(run(lm, lm.encode([fact])).last_logits[0].argmax())
    if said != lm.target_ids(fact.text, fact.target_true)[0]:
        return f"The model says {lm.word(said).strip()!r} after {fact.text!r} and not {fact.target_true!r}."
    return ""


def _traces(
    lm: LM, facts: Sequence[Fact], name: str, width: int, left_out: dict[str, str], store: Store | None
) -> pd.DataFrame:
    """A row a fact that could be located, a column a layer."""
    if name == "CausalTrace":
        one: Locator = locator_named(name).fitted(lm, kinds=("mlp_out",), window=width, score="p_target")
    else:
        one = locator_named(name).fitted(lm)
    located = locate_each(lm, [one], facts, reference=facts, store=store)
    series = {one.kind: one.values for one in located.series(lm.n_layers, None)}
    kind = next((kind for kind in ("mlp_out", "mlp_post") if kind in series), next(iter(series)))
    values: pd.DataFrame = series[kind].fillna(0.0)
    for fact in facts:
        if fact.id not in values.index:
            left_out[f"{name}: {fact.id}"] = str(located.methods["reason"].iloc[0])
    if name == "CausalTrace":
        told = located.footprints[0].extras["facts"].set_index("fact")["total_effect"].reindex(values.index)
        values = values.div(told.abs().clip(lower=_SURE), axis=0).clip(lower=0.0)
    return values


# --- edits and their scores ---


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompt:
    """A prompt whose answer is scored."""

    text: Fact | str
    noise: Float[Tensor, "pos d_model"] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """Edits facts at all layers and scores that; runs without an edit are shared by problems and editors."""

    lm: LM
    options: Mapping[str, Any]
    store: Store | None
    ascents: dict[Any, Ascent] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def scores(self, fact: Fact, problem: Problem, editors: Sequence[EditorName]) -> pd.DataFrame:
        """The rows of a fact and a problem: from the store, and what is missing there together.

        Raises:
            InputError: the problem cannot be posed for this fact.
        """
        asked = {name: self._asked(fact, problem, name) for name in editors}
        found: dict[EditorName, pd.DataFrame] = {}
        for name, run_ in asked.items():
            if self.store is not None and (kept := self.store.find(run_, Result)) is not None:
                found[name] = kept.table
        missing = [name for name in editors if name not in found]
        for name, table in (self._made(fact, problem, missing) if missing else {}).items():
            found[name] = table
            if self.store is not None:
                self.store.save(Result(table=table, run=asked[name]))
        rows: pd.DataFrame = pd.concat([found[name] for name in editors], ignore_index=True)
        return rows

    def _asked(self, fact: Fact, problem: Problem, name: EditorName) -> dict[str, Any]:
        parameters = {**self.options, "problem": problem, "editor": name, "settings": repr(self._editor(name, problem))}
        return manifest("Edits at every layer", model=self.lm.protocol, parameters=parameters, facts=[fact])

    def _made(self, fact: Fact, problem: Problem, names: Sequence[EditorName]) -> dict[EditorName, pd.DataFrame]:
        if not any(key[0] == fact.id for key in self.ascents):
            self.ascents.clear()
        lower, clock = problem == "fact_erasure", _Clock(self.seconds)
        noise = self._noise(fact)
        answer = self._answer(fact, problem, noise)
        noisy = noise if problem == "fact_forcing" else None
        own = self._ascent(fact, _Prompt(text=fact, noise=noisy), answer)
        if lower and float(own.own.sum().exp()) < LEAST_P:
            raise FactError(
                f"p({answer!r}) after {fact.text!r} is below {LEAST_P}, so there is nothing to erase. Take a known fact."
            )
        clock.note("runs without edits")
        edits = edit_every_layer(
            own, {name: self._editor(name, problem) for name in names}, self.moments,
            width=int(self.options["width"]), lower=lower, done=clock.note,
        )  # fmt: skip
        n = int(self.options["probes"])
        groups = {
            "rewrite": [own],
            "paraphrase": [
                self._ascent(fact, _Prompt(text=self._worded(fact, text, noisy), noise=noisy), answer)
                for text in fact.paraphrases[:n]
            ],
            "neighborhood": [self._ascent(fact, _Prompt(text=one.prompt), answer) for one in fact.neighbors[:n]],
            "essence": self._texts(fact),
        }
        rows = [(name, layer) for name in names for layer in edits[name]]
        every = [edits[name][layer] for name, layer in rows]
        clock.note("runs without edits")
        after = {what: [_p(log_p_with(one, every)) for one in ascents] for what, ascents in groups.items()}
        lost = [log_p_with(one, every).mean(1).cpu().double().numpy() for one in groups["essence"]]
        clock.note("scores")
        table = pd.DataFrame(rows, columns=["editor", "layer"]).assign(problem=problem, fact=fact.id)
        for what in ("rewrite", "paraphrase", "neighborhood"):
            score = neighborhood_score if what == "neighborhood" else erased if lower else recovered
            values = [score(_p(a.own[None])[0], p) for a, p in zip(groups[what], after[what], strict=True)]
            table[what] = np.mean(values, axis=0) if values else np.nan
        table["overall"] = table[["rewrite", "paraphrase", "neighborhood"]].mean(axis=1, skipna=False)
        rises = [
            np.exp(-p) - np.exp(-float(a.own.mean())) for a, p in zip(groups["essence"], lost, strict=True)
        ]  # fmt: skip
        table["essence"] = np.clip(1 - np.mean(rises, axis=0) / 5, 0, 1) if rises else np.nan
        table["before"], table["after"] = _p(own.own[None])[0], after["rewrite"][0]
        columns = ["problem", "editor", "fact", "layer", *SCORES, "before", "after"]
        return {
            name: pd.DataFrame(table.loc[table["editor"] == name, columns]).reset_index(drop=True) for name in names
        }

    def _editor(self, name: EditorName, problem: Problem) -> LayerEditor:
        """An editor as it is set for this model and problem."""
        stop = {"fact_amplification": {"stop_below": 0.0}, "fact_erasure": {"stop_below": 0.01}}.get(problem, {})
        editor = layer_editor(self.lm, name, bound=self.options["bound"], **stop)
        if isinstance(editor, FineTune) and problem == "fact_forcing":
            return replace(editor, steps=2 * editor.steps)
        return editor

    def _answer(self, fact: Fact, problem: Problem, noise: Tensor) -> str:
        """What the edit is about."""
        if problem == "error_injection":
            return fact.target_new or ""
        if problem != "tracing_reversal":
            return fact.target_true
        lm, tokens = self.lm, self.lm.encode([fact])
        n = len(lm.target_ids(fact.text, fact.target_true))
        with patched(lm, {Site(layer=0, kind="embed"): noised(tokens, noise)}):
            said = lm.tokenizer.decode(continue_tokens(lm, tokens, n=n, top_k=1, seed=0)[0], skip_special_tokens=True)
        if said.strip() == fact.target_true:
            raise FactError(
                f"The model says {said.strip()!r} after {fact.text!r} with noise too, so there is nothing to reverse."
            )
        return str(said.strip())

    def _noise(self, fact: Fact) -> Float[Tensor, "pos d_model"]:
        """Noise for the subject's tokens, with some to spare for wordings in which it has more."""
        start, stop = self.lm.encode([fact]).spans[0] or (0, 0)
        noise = Noise.parse(self.options["noise"])
        return draw(self.lm, noise, samples=1, tokens=stop - start + 4, seed=int(self.options["seed"]))[0]

    def _worded(self, fact: Fact, text: str, noise: Tensor | None) -> Fact | str:
        """A paraphrase; with noise, as a fact whose subject is known, where it has one."""
        return Fact.typed(text=text, subject=fact.subject) if noise is not None and fact.subject in text else text

    def _ascent(self, fact: Fact, prompt: _Prompt, answer: str) -> Ascent:
        key = (fact.id, prompt.text, answer, prompt.noise is not None)
        if key not in self.ascents:
            noise = prompt.noise if isinstance(prompt.text, Fact) else None
            self.ascents[key] = Ascent.of(self.lm, prompt.text, answer, noise=noise)
        return self.ascents[key]

    def _texts(self, fact: Fact) -> list[Ascent]:
        """What the model writes about the subject, as answers of `s is a`."""
        n = int(self.options["essence"])
        if not n:
            return []
        prompt = f"{fact.subject} is a"
        seeds = [int(self.options["seed"]) + i for i in range(n)]
        texts = [continue_prompts(self.lm, [prompt], n=20, top_k=5, seed=seed)[0].strip() for seed in seeds]
        return [self._ascent(fact, _Prompt(text=prompt), text) for text in dict.fromkeys(texts) if text]


class _Clock:
    """Adds the seconds since the last note to entries."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def note(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def _p(log_p: Float[Tensor, "row step"]) -> Float[np.ndarray, " row"]:
    """Probabilities of whole answers."""
    p: np.ndarray = log_p.double().sum(1).exp().cpu().numpy()
    return p


def recovered(before: float, after: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Rewrite and Paraphrase: how much of what was missing to probability 1 an edit brings, 0 to 1."""
    return np.maximum(0.0, (after - before) / max(1 - before, _SURE))


def erased(before: float, after: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The same for erasure: which part of the probability is gone, 0 to 1."""
    return np.maximum(0.0, (before - after) / max(before, _SURE))


def neighborhood_score(before: float, after: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """1 where the probability stays, 0 where it moves as far as it can."""
    return 1 - np.abs(after - before) / (0.5 + abs(before - 0.5))


# --- what explains a score ---


def explained(
    score: Float[np.ndarray, "fact layer"], trace: Float[np.ndarray, "fact layer"], *, seed: int
) -> dict[str, Any]:
    """R^2 of the three regressions, over all facts and layers, and the F-test of the largest against layer alone.

    Score ~ layer * trace has an intercept and a slope for every layer, so its residuals are those of one line a layer.

    - `gain`: what the slopes add to layer alone; never negative, and upwards biased with few facts.
    - `chance`: its mean over all ways to shuffle the traces over the n facts. Shuffled, r^2 within a layer is 1 / (n - 1) in the
      mean, so that each layer in which the trace differs gains that part of what layer alone leaves there.
    - `more`: gain - chance, with the interval `low` to `high`; about 0 for a trace that says nothing.

    Intervals are Student's t with the standard errors of the delete-one-fact jackknife: of R^2 for layer alone, and of the root of
    the gain, squared again, for `more`; near 0 it is the root that is about normal. A bootstrap would not do: a fact drawn twice
    fits itself, so that its gains are all too large.

    Args:
        score: what is explained.
        trace: by what.
        seed: of the permutations for `p_permuted`.
    """
    whole, layer, line, both, slopes, sloped = (float(x) for x in _squares(score, trace))
    n, parameters = len(score), score.shape[1] + int(slopes)
    spare = score.size - parameters
    f = (layer - both) / slopes / (both / spare) if slopes and spare > 0 and both > 0 else np.nan
    whole = whole or np.nan
    gain, chance = (layer - both) / whole, sloped / (n - 1) / whole
    rng = np.random.default_rng(seed)
    shuffled = _squares(
        np.broadcast_to(score, (_PERMUTATIONS, *score.shape)),
        np.stack([trace[rng.permutation(n)] for _ in range(_PERMUTATIONS)]),
    )
    gains = (shuffled[1] - shuffled[3]) / whole
    rest = np.array([_squares(np.delete(score, i, 0), np.delete(trace, i, 0))[:4] for i in range(n)]).T
    with np.errstate(invalid="ignore", divide="ignore"):  # without one fact all scores may be equal
        off_layer = _half_width(1 - rest[1] / rest[0])
        off_root = _half_width(np.sqrt(np.maximum(rest[1] - rest[3], 0) / rest[0]))
    r2_layer, root = 1 - layer / whole, np.sqrt(np.maximum(gain, 0.0))
    low, high = np.clip([root - off_root, root + off_root], 0.0, 1.0) ** 2 - chance
    return {
        "r2_layer": r2_layer,
        "r2_layer_low": r2_layer - off_layer,
        "r2_layer_high": r2_layer + off_layer,
        "r2_trace": 1 - line / whole,
        "r2_both": 1 - both / whole,
        "gain": gain,
        "chance": chance,
        "more": gain - chance,
        "low": low,
        "high": high,
        "f": f,
        "p": float(stats.f.sf(f, slopes, spare)) if np.isfinite(f) else np.nan,
        "p_permuted": float((1 + (gains >= gain - 1e-12).sum()) / (1 + len(gains))) if np.isfinite(gain) else np.nan,
        "n": n,
    }


def _half_width(without: Float[np.ndarray, " fact"]) -> float:
    """Half of the 95 % jackknife interval of a value, from the values without each fact."""
    n = len(without)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return float(stats.t.ppf(0.975, n - 1) * error)


def _squares(
    y: Float[np.ndarray, "*batch fact layer"], x: Float[np.ndarray, "*batch fact layer"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums of squares around the mean, the layers' means, one line, and a line a layer; how many of these have a slope; and
    the sum around the means of the layers that have."""

    def left(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dy, dx = y - y.mean(-1, keepdims=True), x - x.mean(-1, keepdims=True)
        yy, xx, xy = (dy**2).sum(-1), (dx**2).sum(-1), (dx * dy).sum(-1)
        slopes = xx > 1e-12
        return yy, yy - np.divide(xy**2, xx, out=np.zeros_like(xy), where=slopes), slopes

    flat = (*y.shape[:-2], -1)
    whole, line, _ = left(y.reshape(flat), x.reshape(flat))
    layers, lines, slopes = left(y.swapaxes(-1, -2), x.swapaxes(-1, -2))
    return whole, layers.sum(-1), line, lines.sum(-1), slopes.sum(-1), (layers * slopes).sum(-1)


def _matrices(table: pd.DataFrame, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Score and trace (fact, layer) of the facts that have a score at every layer."""
    y = table.pivot(index="fact", columns="layer", values=score).dropna()
    x = table.pivot(index="fact", columns="layer", values="trace").reindex(y.index)
    return y.to_numpy(), x.to_numpy()


def _correlations(y: np.ndarray, x: np.ndarray, table: pd.DataFrame, resamples: int, seed: int) -> list[dict[str, Any]]:
    """By layer, Pearson's correlation over facts with its bootstrap interval; NaN where one of the two is constant."""
    drawn = np.random.default_rng(seed).integers(0, max(len(y), 1), (resamples, len(y)))
    rows = []
    for place, layer in enumerate(sorted(table["layer"].unique())):
        a, b = y[:, place], x[:, place]
        found = {"layer": layer, "rho": np.nan, "low": np.nan, "high": np.nan, "p": np.nan, "n": len(y)}
        if len(y) > 2 and np.ptp(a) > 1e-9 and np.ptp(b) > 1e-9:
            rho, p = stats.pearsonr(a, b)
            da, db = (v[drawn] - v[drawn].mean(1, keepdims=True) for v in (a, b))
            with np.errstate(invalid="ignore", divide="ignore"):
                each = (da * db).sum(1) / np.sqrt((da**2).sum(1) * (db**2).sum(1))
            low, high = np.nanquantile(each, (0.025, 0.975))
            found |= {"rho": float(rho), "p": float(p), "low": low, "high": high}
        rows.append(found)
    return rows


def _published(problem: Any, editor: Any, score: str) -> dict[str, float]:
    layer, trace, both = PUBLISHED[problem, editor] if score == "rewrite" else (np.nan, np.nan, np.nan)
    return {"published_layer": layer, "published_trace": trace, "published_both": both}


# --- what is shown ---


def chart(result: Result) -> Chart:
    """Rewrite scores and their correlation with the trace by layer (of the first problem), and R^2 beside the published one."""
    table, r2 = result.table, result.extras["r2"]
    first = table["problem"].iloc[0]
    shown = table[table["problem"] == first]
    rows = []
    for (editor, layer), own in shown.groupby(["editor", "layer"], sort=False):
        low, high = interval(own["rewrite"].to_numpy())
        rows.append({"series": editor, "x": layer, "y": own["rewrite"].mean(), "low": low, "high": high})
    shade, words = _band(result), first.replace("_", " ")
    correlation = result.extras["correlation"]
    correlation = correlation[correlation["problem"] == first].dropna(subset="rho")
    curves = correlation.rename(columns={"editor": "series", "layer": "x", "rho": "y"})
    plots: list[Plot] = [
        LinePlot(rows=pd.DataFrame(rows), y_title="Rewrite score", title=f"Editing: {words}", shade=shade),
        LinePlot(
            rows=curves[["series", "x", "y", "low", "high"]],
            y_title="Correlation with the trace over facts",
            title="Does the trace tell which facts are edited well?",
            shade=shade,
            lines={"none": 0.0},
        ),
    ]
    r2 = r2[r2["score"] == "rewrite"].dropna(subset="r2_layer")
    for title, prefix in (("This model", "r2_"), ("GPT-J, as published", "published_")):
        dots = [
            {
                "label": f"{row['problem'].replace('_', ' ')}, {row['editor']}",
                "series": name,
                "x": row[prefix + part],
            }
            for part, name in (("trace", "trace alone"), ("layer", "layer alone"), ("both", "both"))
            for row in r2.to_dict("records")
        ]
        plots.append(
            DotPlot(rows=pd.DataFrame(dots, columns=["label", "series", "x"]), x_title="R^2 of Rewrite", title=title)
        )
    locator, n = result.run["parameters"]["locator"], table["fact"].nunique()
    return Chart(
        title="Does localization inform editing?",
        plots=tuple(plots),
        columns=2,
        caption=(
            f"{n} facts edited at every layer (0-based) of {result.run['model']}; the trace is {locator}'s. Bands: 95 % bootstrap "
            "over facts. With few facts both has a higher R^2 than layer alone by chance; the table of R^2 has what is more."
        ),
    )


def _band(result: Result) -> range | None:
    """The layers in which a bundled model holds its facts."""
    name = Path(str(result.run["model"])).name
    band = zoo.organism(name).get("band") if name in zoo.NAMES else None
    return range(*band) if band else None


def summary(result: Result) -> str:
    """R^2 of the Rewrite score by problem and editor, ours and the published one, and what it cost."""
    r2 = result.extras["r2"]
    lines = [
        "R^2 of the Rewrite score: layer, trace, both (gain over layer; more than by chance; p of F) | published for GPT-J"
    ]
    lines += [
        f"{row['problem']:>18} {row['editor']:>5}  {row['r2_layer']:.3f} {row['r2_trace']:.3f} {row['r2_both']:.3f} "
        f"({row['gain']:+.3f}; {row['more']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]; p {row['p']:.2g}, permuted "
        f"{row['p_permuted']:.2g}, n {row['n']}) | {row['published_layer']:.3f} {row['published_trace']:.3f} "
        f"{row['published_both']:.3f}"
        for row in r2[r2["score"] == "rewrite"].to_dict("records")
    ]
    rewrite = r2[(r2["score"] == "rewrite") & r2["r2_layer"].notna()]
    if rewrite.empty:
        lines.append("Fewer than three facts, or scores that do not differ: there is nothing to explain.")
    else:
        added = (rewrite["published_both"] - rewrite["published_layer"]).mean()
        lines.append(
            f"Mean: layer alone {rewrite['r2_layer'].mean():.2f} (mean of the published tables "
            f"{rewrite['published_layer'].mean():.2f}, same problems and editors); the trace adds {rewrite['gain'].mean():+.3f} "
            f"(published {added:+.3f}), of which {rewrite['more'].mean():+.3f} is more than shuffled traces add."
        )
    cost = result.extras["cost"]
    spent = ", ".join(f"{row.what} {row.seconds:.0f} s" for row in cost.itertuples())
    lines.append(f"Cost: {spent or 'everything was in the store'}.")
    return "\n".join(lines)
