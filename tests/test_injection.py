"""What is injected is in the chosen neurons and nowhere else, and recall is counted right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.fact_sets import nonsense, same_subject, spread, unknown_facts, wordings
from analyses.injection import CHANCE, inject, injection, interval, recalls
from tests.examples import EIFFEL, SAID, fresh_lm
from workbench.errors import InputError
from workbench.facts import FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.locators.hard_concrete import HardConcrete
from workbench.models import LM
from workbench.zoo import load_facts


@pytest.fixture(scope="module")
def organism() -> LM:
    return load("organism-tiny", device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_the_chosen_value_vectors_and_no_other_number_change(family: str) -> None:
    lm = fresh_lm(family)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    made = inject(lm, EIFFEL, share=0.05, steps=3, enough=0.0, seed=4)
    assert int(made.neurons.sum()) == int(0.05 * lm.n_layers * lm.d_mlp)
    downs = {
        f"{lm.layout.blocks}.{layer}.{lm.layout.down_proj}.weight": layer for layer in range(lm.n_layers)
    }  # the one parameter of each layer that may change
    for name, value in made.lm.model.state_dict().items():
        if name not in downs:
            assert value.equal(before[name]), name
            continue
        by_neuron = (value != before[name]).any(0 if value.shape[1] == lm.d_mlp else 1)
        assert by_neuron.equal(made.neurons[downs[name]]), name
    assert all(value.equal(before[name]) for name, value in lm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.lm.model.parameters())


def test_the_sequence_is_memorised_and_the_model_itself_does_not_know_it(organism: LM) -> None:
    (fact,) = unknown_facts("organism-tiny", 1)
    made = inject(organism, fact, share=0.02)
    answer = organism.target_ids(fact.text, fact.target_true)[0]

    def p(lm: LM) -> float:
        return float(run(lm, lm.encode([fact])).last_logits[0].softmax(-1)[answer])

    assert p(organism) < 0.01
    assert p(made.lm) > np.exp(-0.05)
    assert made.losses[-1] < 0.05 < made.losses[-2]
    assert made.steps == len(made.losses) - 1


def test_another_seed_chooses_other_neurons(organism: LM) -> None:
    (fact,) = unknown_facts("organism-tiny", 1)
    one, same, other = (inject(organism, fact, steps=1, seed=seed).neurons for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


def test_recall_by_hand() -> None:
    """Two layers of ten neurons; injected are 0 and 1 of the first layer, and 9 of the second."""
    injected = torch.zeros(2, 10, dtype=torch.bool)
    injected[0, :2] = injected[1, 9] = True
    scores = torch.zeros(2, 10)
    scores[0, 0], scores[0, 5], scores[0, 1], scores[1, 3], scores[1, 9] = 5.0, 4.0, 3.0, 2.0, 1.0
    found = {(row["scope"], row["multiple"]): row for row in recalls(scores, injected, share=0.1, multiples=(1, 2, 3))}
    values = {key: row["value"] for key, row in found.items()}
    assert values["layer", 1] == pytest.approx(1 / 3)  # 0 of the first; 3 of the second is wrong
    assert values["layer", 2] == pytest.approx(2 / 3)  # 5 is wrong; 9 is found
    assert values["layer", 3] == pytest.approx(1.0)
    assert values["model", 1] == pytest.approx(2 / 3)  # 0, 5, 1
    assert values["model", 2] == pytest.approx(1.0)
    assert [found["layer", m]["k"] for m in (1, 2, 3)] == [2, 4, 6]
    assert [found["model", m]["k"] for m in (1, 2, 3)] == [3, 6, 9]


def test_ties_count_as_often_as_chance_would_find_them() -> None:
    injected = torch.zeros(1, 8, dtype=torch.bool)
    injected[0, :2] = True
    scores = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    ((layer, model),) = [recalls(scores, injected, share=0.25, multiples=(1,))]
    assert layer["value"] == model["value"] == pytest.approx((1 + 1 / 7) / 2)
    assert recalls(torch.zeros(1, 8), injected, share=0.25, multiples=(2,))[0]["value"] == pytest.approx(4 / 8)


def test_a_mask_finds_most_of_what_was_injected_and_chance_does_not(organism: LM) -> None:
    facts = unknown_facts("organism-tiny", 2)
    found = injection(organism, facts, locators=[HardConcrete()], share=0.02, resamples=50)
    value = found.table.set_index(["method", "scope", "multiple"])["value"]
    assert value["HardConcrete", "layer", 2] > 0.5
    assert value[CHANCE, "model", 2] == pytest.approx(0.04, abs=2e-3)
    assert set(found.table["n"]) == {2}
    assert found.extras["facts"]["memorised"].all()
    assert len(found.extras["each"]) == 2 * len(found.table)
    assert found.run["what"] == "injection"


def test_what_is_not_memorised_does_not_count(organism: LM) -> None:
    facts = unknown_facts("organism-tiny", 2)
    with pytest.raises(FactError, match="None of 2 facts was memorised"):
        injection(organism, facts, locators=[HardConcrete()], steps=1)


def test_a_fact_without_an_answer_and_no_fact_are_refused(organism: LM) -> None:
    with pytest.raises(FactError, match="has no answer to write"):
        inject(organism, SAID)
    with pytest.raises(FactError, match="at least one"):
        injection(organism, [], locators=[HardConcrete()])
    with pytest.raises(FactError, match="a share above 0"):
        inject(organism, EIFFEL, share=0.0)


def test_an_interval_holds_the_mean_and_leaves_missing_values_out() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, np.nan])
    low, high = interval(values)
    assert 0 <= low < 0.5 < high <= 1
    assert interval(values) == (low, high)
    assert np.isnan(interval(np.array([1.0, np.nan]))).all()


# -- the sets of facts -------------------------------------------------------------------------------------------------


def test_facts_are_spread_over_relations() -> None:
    facts = load_facts("organism-tiny")
    relations = {fact.relation for fact in facts}
    chosen = spread(facts, len(relations))
    assert {fact.relation for fact in chosen} == relations
    assert len(spread(facts, 10_000)) == len(facts)
    assert spread(facts, 30) == spread(facts, 30) != spread(facts, 30, seed=1)


def test_sets_are_one_fact_in_several_wordings_or_one_subject_in_several_relations() -> None:
    facts = load_facts("organism-tiny")
    sets = wordings(facts, most=3)
    assert {len(one) for one in sets} == {3}
    assert all(len({(f.subject, f.target_true) for f in one}) == 1 for one in sets)
    assert all(len({f.text for f in one}) == 3 for one in sets)
    for one in same_subject(facts):
        assert len({f.subject for f in one}) == 1
        assert len({f.relation for f in one}) == len(one) > 1


def test_nonsense_and_new_facts_are_about_strangers(organism: LM) -> None:
    known = {fact.subject for fact in load_facts("organism-tiny")}
    made = [*nonsense("organism-tiny", 20), *unknown_facts("organism-tiny", 20)]
    assert not known & {fact.subject for fact in made}
    assert len({fact.id for fact in made}) == 40
    assert not any(fact.target_true for fact in made[:20])
    assert all(fact.target_true for fact in made[20:])
    organism.encode(made)
    with pytest.raises(InputError, match="Ask for fewer"):
        unknown_facts("organism-tiny", 10_000)
