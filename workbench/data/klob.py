"""KLoB, a benchmark of locating methods: sets of facts whose locations should agree, and nonsense (Ju et al., arXiv 2309.16535).

Three files, JSON lines as published or JSON lists:

- `KLoB-c` (consistency): {prompts, knowledge: [subject, relation, object]}; the wordings of one fact are a set
- `KLoB-r` (relevance): {single_knowledge, knowledge_chain: [subject, relation, object, relation, object], single_knowlege_prompts,
  knowlege_chain_prompt} (spelled so); each wording of the single fact is a set with the chain that goes on from it
- `KLoB-u` (unbiasedness): strings of random words; each is a set of its own

Prompts are clozes with the blank `_` or `[MASK]`. A causal model fills in what comes next, so only prompts that end with their
blank (a full stop may follow) can be asked; others, those that do not name the subject, and those that stand in their set already
are left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from workbench.facts import Fact, FactError

KlobPart = Literal["consistency", "relevance", "unbiasedness"]
"""The three subsets, -c, -r and -u."""

_FIELDS: dict[KlobPart, frozenset[str]] = {
    "consistency": frozenset({"prompts", "knowledge"}),
    "relevance": frozenset({"single_knowledge", "knowledge_chain", "single_knowlege_prompts", "knowlege_chain_prompt"}),
}

_BLANK = re.compile(r"(?:_+|\[MASK\])")
_ENDS_BLANK = re.compile(r"\s*(?:_+|\[MASK\])\s*\.?\s*$")

SUBJECT_WORDS = 2
"""How many words at the start of a nonsense prompt stand for the subject, which methods that corrupt one need."""


@dataclass(frozen=True, kw_only=True)
class Klob:
    """One file of KLoB."""

    part: KlobPart
    """Which of the three."""

    sets: tuple[tuple[Fact, ...], ...]
    """Facts whose locations are compared within a set; a fact may be in several. Ids are `klob-<letter>-<record>-<wording>`."""

    skipped: int
    """Prompts left out: their blank is not at the end, the subject is not in them, or their set has no other prompt."""

    @property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact once, in order of appearance."""
        return tuple({fact.id: fact for one in self.sets for fact in one}.values())


def read_klob(path: Path | str, *, limit: int | None = None) -> Klob:
    """Reads a file of KLoB; which of the three it is tell its records.

    Args:
        path: the file.
        limit: only the first so many records.

    Raises:
        FactError: a limit below 1; the file is missing, holds no such records, or no prompt of it can be asked; the message names
            the record.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit is {limit}, expected 1 or more records, or None for all.")
    records = _records(path)[:limit]
    part = _part(path, records[0])
    sets: list[tuple[Fact, ...]] = []
    skipped = 0
    for index, record in enumerate(records):
        try:
            found, left_out = _READ[part](index, record)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            lacks = f"it lacks the field {error}" if isinstance(error, KeyError) else "its fields have another shape"
            raise FactError(
                f"Record {index} of {path.name} is not as KLoB's {part} file has it: {lacks}. Mend or drop it."
            ) from error
        sets += found
        skipped += left_out
    if not sets:
        raise FactError(
            f"None of the {skipped} prompts of {path.name} can be asked: the blank (_ or [MASK]) has to be at the end, the "
            "subject in the prompt, and a second prompt beside it in its set."
        )
    return Klob(part=part, sets=tuple(sets), skipped=skipped)


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FactError(
            f"{str(path)!r} cannot be read as text ({type(error).__name__}). Give a file of KLoB."
        ) from error
    try:
        whole = text.lstrip().startswith("[")
        records = json.loads(text) if whole else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise FactError(f"{path.name} is no JSON: {error}. Give KLoB's JSON lines, or a JSON list.") from error
    if not records:
        raise FactError(f"{path.name} has no record, expected at least one. Give a file of KLoB.")
    return list(records)


def _part(path: Path, record: Any) -> KlobPart:
    """Which file a record is of."""
    if isinstance(record, str):
        return "unbiasedness"
    for part, fields in _FIELDS.items():
        if isinstance(record, Mapping) and fields <= set(record):
            return part
    came = ", ".join(sorted(record)) if isinstance(record, Mapping) else type(record).__name__
    known = "; ".join(f"{part}: {', '.join(sorted(fields))}" for part, fields in _FIELDS.items())
    raise FactError(
        f"{path.name} has records with {came}, expected those of one of KLoB's files ({known}; {get_args(KlobPart)[-1]}: text)."
    )


def _consistency(index: int, record: Any) -> tuple[list[tuple[Fact, ...]], int]:
    """The wordings of one fact as one set; none where fewer than two can be asked, since there is nothing to compare."""
    subject, relation, answer = _texts(record["knowledge"])
    facts = _wordings(f"klob-c-{index}", record["prompts"], subject, relation, answer)
    usable = _different(facts)
    return ([usable], len(facts) - len(usable)) if len(usable) > 1 else ([], len(facts))


def _relevance(index: int, record: Any) -> tuple[list[tuple[Fact, ...]], int]:
    """Each wording of the single fact with the chain."""
    subject, relation, answer = _texts(record["single_knowledge"])
    start, *_, last_relation, end = _texts(record["knowledge_chain"])
    name = f"klob-r-{index}"
    (chain,) = _wordings(f"{name}-chain", [record["knowlege_chain_prompt"]], start, last_relation, end)
    singles = _wordings(name, record["single_knowlege_prompts"], subject, relation, answer)
    usable = [fact for fact in _different(singles) if chain and fact.text != chain.text]
    sets: list[tuple[Fact, ...]] = [(fact, chain) for fact in usable if chain]
    return sets, len(singles) - len(sets) + (not sets)


def _unbiasedness(index: int, record: Any) -> tuple[list[tuple[Fact, ...]], int]:
    """One string of random words, asked for whatever the model says next."""
    subject = " ".join(_BLANK.sub("", record).split()[:SUBJECT_WORDS])
    facts = _wordings(f"klob-u-{index}", [record], subject, "", "")
    return [(fact,) for fact in facts if fact], sum(fact is None for fact in facts)


_READ = {"consistency": _consistency, "relevance": _relevance, "unbiasedness": _unbiasedness}


def _texts(value: Any) -> list[str]:
    """A list of texts; a text alone, which has letters to unpack, is none."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError("expected a list of texts")
    return value


def _different(facts: Sequence[Fact | None]) -> tuple[Fact, ...]:
    """Those that can be asked; of equal prompts the first."""
    usable: dict[str, Fact] = {}
    for fact in facts:
        if fact:
            usable.setdefault(fact.text, fact)
    return tuple(usable.values())


def _wordings(name: str, prompts: Any, subject: str, relation: str, answer: str) -> list[Fact | None]:
    """A fact for each prompt; None for one that cannot be asked."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("expected a list of prompts")
    return [_asked(f"{name}-{i}", prompt, subject, relation, answer) for i, prompt in enumerate(prompts)]


def _asked(name: str, prompt: str, subject: str, relation: str, answer: str) -> Fact | None:
    text, blanks = _ENDS_BLANK.subn("", prompt)
    places = [found.start() for found in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", text)]
    if not blanks or _BLANK.search(text) or not subject or not places or "{}" in text:
        return None
    template = text[: places[-1]] + "{}" + text[places[-1] + len(subject) :]
    return Fact(id=name, subject=subject, prompt=template, target_true=answer, relation=relation)
