"""The strongest prompts of all neurons are those that a run of each prompt finds; shared beginnings count once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analyses import strongest_prompts as module
from analyses.strongest_prompts import find_strongest_prompts, strongest_prompts
from tests.examples import EIFFEL, FACTS, MESSI, tiny_lm
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.store import Store


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("at_once", [2, 48])
def test_they_are_what_single_runs_find(family: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    lm = tiny_lm(family)
    facts = [*FACTS, Fact(id="tail", subject="Eiffel Tower", prompt=EIFFEL.prompt + " the")]
    table = strongest_prompts(lm, facts, k=3).table
    begins = len(lm.encode([EIFFEL]).ids[0])
    for layer, neuron in ((0, 3), (lm.n_layers - 1, 17)):
        strengths = {}
        for fact in facts:
            acts = run(lm, lm.encode([fact]), read=["mlp_post"])
            own = acts[lm.sites("mlp_post")[layer]][0, :, neuron].double().numpy()
            first = begins if fact.id == "tail" else 0  # what stands before is the other prompt
            place = first + int(np.abs(own[first:]).argmax())
            strengths[fact.id] = (own[place], place)
        expected = sorted(strengths, key=lambda fact: -abs(strengths[fact][0]))[:3]
        rows = table[(table["layer"] == layer) & (table["neuron"] == neuron)]
        assert list(rows["fact"]) == expected
        assert list(rows["rank"]) == [0, 1, 2]
        assert list(rows["position"]) == [strengths[fact][1] for fact in expected]
        np.testing.assert_allclose(rows["k"], [strengths[fact][0] for fact in expected], atol=1e-5)


def test_a_prompt_that_was_there_before_has_no_row() -> None:
    lm = tiny_lm("gpt2")
    twin = Fact(id="twin", subject=MESSI.subject, prompt=MESSI.prompt)
    table = strongest_prompts(lm, [MESSI, twin], k=5).table
    assert set(table["fact"]) == {MESSI.id}
    assert len(table) == lm.n_layers * lm.d_mlp


def test_it_is_found_again_for_the_same_prompts_and_weights(tmp_path: Path) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path)
    assert find_strongest_prompts(store, lm, FACTS, k=2) is None
    store.save(strongest_prompts(lm, FACTS, k=2))
    found = find_strongest_prompts(store, lm, FACTS, k=2)
    assert found is not None
    assert len(found.table) == 2 * lm.n_layers * lm.d_mlp
    assert find_strongest_prompts(store, lm, FACTS[:2], k=2) is None
    assert find_strongest_prompts(store, tiny_lm("gpt2", seed=1), FACTS, k=2) is None
    with pytest.raises(FactError, match="Give at least one"):
        strongest_prompts(lm, [])
