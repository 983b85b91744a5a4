"""What causal tracing and its estimates share: the protocol, the experiment that is run for a fact, and the resulting table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from typing_extensions import Self

from workbench.facts import Fact, FactError
from workbench.hooks import Activations, run
from workbench.locators.base import Locator
from workbench.locators.tables import fact_row, site_rows
from workbench.metrics import Answer, Score, ScoreKind
from workbench.models import LM, Tokens
from workbench.noise import Noise, draw, prompt_sigma, subject_sigma
from workbench.restoring import Cell, Restoration, Restored
from workbench.results import Footprint
from workbench.sites import KINDS, Role, SiteKind, window

MOST_SAMPLES = 10_000
"""More noise samples than anybody needs; a slip of the keyboard should not fill the memory."""

SMALLEST_EFFECT = 1e-4
"""Shares are taken of differences that are at least this part of the larger score; below it they would be rounding noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """What is run for one fact."""

    fact: Fact
    """The fact."""

    problem: Restoration
    """Its clean and corrupted runs."""

    cells: list[Cell]
    """What is restored."""

    answer: Answer
    """What is scored, with its foil."""

    sigma: float | None
    """The noise's number; None without noise."""

    said: int
    """The token that the model itself says."""


@dataclass(frozen=True, kw_only=True)
class Tracing(Locator):
    """The protocol of ROME's trace. Values are indirect effects: score with the cell restored minus score of the corrupted run.

    For `rank` and `kl`, where lower is better, the sign is turned, so that positive always means towards the clean run.
    """

    kinds: tuple[SiteKind, ...] = ("resid_post", "mlp_out", "attn_out")
    """The maps: which outputs are restored."""

    window: int = 10
    """How many layers of `mlp_out` and `attn_out` are restored together; other kinds are restored one layer at a time. ROME uses
    10 for models of 28 to 48 layers; `default_window` proposes one for smaller models."""

    window_rule: Literal["rome", "paper"] = "rome"
    """Which side of an even window has one layer more: ROME's code says below, its paper says above."""

    corrupt: Literal["noise", "swap"] = "noise"
    """`noise` on the subject's embeddings, or `swap` the subject for another of equal length (Zhang & Nanda, arXiv 2309.16042)."""

    noise: str | float = "s3"
    """Noise grammar of `workbench.noise`: s3, 0.1, u0.1, us3, m, t5."""

    sigma_from: Literal["subjects", "prompt"] = "subjects"
    """Where sigma_t of `s` and `us` comes from: all subjects of the facts given, as ROME does, or each prompt's own subject."""

    sigma_note: str = ""
    """Filled in when sigma_t is known: from what it was computed."""

    samples: int = 10
    """Noise samples of every cell."""

    seed: int = 1
    """Seed of the noise. Every cell of a fact, and every fact of equal subject length, gets the same draws."""

    replace: bool = False
    """Put the noise in the place of the embeddings instead of adding it; the corrupted baseline too."""

    substitutes: tuple[str, ...] = ()
    """For `swap`: subjects to choose from; empty: the other facts' subjects. The first of equal token length is taken."""

    score: ScoreKind = "p"
    """What is measured at the end of the prompt, see `workbench.metrics`."""

    token: Role | None = None
    """Restore only at tokens of this role (e.g. `subject_last` for a severed trace); None: at every token."""

    def __post_init__(self) -> None:
        Locator.__post_init__(self)
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise FactError(f"{self.samples} noise samples were asked for, expected 1 to {MOST_SAMPLES}.")
        if not 0 <= self.seed < 2**32:
            raise FactError(f"The seed is {self.seed}, expected 0 to {2**32 - 1}.")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise FactError(f"kinds is {self.kinds!r}, expected one or several different ones of {', '.join(KINDS)}.")
        window(0, self.window, 1)
        Noise.parse(self.noise)

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """With sigma_t of the facts' subjects put in, and substitutes to choose from."""
        for kind in self.kinds:
            lm.sites(kind)
        if self.corrupt == "swap":
            return replace(self, substitutes=self.substitutes or tuple(sorted({fact.subject for fact in facts})))
        noise = Noise.parse(self.noise)
        if not noise.relative or self.sigma_from == "prompt":
            return self
        sigma_t = subject_sigma(lm, [fact.subject for fact in facts])
        source = "1 fact's subject" if len(facts) == 1 else f"{len(facts)} facts' subjects"
        return replace(
            self,
            noise=str(noise.absolute(sigma_t)),
            sigma_note=self.sigma_note or f"{self.noise}: sigma_t = {sigma_t:.4g} of {source}",
        )

    def parts(self) -> tuple[Self, ...]:
        """One trace for each kind."""
        return tuple(replace(self, kinds=(kind,)) for kind in self.kinds)

    @property
    def part_name(self) -> str:
        """The kinds of sites that are restored."""
        return ", ".join(self.kinds)

    def locate_together(
        self, lm: LM, pieces: Sequence[tuple[Fact, Self]], *, memory: int | None = None
    ) -> list[Footprint]:
        """The maps of some facts; all kinds of all of them in one sweep."""
        asked: dict[Fact, list[SiteKind]] = {}
        for fact, part in pieces:
            asked.setdefault(fact, []).extend(part.kinds)
        traced = [replace(self, kinds=tuple(kinds))._experiment(lm, fact) for fact, kinds in asked.items()]
        restored = dict(zip(asked, self._restored(lm, traced, memory), strict=True))
        experiments = dict(zip(asked, traced, strict=True))
        return [part._footprint(lm, experiments[fact], restored[fact]) for fact, part in pieces]

    @abstractmethod
    def _restored(self, lm: LM, experiments: Sequence[Experiment], memory: int | None) -> list[Restored]:
        """The scores of each experiment's cells."""

    def _footprint(self, lm: LM, experiment: Experiment, restored: Restored) -> Footprint:
        """What the scores of an experiment say about this trace's kinds."""
        fact, answer, problem = experiment.fact, experiment.answer, experiment.problem
        mine = [i for i, cell in enumerate(experiment.cells) if cell.kind in self.kinds]
        scores, low = (x.cpu().double().numpy() for x in (restored.cells[mine], restored.corrupted))
        taken = np.ones_like(scores, dtype=bool) if restored.taken is None else restored.taken[mine].cpu().numpy()
        clean = float(restored.clean)
        if not (np.isfinite(scores[taken]).all() and np.isfinite(low).all()):
            raise FactError(
                f"The corrupted run of {fact.text!r} gives no number in {str(lm.dtype).removeprefix('torch.')}. "
                "Use less noise, or float32."
            )
        prompt = "" if problem.noise is not None else "".join(problem.corrupted.texts[0])
        table, samples = self._tables(fact, problem.clean, [experiment.cells[i] for i in mine], scores, low)
        if restored.taken is not None:
            table["samples"] = taken.sum(1)
        if restored.estimated is not None and restored.estimate is not None:
            table["estimated"] = restored.estimated[mine].cpu().numpy()
            table["estimate"] = self._sign * restored.estimate[mine].cpu().numpy()
        facts = fact_row(
            lm,
            fact,
            answer,
            said=experiment.said,
            clean=clean,
            corrupted=low.mean(),
            corrupted_se=standard_error(low[None])[0],
            total_effect=self._sign * (clean - low.mean()),
            sigma=np.nan if experiment.sigma is None else experiment.sigma,
            corrupted_prompt=prompt,
        )
        swapped = {"counterfactuals": {fact.id: prompt}} if prompt else {}
        return Footprint(
            table=table,
            run=self._manifest(lm, fact, sigma=experiment.sigma, unit=self._unit, engine=restored.engine, **swapped),
            extras={"facts": facts, "samples": samples},
        )

    @property
    def _unit(self) -> str:
        return f"indirect effect in {self.score}"

    @property
    def _severed(self) -> SiteKind | None:
        """Which outputs are held at their corrupted values."""
        return None

    @property
    def _sign(self) -> int:
        return -1 if self.score in ("rank", "kl") else 1

    def _experiment(self, lm: LM, fact: Fact) -> Experiment:
        """What is run for a fact."""
        clean = run(lm, lm.encode([fact]))
        answer = find_answer(lm, fact, clean)
        whole = (answer.text,) if self.score in ("p_target", "logp") and len(answer.ids) > 1 else None
        tokens = lm.encode([fact], targets=whole)
        noise, sigma, spans = None, None, tokens.spans[0]
        assert spans is not None  # a Fact always has a subject
        if self.corrupt == "noise":
            parsed = Noise.parse(self.noise)
            if parsed.relative:
                parsed = parsed.absolute(prompt_sigma(lm, tokens.ids[0, spans[0] : spans[1]].tolist()))
            sigma = parsed.number
            noise = self._drawn(lm, parsed, tokens, range(*spans))
            corrupted = tokens.repeat(self.samples)
            foil_logits = clean.last_logits[0]
        else:
            corrupted = next(counterparts(lm, fact, tokens, targets=whole, substitutes=self.substitutes))
            foil_logits = run(lm, corrupted).logits[0, corrupted.last[0]]
        if self.score == "logit_diff":
            answer = with_foil(lm, fact, answer, foil_logits)
        problem = Restoration(
            clean=tokens,
            corrupted=corrupted,
            noise=noise,
            replace=self.replace,
            sever=self._severed,
            steps=len(answer.ids) if whole else 1,
            score=Score(kind=self.score, answer=answer, clean=clean.last_logits[0]),
        )
        return Experiment(
            fact=fact,
            problem=problem,
            cells=self._cells(lm, tokens),
            answer=answer,
            sigma=sigma,
            said=int(clean.last_logits[0].argmax()),
        )

    def _drawn(
        self, lm: LM, noise: Noise, tokens: Tokens, positions: Sequence[int]
    ) -> Float[torch.Tensor, "sample pos d_model"]:
        """Samples of the noise at some positions, zero elsewhere."""
        drawn = torch.zeros(self.samples, tokens.ids.shape[1], lm.d_model, dtype=torch.float64)
        drawn[:, positions] = draw(lm, noise, samples=self.samples, tokens=len(positions), seed=self.seed)
        return drawn.to(lm.device, lm.dtype)

    def _cells(self, lm: LM, tokens: Tokens) -> list[Cell]:
        roles = tokens.roles()
        positions = [i for i in range(tokens.lengths[0]) if self.token is None or bool(tokens.at(self.token)[0, i])]
        if not positions:
            raise FactError(f"No token of the prompt is {self.token!r}; its tokens are {', '.join(roles)}.")
        return [
            Cell(kind=kind, layer=site.layer, layers=self._layers(kind, site.layer, lm.n_layers), position=position)
            for kind in self.kinds
            for position in positions
            for site in lm.sites(kind)
        ]

    def _layers(self, kind: SiteKind, layer: int, n_layers: int) -> range:
        if kind in ("mlp_out", "attn_out"):
            return window(layer, self.window, n_layers, rule=self.window_rule)
        return range(layer, layer + 1)

    def _tables(
        self, fact: Fact, tokens: Tokens, cells: Sequence[Cell], scores: np.ndarray, low: np.ndarray
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The footprint's rows, and every sample's score."""
        effects = self._sign * (scores - low)
        table = site_rows(
            fact,
            tokens,
            kind=[cell.kind for cell in cells],
            layer=[cell.layer for cell in cells],
            position=[cell.position for cell in cells],
            value=np.nanmean(effects, 1),
            se=standard_error(effects),
            score=np.nanmean(scores, 1),
        )
        n = scores.shape[1]
        samples = pd.DataFrame(
            {
                "fact": fact.id,
                "site": np.repeat(table["site"].to_numpy(), n),
                "sample": np.tile(np.arange(n), len(cells)),
                "score": scores.ravel(),
                "corrupted": np.tile(low, len(cells)),
            }
        )
        return table, samples.dropna(subset="score", ignore_index=True)


def require_effect(clean: float, corrupted: float, *, score: ScoreKind, between: str) -> None:
    """Raises FactError where the scores of two runs differ too little to take shares of their difference."""
    if not abs(clean - corrupted) > SMALLEST_EFFECT * max(abs(clean), abs(corrupted)):
        raise FactError(
            f"{between} differ by {clean - corrupted:.1e} in {score}, from {clean:.3g}: there is no effect to take shares of. "
            "Take another corruption, or a fact that the model knows."
        )


def find_answer(lm: LM, fact: Fact, clean: Activations) -> Answer:
    """The fact's own answer, or the model's most probable next token where the fact has none."""
    if fact.target_true:
        return Answer(text=fact.target_true, ids=tuple(lm.target_ids(fact.text, fact.target_true)))
    top = int(clean.last_logits[0].argmax())
    return Answer(text=lm.word(top).strip(), ids=(top,))


def with_foil(lm: LM, fact: Fact, answer: Answer, logits: torch.Tensor) -> Answer:
    """The answer with what it is compared to: the fact's target_new, or the best other token of `logits`.

    Raises:
        FactError: target_new begins with the answer's first token, so that their logits are one.
    """
    if not fact.target_new:
        return with_best_foil(lm, answer, logits)
    foil = lm.target_ids(fact.text, fact.target_new)[0]
    if foil == answer.ids[0]:
        raise FactError(
            f"{answer.text!r} and {fact.target_new!r} begin with the same token, so their logits do not differ. "
            "Use another score than logit_diff, or another target_new."
        )
    return replace(answer, foil_id=foil, foil_text=fact.target_new)


def with_best_foil(lm: LM, answer: Answer, logits: torch.Tensor) -> Answer:
    """The answer compared to the most probable token of `logits` that is another."""
    best, second = logits.topk(2).indices.tolist()
    foil = second if best == answer.ids[0] else best
    return replace(answer, foil_id=foil, foil_text=lm.word(foil).strip())


def counterparts(
    lm: LM, fact: Fact, tokens: Tokens, *, targets: Sequence[str] | None, substitutes: Sequence[str]
) -> Iterator[Tokens]:
    """The prompt with each substitute that keeps its token count and the subject's place.

    Raises:
        FactError: none does.
    """
    none = True
    for subject in substitutes:
        if subject != fact.subject:
            other = lm.encode([replace(fact, subject=subject)], targets=targets)
            if other.lengths == tokens.lengths and other.spans == tokens.spans:
                none = False
                yield other
    if none:
        raise FactError(
            f"None of the {len(substitutes)} substitutes has as many tokens as {fact.subject!r}. "
            "Give substitutes=(...) of equal length."
        )


def standard_error(x: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis, NaN left out; NaN for a single sample."""
    n = np.isfinite(x).sum(-1)
    several = np.where(n > 1, n, 2)
    squares = np.nansum((x - np.nanmean(x, -1, keepdims=True)) ** 2, -1)
    return np.where(n > 1, np.sqrt(squares / (several - 1) / several), np.nan)
