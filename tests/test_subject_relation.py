"""The subject's map is the causal trace's, the relation's is the same experiment with the other tokens corrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.examples import JOBS, SAID, SAO_PAULO, fresh_lm, tiny_lm
from workbench import zoo
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.subject_relation import SubjectRelation
from workbench.noise import Noise, draw
from workbench.sites import Site

SIGMA = "0.5"


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("score", ["p", "kl", "logit_diff"])
def test_the_subjects_share_is_the_causal_traces_effect_over_its_total(family: str, score: str) -> None:
    lm = tiny_lm(family)
    options: dict[str, Any] = {"samples": 3, "window": 3, "noise": SIGMA, "score": score}
    found, trace = SubjectRelation(**options)(lm, [SAID]), CausalTrace(**options)(lm, [SAID])
    total = trace.extras["facts"]["total_effect"][0]
    assert list(found.table["site"]) == list(trace.table["site"])
    assert np.allclose(found.table["subject"], trace.table["value"] / total, atol=1e-4)
    assert np.allclose(found.table["value"], found.table["subject"] - found.table["relation"])
    assert found.extras["facts"]["total_effect"][0] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_relations_share_comes_from_noise_on_all_other_words(family: str) -> None:
    """A BOS token is no word."""
    lm = tiny_lm(family)
    samples = 2
    found = SubjectRelation(samples=samples, noise=SIGMA, kinds=("resid_post",))(lm, [SAID])
    tokens, answer = lm.encode([SAID]), int(found.extras["facts"]["answer_ids"][0])
    start, stop = tokens.spans[0] or (0, 0)
    words = [i for i in range(lm.tokenizer.bos_token in tokens.texts[0], tokens.lengths[0]) if not start <= i < stop]
    noise = torch.zeros(samples, tokens.lengths[0], lm.d_model)
    noise[:, words] = draw(lm, Noise.parse(SIGMA), samples=samples, tokens=len(words), seed=1).float()
    clean = run(lm, tokens, read=["resid_post"])

    def p(site: Site | None = None) -> float:
        embed = Site(layer=0, kind="embed")
        restored = {} if site is None else {site: clean[Site(layer=site.layer, kind=site.kind)]}
        corrupted = run(lm, tokens.repeat(samples), write={embed: lambda x: x + noise, **restored})
        return float(corrupted.last_logits.softmax(-1)[:, answer].mean())

    low, high = p(), float(clean.last_logits[0].softmax(-1)[answer])
    assert found.extras["facts"]["corrupted_relation"][0] == pytest.approx(low, abs=1e-6)
    for row in found.table.to_dict("records")[:: lm.n_layers + 1]:
        share = (p(Site.parse(row["site"])) - low) / (high - low)
        assert row["relation"] == pytest.approx(share, abs=1e-4)


def test_the_last_state_brings_back_all_of_both_and_so_their_difference_is_none(fact: Fact) -> None:
    lm = tiny_lm("gpt2")
    table = SubjectRelation(samples=2, noise=SIGMA, kinds=("resid_post",))(lm, [fact]).table
    last = lm.encode([fact]).lengths[0] - 1
    top = table[(table["layer"] == lm.n_layers - 1) & (table["position"] == last)].iloc[0]
    assert (top["subject"], top["relation"], top["value"]) == pytest.approx((1, 1, 0), abs=1e-3)


@pytest.fixture(params=[SAID, JOBS, SAO_PAULO], ids=lambda fact: str(fact.id))
def fact(request: pytest.FixtureRequest) -> Fact:
    """Subjects in the middle and at the start of a prompt; the answer is what the model says."""
    fact: Fact = request.param
    return replace(fact, target_true="")


def test_in_a_trained_model_early_states_of_the_subject_are_the_subjects() -> None:
    lm = load("organism-tiny")
    facts = [fact for fact in zoo.load_facts("organism-tiny") if fact.relation == "landmark_city"][:2]
    table = SubjectRelation(samples=4, window=1, kinds=("resid_post",))(lm, facts).table
    early = table[table["layer"] == 0]
    subject, last = (early.loc[early["token"] == role, "value"] for role in ("subject_last", "last"))
    assert (subject > 0.3).all()
    assert (last < 0.1).all()


def test_a_prompt_of_nothing_but_its_subject_is_refused() -> None:
    fact = Fact(id="x", subject="The Eiffel Tower is", prompt="{}")
    for family in ("gpt2", "llama"):
        with pytest.raises(FactError, match="no words beside its subject"):
            SubjectRelation(noise=SIGMA)(tiny_lm(family), [fact])


def test_a_corruption_that_changes_nothing_is_refused() -> None:
    lm = fresh_lm("gpt2")
    with torch.no_grad():
        for layer in range(lm.n_layers):  # no attention: what stands before the last token does not matter
            lm.part(layer, lm.layout.o_proj).get_parameter("weight").zero_()
    with pytest.raises(FactError, match=r"with its subject corrupted differ by .* in p"):
        SubjectRelation(noise=SIGMA, samples=2)(lm, [SAID])
