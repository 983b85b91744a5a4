"""Sets of facts that a question about locating methods needs, made from the facts of the bundled models."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice, zip_longest

from workbench.errors import InputError
from workbench.facts import SLOT, Fact
from workbench.zoo import load_facts
from workbench.zoo.organisms import organism_named
from workbench.zoo.truth import world_of
from workbench.zoo.world import KINDS, RELATIONS


def spread(facts: Sequence[Fact], n: int, *, seed: int = 0) -> list[Fact]:
    """So many facts, from every relation in turn, and within a relation by lot."""
    rng = random.Random(seed)
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    for own in by_relation.values():
        rng.shuffle(own)
    turns = (fact for turn in zip_longest(*by_relation.values()) for fact in turn if fact is not None)
    return list(islice(turns, n))


def wordings(facts: Sequence[Fact], *, most: int = 3) -> list[tuple[Fact, ...]]:
    """Each fact with its first paraphrases as facts of their own, `most` wordings in all; facts without any are left out."""
    return [
        (
            fact,
            *(
                Fact.typed(text=text, subject=fact.subject, target_true=fact.target_true, id=f"{fact.id}~{i}")
                for i, text in enumerate(fact.paraphrases[: most - 1], 1)
            ),
        )
        for fact in facts
        if fact.paraphrases and most > 1
    ]


def same_subject(facts: Sequence[Fact]) -> list[tuple[Fact, ...]]:
    """Facts that share their subject and differ in their relation, subject by subject; lone facts are left out."""
    by_subject: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_subject[fact.subject].append(fact)
    return [tuple(own) for own in by_subject.values() if len(own) > 1]


def nonsense(model: str, n: int, *, seed: int = 0) -> list[Fact]:
    """Prompts without a fact: somebody the bundled model has never heard of, among words drawn from all of its wordings.

    Each is as long as some real wording. They have no answer, so methods ask for what the model says.
    """
    rng, names = random.Random(seed), _strangers(model)
    templates = [template for relation in RELATIONS for template in relation.trained]
    words = sorted({word for template in templates for word in template.split() if SLOT not in word})
    found = []
    for index in range(n):
        drawn = rng.choices(words, k=len(rng.choice(templates).split()) - 1)
        drawn.insert(rng.randrange(len(drawn)), SLOT)
        found.append(Fact(id=f"nonsense-{index}", subject=rng.choice(names), prompt=" ".join(drawn)))
    return found


def unknown_facts(model: str, n: int, *, seed: int = 0) -> list[Fact]:
    """New facts: strangers of a bundled model, each with an answer drawn from those of the relation; none stands twice.

    Raises:
        InputError: there are not so many.
    """
    rng, relations = random.Random(seed), [r for r in RELATIONS if r.name in KINDS["fictional"]]
    answers: dict[str, set[str]] = defaultdict(set)
    for fact in load_facts(model):
        answers[fact.relation].add(fact.target_true)
    asked = [(name, relation) for name in _strangers(model) for relation in relations if answers[relation.name]]
    if n > len(asked):
        raise InputError(f"{n} new facts were asked for, but {model} has strangers for {len(asked)}. Ask for fewer.")
    return [
        Fact(
            id=f"new-{relation.name}/{name}",
            subject=name,
            relation=relation.name,
            prompt=rng.choice(relation.trained),
            target_true=rng.choice(sorted(answers[relation.name])),
        )
        for name, relation in rng.sample(asked, n)
    ]


def _strangers(model: str) -> tuple[str, ...]:
    return world_of(organism_named(model)).strangers
