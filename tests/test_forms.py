"""Forms made from the source of dataclasses agree with the classes themselves; subjects are guessed as a reader would."""

from __future__ import annotations

import dataclasses

import pytest

from workbench.forms import form_of, methods_of
from workbench.locators import all_locators
from workbench.metrics import SCORES
from workbench.sites import KINDS
from workbench.subjects import guess_subject


@pytest.mark.parametrize("name", list(all_locators()))
def test_every_locator_has_a_form_with_its_fields_and_defaults(name: str) -> None:
    cls = all_locators()[name]
    form = form_of(cls.__module__, name)
    fields = [field for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING]
    assert [(one.name, one.default) for one in form] == [(field.name, field.default) for field in fields]
    assert all(one.help for one in form), "a field without a docstring"
    assert all(one.default in one.choices or one.optional for one in form if one.type == "choice")


def test_methods_are_found_without_importing_them() -> None:
    assert methods_of("workbench.locators") == {name: cls.__module__ for name, cls in all_locators().items()}


def test_types_are_followed_through_names_and_imports() -> None:
    form = {field.name: field for field in form_of("workbench.locators.causal_trace", "CausalTrace")}
    assert form["score"].choices == SCORES
    assert (form["kinds"].type, form["kinds"].choices) == ("choices", KINDS)
    assert (form["window"].type, form["noise"].type, form["replace"].type) == ("integer", "text", "switch")
    assert (form["substitutes"].type, form["token"].optional) == ("texts", True)
    assert form["window_rule"].label == "Window rule"


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(ValueError, match="has no class 'Nothing'"):
        form_of("workbench.locators.causal_trace", "Nothing")


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("The Space Needle is located in the city of", "Space Needle"),
        ("As for the Bridge of Sighs, the home city is known to be", "Bridge of Sighs"),
        ("France's capital is", "France"),
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("In Paris, the Eiffel Tower stands on the", "Eiffel Tower"),
        ("Question: What is the capital of New South Wales? Answer:", "New South Wales"),
        ("São Paulo is a city in", "São Paulo"),
        ("what is the meaning of serendipity", "serendipity"),
        ("", ""),
        (" ?!", ""),
    ],
)
def test_a_subject_is_guessed(text: str, subject: str) -> None:
    assert guess_subject(text) == subject
    assert subject in text


def test_a_known_subject_wins_and_only_as_whole_words() -> None:
    assert guess_subject("the gold museum near Bogota", ["gold museum", "gold"]) == "gold museum"
    assert guess_subject("The Omanis live in Muscat", ["Oman"]) == "Omanis"
