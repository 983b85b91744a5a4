"""The stored examples that a first visit shows belong to the weights that are bundled now."""

from __future__ import annotations

import pytest

from workbench import zoo
from workbench.asked import Asked
from workbench.loading import load
from workbench.store import Store
from workbench.zoo.examples import FACTS, FOLDER


@pytest.mark.parametrize("name", FACTS)
def test_the_example_is_whole_and_of_these_weights(name: str) -> None:
    model = zoo.NAMES[0]
    fact = next(fact for fact in zoo.load_facts(model) if fact.id == name)
    stored = Asked(model=model, fact=fact).find(Store(folder=FOLDER))
    assert stored is not None
    assert stored.footprint is not None
    assert not stored.missing
    assert stored.footprint.run["weight_hash"] == load(model).weight_hash
    assert stored.footprint.extras["facts"]["correct"].all()
