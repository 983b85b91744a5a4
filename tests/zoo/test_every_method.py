"""Every locating method runs on every bundled model and leaves it as it was."""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_locators_contract import SMALL
from workbench import zoo
from workbench.hooks import run
from workbench.loading import load
from workbench.locators import all_locators, locator_named

QUICK = {"samples": SMALL["samples"], "steps": SMALL["steps"]}


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.NAMES)
def test_every_method_locates_a_bundled_fact(model: str) -> None:
    lm, facts = load(model, device="cpu"), zoo.load_facts(model)
    fact = facts[len(facts) // 2]
    before, weights = run(lm, lm.encode([fact])).logits, lm.weight_hash
    for name in all_locators():
        cls = locator_named(name)
        options = {option: value for option, value in QUICK.items() if hasattr(cls, option)}
        found = cls.fitted(lm, **options).resolved(lm, facts)(lm, [fact])
        assert found.facts == (fact.id,), name
        assert np.isfinite(found.table["value"]).all(), name
        assert found.table["value"].abs().max() > 0, name
        assert set(found.table["layer"]) == set(range(lm.n_layers)), name
        assert found.extras["facts"]["answer"].item() == fact.target_true, name
    assert run(lm, lm.encode([fact])).logits.equal(before)
    assert lm.weight_hash == weights
