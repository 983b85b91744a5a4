"""A fact is a template, a subject and an answer; what is typed becomes one."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from tests.examples import FACTS
from workbench.facts import Fact, FactError


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_the_span_of_a_fact_cuts_the_subject_out_of_its_text(fact: Fact) -> None:
    start, stop = fact.span
    assert fact.text[start:stop] == fact.subject
    assert fact.text[:start] + "{}" + fact.text[stop:] == fact.prompt


def test_a_subject_with_braces_is_text_and_not_a_place() -> None:
    fact = Fact(id="x", subject="{} and {x}", prompt="The sign {} means")
    assert fact.text == "The sign {} and {x} means"
    assert fact.text[slice(*fact.span)] == "{} and {x}"


def test_a_fact_is_frozen_and_equal_by_value() -> None:
    fact = Fact(id="x", subject="a", prompt="{} is")
    with pytest.raises(FrozenInstanceError):
        fact.subject = "b"  # type: ignore[misc]
    assert fact == Fact(id="x", subject="a", prompt="{} is")
    assert len({fact, Fact(id="x", subject="a", prompt="{} is")}) == 1


@pytest.mark.parametrize("prompt", ["no place at all", "{} two {}", "", "{ } is"])
def test_a_template_without_exactly_one_place_is_refused(prompt: str) -> None:
    with pytest.raises(FactError, match=r"expected 1\. Write the prompt with \{\} once"):
        Fact(id="x", subject="a", prompt=prompt)


@pytest.mark.parametrize("subject", ["", "  ", "\n"])
def test_an_empty_subject_is_refused(subject: str) -> None:
    with pytest.raises(FactError, match="subject is empty"):
        Fact(id="x", subject=subject, prompt="{} is")
    with pytest.raises(FactError, match="subject is empty"):
        Fact.typed(text="Paris is", subject=subject)


@pytest.mark.parametrize(
    ("text", "subject", "prompt"),
    [
        ("The Space Needle is in", "Space Needle", "The {} is in"),
        ("The Space Needle is in  ", " Space Needle ", "The {} is in"),
        ("{} is in", "Space Needle", "{} is in"),
        ("東京 is in", "東京", "{} is in"),
        ("Tell me about Zürich", "Zürich", "Tell me about {}"),
        ("Paris", "Paris", "{}"),
    ],
)
def test_a_typed_sentence_becomes_a_template(text: str, subject: str, prompt: str) -> None:
    fact = Fact.typed(text=text, subject=subject, target_true=" Seattle ")
    assert (fact.prompt, fact.subject, fact.target_true) == (prompt, subject.strip(), "Seattle")


def test_a_subject_that_stands_twice_is_taken_where_it_was_asked_for() -> None:
    text = "Paris, the city of Paris, is"
    assert Fact.typed(text=text, subject="Paris").prompt == "Paris, the city of {}, is"
    assert Fact.typed(text=text, subject="Paris", occurrence="first").prompt == "{}, the city of Paris, is"


@pytest.mark.parametrize(
    ("text", "subject", "says"),
    [
        ("The Space Needle is in", "space needle", "capital letters count"),
        ("   ", "Paris", "prompt is empty"),
        ("{} and {} are", "Paris", "not in the prompt"),
        ("{} is not Paris, but", "Paris", "has 2 places"),
    ],
)
def test_what_cannot_be_a_fact_is_refused_with_a_sentence(text: str, subject: str, says: str) -> None:
    with pytest.raises(FactError, match=says):
        Fact.typed(text=text, subject=subject)


def test_a_typed_fact_is_named_by_what_was_typed() -> None:
    def name(text: str, subject: str, target: str = "") -> str:
        return Fact.typed(text=text, subject=subject, target_true=target).id

    assert name("Paris is in", "Paris") == name("Paris is in ", "Paris")
    assert len({name("Paris is in", "Paris"), name("Paris is", "Paris"), name("Paris is in", "Paris", "France")}) == 3
    assert Fact.typed(text="Paris is in", subject="Paris", id="mine").id == "mine"
