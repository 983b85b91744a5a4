"""ICE: the new fact is put before every prompt, and the model is left as it is. Cohen et al. 2023 (arXiv 2307.12976).

The text is that of the KnowEdit survey (arXiv 2401.01286, section 4.1), "Imagine that {knowledge}"; EasyEdit's code has
no such text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.editors.base import Draft, Editor
from workbench.edits import Edit, Introducing
from workbench.facts import Fact, FactError
from workbench.layouts import ModelError
from workbench.models import LM


@dataclass(frozen=True, kw_only=True, eq=False)
class Sentences(Introducing):
    """Sentences, each about a subject."""

    sentences: tuple[str, ...]
    """In the order of the facts."""

    subjects: tuple[str, ...]
    """Whom each is about."""

    only_subject: bool
    """Whether a sentence is put only before prompts that name its subject."""

    def __call__(self, prompt: str) -> str:
        """The sentences, each followed by a space."""
        both = zip(self.sentences, self.subjects, strict=True)
        return "".join(f"{sentence} " for sentence, subject in both if not self.only_subject or subject in prompt)


@dataclass(frozen=True, kw_only=True)
class InContext(Editor):
    """ICE (arXiv 2307.12976): a sentence that states the new fact is put before prompts; no weight changes.

    Later facts come after earlier ones.
    """

    beside_weights = True

    template: str = "Imagine that {prompt} {target}."
    """What is put before prompts; {prompt} stands for the fact's prompt, {target} for the new answer."""

    only_subject: bool = False
    """Put a fact only before prompts that name its subject; as published, before all."""

    def __post_init__(self) -> None:
        Editor.__post_init__(self)
        if "{prompt}" not in self.template or "{target}" not in self.template:
            raise FactError(f"template is {self.template!r}, expected a text with {{prompt}} and {{target}} in it.")

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        """The sentences of these facts after those of `after`.

        Raises:
            ModelError: what is put before the fact's own prompt and answer leaves them no room.
        """
        earlier = [side for side in after.sides if isinstance(side, Sentences)] if after is not None else []
        filled = (_filled(self.template, fact) for fact in facts)
        side = Sentences(
            sentences=(*(sentence for one in earlier for sentence in one.sentences), *filled),
            subjects=(*(subject for one in earlier for subject in one.subjects), *(fact.subject for fact in facts)),
            only_subject=self.only_subject,
        )
        used = {fact.id: n_tokens(lm, side(fact.text) + fact.text, fact.target_new or "") for fact in facts}
        check_room(lm, max(used.values()))
        return Draft(sides=(side,), told={"tokens": used})


def n_tokens(lm: LM, prompt: str, target: str) -> int:
    """How many positions a text and its answer take, themselves alone."""
    ids = lm.tokenizer.backend_tokenizer.encode(f"{prompt} {target}").ids  # which does not warn of long texts
    return len(ids) + int(bool(lm.bos))


def check_room(lm: LM, used: int) -> None:
    """Raises ModelError where the model has fewer positions."""
    if lm.n_positions is not None and used > lm.n_positions:
        raise ModelError(
            f"With what is put before it, the longest prompt takes {used} tokens, but {lm.name} has {lm.n_positions} positions. "
            "Introduce fewer facts, or take a shorter template."
        )


def _filled(template: str, fact: Fact) -> str:
    values = {"prompt": fact.text, "target": fact.target_new or ""}
    return re.sub(r"\{(prompt|target)\}", lambda found: values[found[1]], template)
