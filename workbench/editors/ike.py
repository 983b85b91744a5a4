"""IKE: demonstrations of editing and the new fact are put before every prompt; the model is left as it is. Zheng et al. 2023
(arXiv 2305.12740).

1. The facts of a pool are compared with the new fact by the cosine of what an encoder makes of "prompt answer"; the k nearest are
   taken.
2. Each becomes a demonstration: "New Fact: ", its prompt and new answer, a line end, "Prompt: ", a prompt and its answer, an empty
   line. Of eight, four retain (a prompt on another subject keeps its answer), three update (a paraphrase gets the new answer) and
   one copies the fact's own prompt: the published ratio of 1 : 3 : 4, which the published code deals at random.
3. Before a prompt stand the demonstrations, the nearest last, then "New Fact: ", prompt and new answer, a line end and "Prompt: ".

Departures. With several new facts a pool fact counts by the nearest of them, and all of them are told after the demonstrations.
The sentence encoder is used where it is installed, else the model's own states. No prompt that the edited facts are tested with, or
that is about their subjects, is shown. Of the nearest facts, as many are shown as the model has positions for.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from workbench.editors._side_training import other_facts, probed
from workbench.editors.base import Draft, Editor
from workbench.editors.in_context import check_room, n_tokens
from workbench.edits import Edit, Introducing
from workbench.facts import Fact, FactError
from workbench.hooks import nothing_beside, run
from workbench.layouts import ModelError
from workbench.models import LM, unintroduced
from workbench.sites import Site

SENTENCE_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""The published one."""

KINDS = ("retain", "update", "retain", "update", "retain", "copy", "retain", "update")
"""What the nearest pool facts demonstrate, in order and over again."""

ROWS_AT_ONCE = 64
"""Texts that are encoded together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations(Introducing):
    """Demonstrations of editing, and new facts."""

    demonstrations: tuple[str, ...]
    """In the order in which they stand; each ends with an empty line."""

    facts: tuple[str, ...]
    """The new facts, prompt and answer."""

    subjects: tuple[str, ...]
    """Whom each is about."""

    only_subject: bool
    """Whether this is put only before prompts that name a subject."""

    def __call__(self, prompt: str) -> str:
        """Demonstrations, new facts, and `Prompt: `."""
        told = [
            fact
            for fact, about in zip(self.facts, self.subjects, strict=True)
            if about in prompt or not self.only_subject
        ]
        if not told:
            return ""
        return "".join((*self.demonstrations, *(f"New Fact: {fact}\n" for fact in told), "Prompt: "))


@dataclass(frozen=True, kw_only=True)
class Ike(Editor):
    """IKE (arXiv 2305.12740): demonstrations of edits and the new fact are put before prompts; no weight changes.

    The demonstrations are chosen when the edit is made; `after` adds its facts before these.
    """

    beside_weights = True

    k: int = 16
    """How many demonstrations stand before a prompt; fewer where the model has too few positions, which the manifest tells."""

    encoder: Literal["auto", "sentence", "states", "embeddings"] = "auto"
    """What texts are compared by: a sentence encoder (`sentence`, the package sentence-transformers), the mean of the model's last
    states or of its input embeddings; `auto`: the first where it is installed, else the second."""

    pool: str = ""
    """A file of facts to demonstrate with; empty: the bundled models' facts."""

    pool_size: int = 500
    """Of how many of them the nearest are sought; drawn with `seed`."""

    only_subject: bool = False
    """Put the text only before prompts that name an edited subject; as published, before all."""

    seed: int = 0
    """Seed of the draw from the pool."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        if self.k < 0 or self.pool_size < 1:
            raise FactError(f"k is {self.k} and pool_size {self.pool_size}, expected 0 or more, and 1 or more.")

    def resolved(self, lm: LM, facts: Sequence[Fact]) -> Self:
        """This editor with its encoder fixed."""
        if self.encoder != "auto":
            return self
        return replace(self, encoder="sentence" if find_spec("sentence_transformers") else "states")

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The introduction with the facts of `after` and these.

        Raises:
            ModelError: the facts alone leave their own prompts no room.
        """
        before = [side for side in after.sides if isinstance(side, Demonstrations)] if after is not None else []
        side = Demonstrations(
            demonstrations=(),
            facts=(*(text for one in before for text in one.facts), *(_told(fact) for fact in facts)),
            subjects=(*(subject for one in before for subject in one.subjects), *(fact.subject for fact in facts)),
            only_subject=self.only_subject,
        )
        known = [*after.facts, *facts] if after is not None else list(facts)
        nearest = self._nearest(lm, known, side.facts) if self.k else []
        shown = _demonstrations(nearest, probed(known), {fact.subject for fact in known})
        check_room(lm, _longest(lm, side, facts))
        kept: tuple[str, ...] = ()
        for text in shown:  # the nearest first, which stands last
            longer = (text, *kept)
            if (
                lm.n_positions is not None
                and _longest(lm, replace(side, demonstrations=longer), facts) > lm.n_positions
            ):
                break
            kept = longer
        side = replace(side, demonstrations=kept)
        told: dict[str, Any] = {"demonstrations": len(kept), "asked_for": self.k, "tokens": _longest(lm, side, facts)}
        return Draft(sides=(side,), told=told)

    def _nearest(self, lm: LM, known: Sequence[Fact], texts: Sequence[str]) -> list[Fact]:
        """The pool's facts that are nearest to any of the texts, the nearest first."""
        pool = other_facts(lm, known, self.pool)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = sorted(torch.randperm(len(pool), generator=generator)[: self.pool_size].tolist())
        pool = [pool[i] for i in drawn]
        if not pool:
            raise FactError(
                "There is no fact on another subject to demonstrate with. Name a file of other facts: pool=."
            )
        vectors = self._encoded(lm, [*texts, *(_told(fact) for fact in pool)])
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        cosines = (vectors[len(texts) :] @ vectors[: len(texts)].T).amax(1)
        order = cosines.argsort(descending=True, stable=True)[: self.k]
        return [pool[i] for i in order.tolist()]

    def _encoded(self, lm: LM, texts: Sequence[str]) -> Float[Tensor, "text d"]:
        """One vector a text."""
        if self.encoder == "sentence":
            return _sentences(texts)
        with unintroduced(), nothing_beside():
            return _represented(lm, texts, embeddings=self.encoder == "embeddings")


def _represented(lm: LM, texts: Sequence[str], *, embeddings: bool) -> Float[Tensor, "text d_model"]:
    """The mean over a text's tokens of the model's last states, or of its input embeddings."""
    site = Site(layer=0, kind="embed") if embeddings else Site(layer=lm.n_layers - 1, kind="resid_post")
    found = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        tokens = lm.encode(list(texts[start : start + ROWS_AT_ONCE]))
        states = run(lm, tokens, read=[site])[site]
        where = tokens.at(None)[..., None]
        found.append((states.float() * where).sum(1) / where.sum(1))
    return torch.cat(found)


def _sentences(texts: Sequence[str]) -> Float[Tensor, "text d"]:
    try:
        encoder = importlib.import_module("sentence_transformers").SentenceTransformer(SENTENCE_ENCODER)
    except (ImportError, OSError) as error:
        raise ModelError(
            f"{SENTENCE_ENCODER} cannot be loaded ({type(error).__name__}). Install sentence-transformers and fetch it, or use "
            "encoder='states'."
        ) from error
    vectors: Tensor = encoder.encode(list(texts), convert_to_tensor=True)
    return vectors.float()


def _told(fact: Fact) -> str:
    """A fact and its new answer, the true one where it has none."""
    return f"{fact.text} {fact.target_new or fact.target_true}"


def _demonstrations(facts: Sequence[Fact], tested: set[str], subjects: set[str]) -> list[str]:
    """One text a fact, in the order given, without prompts that are tested or about the edited subjects."""

    def fits(prompt: str) -> bool:
        return prompt not in tested and not any(subject in prompt for subject in subjects)

    texts = []
    for number, fact in enumerate(facts):
        kind = KINDS[number % len(KINDS)]
        new = fact.target_new or fact.target_true
        retain = [(p.prompt, p.target) for p in (*fact.neighbors, *fact.locality) if fits(p.prompt)]
        update = [(prompt, new) for prompt in fact.paraphrases if fits(prompt)]
        shown = {"retain": retain, "update": update, "copy": []}[kind]
        prompt, answer = shown[0] if shown else (fact.text, new)
        texts.append(f"New Fact: {_told(fact)}\nPrompt: {prompt} {answer}\n\n")
    return texts


def _longest(lm: LM, side: Demonstrations, facts: Sequence[Fact]) -> int:
    """How many positions the longest of the facts' own prompts takes with its answer and what is put before it."""
    asked = [
        pair
        for fact in facts
        for pair in (
            *((prompt, fact.target_new or "") for prompt in (fact.text, *fact.paraphrases)),
            *((probe.prompt, probe.target) for probe in (*fact.neighbors, *fact.portability, *fact.locality)),
        )
    ]
    return max(n_tokens(lm, side(prompt) + prompt, answer) for prompt, answer in asked)
