"""What the page on two prompts shows beside its maps: which subjects fit, both prompts side by side, and one patched site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analyses.explore_fact import Look, look
from workbench.drawing import restored_layers
from workbench.facts import Fact, FactError
from workbench.results import Footprint
from workbench.sites import Site, SiteError

if TYPE_CHECKING:
    from workbench.asked import Asked
    from workbench.models import LM

SHOWN_AGAINST = 0.1
"""What works against the answer gets colours of its own where it reaches this part of the largest effect."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The clean prompt and the counterfactual one."""

    clean_tokens: tuple[str, ...]
    """Tokens of the fact's own prompt."""

    other_tokens: tuple[str, ...]
    """As many tokens of the counterfactual prompt."""

    other_text: str
    """The counterfactual prompt."""

    other_subject: str
    """Its subject."""

    clean: Look
    """What the model says to the fact's own prompt."""

    other: Look
    """What it says to the counterfactual one."""


@dataclass(frozen=True, kw_only=True)
class PatchNumbers:
    """What patching one site did."""

    text: str
    """The token of the clean prompt there."""

    role: str
    """Its role in the prompt."""

    patched: range
    """The layers patched together."""

    score: float
    """Score of the patched run."""

    share: float
    """That as a share of the difference between the two prompts."""


def proposals(lm: LM, fact: Fact, facts: Sequence[Fact], *, most: int = 300) -> tuple[str, ...]:
    """Subjects of other facts that take the place of a fact's subject token by token.

    Those of the same relation and with another answer come first; then others of the relation; then the rest.
    """
    spans = lm.encode([fact, *facts]).spans
    lengths = [span[1] - span[0] for span in spans if span is not None]  # a Fact always has a subject
    fitting = [
        one
        for one, length in zip(facts, lengths[1:], strict=True)
        if length == lengths[0] and one.subject != fact.subject
    ]
    ranked = sorted(fitting, key=lambda one: (one.relation != fact.relation, one.target_true == fact.target_true))
    return tuple(dict.fromkeys(one.subject for one in ranked))[:most]


def pair_of(lm: LM, asked: Asked) -> Pair:
    """The two prompts of a question to `ActivationPatching`, as the method itself will run them.

    Raises:
        FactError: no counterfactual subject has as many tokens as the fact's, or both prompts have the same score.
        SiteError, ModelError: an option that cannot be used, or not on this model.
    """
    from workbench.locators.activation_patching import ActivationPatching

    fact, method = asked.fact, asked.locator(lm)
    assert isinstance(method, ActivationPatching), asked.method
    _check_subject(lm, asked)
    problem = method._experiment(lm, fact).problem
    texts = (problem.corrupted if method.direction == "denoise" else problem.clean).texts[0]
    tokens = lm.encode([fact])
    others = (replace(fact, subject=subject, target_true="") for subject in method.substitutes)
    other, other_tokens = next(
        (one, found) for one in others if (found := lm.encode([one]).texts[0]) == texts[: len(tokens.texts[0])]
    )
    return Pair(
        clean_tokens=tokens.texts[0],
        other_tokens=other_tokens,
        other_text=other.text,
        other_subject=other.subject,
        clean=look(lm, fact),
        other=look(lm, other),
    )


def patch_numbers(footprint: Footprint, site: Site) -> PatchNumbers:
    """A cell of a patched fact.

    Raises:
        SiteError: it has no such cell.
    """
    rows = footprint.table[footprint.table["site"] == str(site)]
    if rows.empty:
        raise SiteError(f"{site} was not patched. Click on a cell of a map.")
    row = rows.iloc[0]
    return PatchNumbers(
        text=str(row["text"]),
        role=str(row["token"]).replace("_", " "),
        patched=restored_layers(footprint, kind=site.kind, layer=site.layer),
        score=float(row["score"]),
        share=float(row["value"]),
    )


def share_range(footprint: Footprint, kinds: Sequence[str]) -> tuple[float, float]:
    """Ends of a colour scale for shares: from 0, or from the most negative one where that is more than a trace, to the largest."""
    values = footprint.table[footprint.table["kind"].isin(kinds)]["value"].to_numpy(dtype=float)
    low, high = float(np.min(values, initial=0.0)), float(np.max(values, initial=0.0))
    return (low if low < -SHOWN_AGAINST * high else 0.0), high


def _check_subject(lm: LM, asked: Asked) -> None:
    """Raises FactError where there is no counterfactual subject, or the only one that was named is not as long as the fact's."""
    fact, substitutes = asked.fact, asked.options.get("substitutes", ())
    own = lm.encode([fact]).spans[0] or (0, 0)
    n = own[1] - own[0]
    wanted = f"{n} token{'s' * (n != 1)}"
    if not substitutes and all(one.subject == fact.subject for one in asked.reference()):
        raise FactError(
            f"No other subject is known that could stand in the place of {fact.subject!r}. "
            f"Type a counterfactual subject of {wanted}."
        )
    if len(substitutes) != 1:
        return
    (subject,) = substitutes
    if subject == fact.subject:
        raise FactError(f"Both prompts are about {subject!r}. Choose another subject for the counterfactual one.")
    other = lm.encode([replace(fact, subject=subject)]).spans[0] or (0, 0)
    if (n_other := other[1] - other[0]) != n:
        raise FactError(
            f"{subject!r} has {n_other} token{'s' * (n_other != 1)} and {fact.subject!r} has {n}, expected equally many, so that "
            f"the prompts can be laid side by side. Choose a proposed subject, or type one of {wanted}."
        )
