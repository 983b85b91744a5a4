"""The one record for a fact, used by every locator and every editor.

A `Fact` is a prompt template with `{}` in the place of the subject, the subject, and the answer that follows. Data files of
other projects are read into it by `workbench.data`; a sentence typed by a user becomes one by `Fact.typed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError

SLOT = "{}"
"""Marks the place of the subject in a prompt template."""

Occurrence = Literal["last", "first"]


class FactError(InputError):
    """A fact that cannot be used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A complete prompt and the answer that belongs to it: a neighbor, or a question about an edit's reach."""

    prompt: str
    """The whole text up to, and without, the answer."""

    target: str
    """The answer, without a leading space."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A subject, a prompt about it, and its answer.

    Raises:
        FactError: the prompt has no `{}` or several, or the subject is empty.
    """

    id: str
    """Unique within a set of facts; appears in every results row."""

    subject: str
    """The entity, as it is written in the prompt, e.g. `Space Needle`."""

    prompt: str
    """Template of the prompt with `{}` in the place of the subject, e.g. `The {} is in the city of`."""

    target_true: str = ""
    """The answer, without a leading space; empty: whatever the model says (its most probable next token)."""

    relation: str = ""
    """Name of the relation, e.g. `landmark_city`."""

    target_new: str | None = None
    """The answer an editor should put in its place, without a leading space."""

    paraphrases: tuple[str, ...] = ()
    """Complete prompts with the same answer in other words."""

    neighbors: tuple[Probe, ...] = ()
    """Prompts of the same relation on other subjects: what an edit should leave alone."""

    portability: tuple[Probe, ...] = ()
    """Prompts whose answer should follow from the edited fact (KnowEdit)."""

    locality: tuple[Probe, ...] = ()
    """Other prompts whose answer should stay as it was (KnowEdit)."""

    def __post_init__(self) -> None:
        for name in ("id", "subject", "prompt", "target_true", "relation", "target_new"):
            value = getattr(self, name)
            if not (isinstance(value, str) or (name == "target_new" and value is None)):
                raise FactError(f"{name} is {value!r}, expected text.")
            try:
                (value or "").encode()
            except UnicodeEncodeError:
                raise FactError(
                    f"{name} is {value!r}, which holds half a character. Write it as valid Unicode."
                ) from None
        if not self.id:
            raise FactError(f"The fact {self.prompt!r} has no id. Give it one; results are named by it.")
        if not self.subject.strip():
            raise FactError(f"The subject is empty, in the prompt {self.prompt!r}. Name the words the fact is about.")
        if self.prompt.count(SLOT) != 1:
            raise FactError(
                f"The prompt {self.prompt!r} has {self.prompt.count(SLOT)} places marked {{}}, expected 1. "
                "Write the prompt with {} once, in the place of the subject."
            )

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def span(self) -> tuple[int, int]:
        """First and one-past-last character of the subject in `text`."""
        start = self.prompt.index(SLOT)
        return start, start + len(self.subject)

    @classmethod
    def typed(
        cls,
        *,
        text: str,
        subject: str,
        target_true: str = "",
        occurrence: Occurrence = "last",
        id: str = "",  # noqa: A002
    ) -> Fact:
        """A fact from a sentence as a user types it.

        Args:
            text: the prompt up to, and without, the answer; trailing spaces are dropped (the answer brings its own), and so
                is a `{}` already in the subject's place.
            subject: the words of the prompt the fact is about.
            target_true: the answer; empty for the model's own.
            occurrence: which one to take where the subject stands several times in the text.
            id: name of the fact; made from text and subject when empty.

        Raises:
            FactError: the text is empty, or the subject is not in it.
        """
        text, subject = text.rstrip(), subject.strip()
        if not text:
            raise FactError("The prompt is empty. Write the text up to the answer, e.g. 'The Space Needle is in'.")
        if not subject:
            raise FactError(f"The subject is empty, in the prompt {text!r}. Name the words the fact is about.")
        if text.count(SLOT) == 1 and subject not in text:
            prompt = text
        else:
            at = text.rfind(subject) if occurrence == "last" else text.find(subject)
            if at < 0:
                raise FactError(
                    f"The subject {subject!r} is not in the prompt {text!r}. "
                    "Write the subject exactly as it stands in the prompt (capital letters count)."
                )
            prompt = text[:at] + SLOT + text[at + len(subject) :]
        digest = hashlib.sha256(f"{prompt}\n{subject}\n{target_true}".encode()).hexdigest()[:8]
        return cls(id=id or f"typed-{digest}", subject=subject, prompt=prompt, target_true=target_true.strip())


def distinct_facts(facts: Iterable[Fact], *, to: str) -> list[Fact]:
    """The facts as a list.

    Raises:
        FactError: there is none to do something with (`to`, e.g. "locate"), or two have the same id.
    """
    facts = list(facts)
    if not facts:
        raise FactError(f"There is no fact to {to}. Give at least one.")
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        double = next(i for i in ids if ids.count(i) > 1)
        raise FactError(f"The fact id {double!r} stands {ids.count(double)} times. Give every fact its own id.")
    return facts


def spread(facts: Sequence[Fact], n: int) -> list[Fact]:
    """n facts, or all where there are fewer, evenly spread over the list and so over its relations."""
    n = min(n, len(facts))
    return [facts[i * len(facts) // n] for i in range(n)]
