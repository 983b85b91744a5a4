"""Patching between two prompts: identities, its two directions, single heads and neurons, and another implementation."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.examples import EIFFEL, SAID, TURNED, fresh_lm, tiny_lm
from workbench import export, zoo
from workbench.facts import FactError
from workbench.gradients import estimate_entries, restore_by_gradient
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.locators.activation_patching import ActivationPatching
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.circuit_edges import CircuitEdges
from workbench.models import LM
from workbench.restoring import Cell, restore_by_loop
from workbench.sites import KINDS, Site

STATES: dict[str, Any] = {"kinds": ("resid_pre", "resid_post"), "substitutes": (TURNED,)}
TWICE = "Eiffel Eiffel"
"""A subject that differs from the fact's own in its second token alone."""


def experiment(lm: LM, **options: Any) -> Any:
    """What is run for `SAID`."""
    return ActivationPatching(**{"substitutes": (TURNED,), **options})._experiment(lm, SAID)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("score", ["logit_diff", "p", "logp"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "bloom"])
def test_the_states_in_which_all_the_difference_lies_have_all_of_the_effect(
    direction: Any, score: Any, family: str
) -> None:
    """Below the blocks that is the one token that differs, above them the last one."""
    lm = tiny_lm(family)
    found = ActivationPatching(**{**STATES, "substitutes": (TWICE,)}, direction=direction, score=score)(lm, [SAID])
    span = lm.encode([SAID]).spans[0]
    assert span is not None
    for kind, layer, position in (("resid_pre", 0, span[1] - 1), ("resid_post", lm.n_layers - 1, -1)):
        values = found.grid(kind=kind)[layer].to_numpy().copy()
        assert values[position] == pytest.approx(1, abs=1e-3)
        values[position] = 0
        assert np.allclose(values, 0, atol=1e-3)
    facts = found.extras["facts"].iloc[0]
    assert facts["corrupted_prompt"].strip().endswith("Eiffel Eiffel is in")
    assert facts["total_effect"] == pytest.approx(facts["clean"] - facts["corrupted"])


def test_a_run_patched_with_its_own_activations_is_that_run(gpt2: LM) -> None:
    made = experiment(gpt2, kinds=("resid_pre", "attn_out", "mlp_out", "z", "mlp_post"))
    for tokens in (made.problem.clean, made.problem.corrupted):
        same = restore_by_loop(gpt2, replace(made.problem, clean=tokens, corrupted=tokens), made.cells)
        assert torch.allclose(same.cells, same.clean.expand_as(same.cells), atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_noising_one_prompt_is_denoising_the_other(family: str) -> None:
    """Shares of the same difference, seen from its other end."""
    lm = tiny_lm(family)
    kinds: Any = ("resid_pre", "attn_out", "mlp_out", "z")
    fact = replace(SAID, target_true="Paris")
    noised = ActivationPatching(kinds=kinds, direction="noise", score="logp", substitutes=(TURNED,))(lm, [fact])
    other = replace(fact, subject=TURNED)
    denoised = ActivationPatching(kinds=kinds, score="logp", substitutes=(SAID.subject,))(lm, [other])
    assert np.allclose(noised.table["value"], denoised.table["value"], atol=1e-4)
    assert np.allclose(noised.table["score"], denoised.table["score"], atol=1e-5)
    assert noised.table["value"].abs().max() > 0.1
    for end, opposite in (("clean", "corrupted"), ("corrupted", "clean")):
        one, two = noised.extras["facts"][end][0], denoised.extras["facts"][opposite][0]
        assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gptj"])
def test_heads_and_neurons_are_patched_one_by_one(family: str) -> None:
    lm = tiny_lm(family)
    patching = ActivationPatching(kinds=("z", "mlp_post"), neurons=7, score="p", substitutes=(TURNED,))
    found = patching(lm, [SAID])
    clean, other = lm.encode([SAID]), lm.encode([replace(SAID, subject=TURNED)])
    answer = int(found.extras["facts"]["answer_ids"][0])
    heads, neurons = found.heads(), found.neurons()
    assert len(heads) == lm.n_layers * lm.n_heads * clean.lengths[0]
    assert len(neurons) == 7
    assert not neurons.duplicated(["layer", "position", "neuron"]).any()
    for _, row in pd.concat([heads[::17], neurons]).iterrows():
        site = Site.parse(row["site"])
        everywhere = replace(site, token=None)
        patched = run(lm, other, write={site: run(lm, clean, read=[everywhere])[everywhere]})
        assert row["score"] == pytest.approx(float(patched.last_logits[0].softmax(-1)[answer]), abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "cohere"])
def test_all_heads_together_are_what_attention_adds_and_all_neurons_what_the_mlp_adds(family: str) -> None:
    lm = tiny_lm(family)
    made = experiment(lm, kinds=("attn_out", "mlp_out"), score="p")
    whole = restore_by_loop(lm, made.problem, made.cells)
    clean = run(lm, made.problem.clean, read=["z", "mlp_post"])
    for cell, expected in zip(made.cells, whole.cells, strict=True):
        kind, part, n = ("z", "head", lm.n_heads) if cell.kind == "attn_out" else ("mlp_post", "neuron", lm.d_mlp)
        values = clean[f"L{cell.layer}.{kind}"].chunk(n, dim=-1)
        sites = [Site.parse(f"L{cell.layer}.{kind}[{i}]@{cell.position}") for i in range(n)]
        patched = run(lm, made.problem.corrupted, write=dict(zip(sites, values, strict=True)))
        assert float(made.problem.score(patched.logits[:, -1:])) == pytest.approx(float(expected), abs=1e-6), part


def test_the_neurons_are_those_with_the_largest_estimates_which_add_up_to_the_mlps() -> None:
    lm = tiny_lm("gpt2")
    made = experiment(lm, kinds=("mlp_post",), neurons=5)
    estimates = estimate_entries(lm, made.problem, "mlp_post")
    assert estimates.shape == (lm.n_layers, 1, made.problem.clean.lengths[0], lm.d_mlp)
    whole = [cell for cell in made.cells if cell.neuron is None]
    summed = restore_by_gradient(lm, made.problem, whole)
    added = torch.stack([estimates[cell.layer, :, cell.position].sum(-1) for cell in whole]).double()
    assert torch.allclose(summed.cells - summed.corrupted, added, atol=1e-4)
    singles = [cell for cell in made.cells if cell.neuron is not None]
    sizes = [abs(float(estimates[cell.layer, 0, cell.position, cell.neuron])) for cell in singles]
    assert sizes == sorted(estimates.abs().flatten().tolist(), reverse=True)[:5]
    alone = restore_by_gradient(lm, made.problem, singles)
    assert (alone.cells - alone.corrupted)[:, 0].abs().tolist() == pytest.approx(sizes, abs=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_the_window_counts_for_sublayers_only(gpt2: LM, width: int) -> None:
    cells: list[Cell] = experiment(gpt2, kinds=("resid_pre", "attn_out", "mlp_out", "z"), window=width).cells
    assert {len(cell.layers) for cell in cells if cell.kind in ("resid_pre", "z")} == {1}
    assert max(len(cell.layers) for cell in cells if cell.kind in ("attn_out", "mlp_out")) == width


def test_a_peer_with_another_answer_is_proposed_where_there_is_one() -> None:
    lm, facts = load("organism-tiny"), zoo.load_facts("organism-tiny")
    patching = ActivationPatching(kinds=("resid_post",)).resolved(lm, facts)
    by_subject = {(fact.relation, fact.subject): fact for fact in facts}
    asked = [fact for fact in facts if fact.relation in ("capital", "landmark_city")][:4]
    for fact, (_, row) in zip(asked, patching(lm, asked).extras["facts"].iterrows(), strict=True):
        before, after = fact.prompt.split("{}")
        subject = row["corrupted_prompt"].removeprefix(before).removesuffix(after)
        peer = by_subject[fact.relation, subject]
        assert peer.target_true != fact.target_true
        assert row["foil"] == peer.target_true
        assert row["total_effect"] > 1


def test_typed_substitutes_are_tried_in_order_until_the_model_says_something_else(gpt2: LM) -> None:
    said = int(run(gpt2, gpt2.encode([SAID])).last_logits[0].argmax())
    subjects = ("Eiffel Eiffel", TURNED, "Tower Tower", "Paris")
    other = {name: gpt2.encode([replace(SAID, subject=name)]) for name in subjects}
    fits = [name for name in subjects if other[name].spans == gpt2.encode([SAID]).spans]
    changes = [name for name in fits if int(run(gpt2, other[name]).last_logits[0].argmax()) != said]
    assert changes
    assert len(fits) < len(subjects)
    found = experiment(gpt2, substitutes=("Paris", SAID.subject, *fits))
    assert "".join(found.problem.corrupted.texts[0]).strip() == SAID.prompt.format(changes[0])


def test_two_prompts_without_a_difference_are_refused() -> None:
    lm = fresh_lm("gpt2")
    first, second = lm.encode([SAID]).ids[0, slice(*lm.encode([SAID]).spans[0] or ())].tolist()
    with torch.no_grad():
        lm.embed.get_parameter("weight")[first] = lm.embed.get_parameter("weight")[second]
    with pytest.raises(FactError, match=r"differ by .* in p, from .*: there is no effect"):
        ActivationPatching(score="p", substitutes=(TURNED,))(lm, [SAID])


def test_what_cannot_be_patched_is_refused(gpt2: LM) -> None:
    with pytest.raises(FactError, match=r"None of the 1 substitutes has as many tokens as 'Eiffel Tower'"):
        ActivationPatching()(gpt2, [SAID])
    with pytest.raises(FactError, match="kinds is"):
        ActivationPatching(kinds=("embed",))  # type: ignore[arg-type]
    with pytest.raises(FactError, match="-1 neurons"):
        ActivationPatching(neurons=-1)
    with pytest.raises(ModelError, match="no resid_mid"):
        ActivationPatching(kinds=("resid_mid",), substitutes=(TURNED,))(tiny_lm("gptj"), [SAID])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformer_lens_gives_the_same_maps_of_states_and_heads(family: str) -> None:
    lm = tiny_lm(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from transformer_lens import patching
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        twin = copy.deepcopy(lm.model)
        bridge: Any = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
    found = ActivationPatching(kinds=("resid_pre", "z"), score="p", substitutes=(TURNED,))(lm, [SAID])
    clean, other = lm.encode([SAID]).ids, lm.encode([replace(SAID, subject=TURNED)]).ids
    answer = int(found.extras["facts"]["answer_ids"][0])

    def p_answer(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1].softmax(-1)[answer]

    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean, prepend_bos=False)
        states = patching.get_act_patch_resid_pre(bridge, other, cache, p_answer)
        heads = patching.get_act_patch_attn_head_out_by_pos(bridge, other, cache, p_answer)
    assert np.allclose(found.grid(kind="resid_pre", column="score").to_numpy().T, states.numpy(), rtol=0, atol=1e-5)
    rows = found.heads()
    expected = heads.numpy()[rows["layer"], rows["position"], rows["head"].astype(int)]
    assert np.allclose(rows["score"], expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1e-3


def test_rows_come_in_the_order_of_their_kinds(gpt2: LM) -> None:
    found = ActivationPatching(kinds=("z", "resid_pre"), substitutes=(TURNED,))(gpt2, [SAID, EIFFEL])
    assert found.kinds == ("z", "resid_pre")
    assert set(found.kinds) <= set(KINDS)


def test_the_protocol_names_the_counterfactual_of_one_fact_and_no_inner_list(gpt2: LM) -> None:
    patching = ActivationPatching(substitutes=(TURNED, "rich"), kinds=("resid_pre",))
    one = export.protocol_text(patching(gpt2, [SAID]))
    assert "Counterfactual prompt “The Tower Eiffel is in”; direction denoise" in one
    lm, known = load("organism-tiny"), zoo.load_facts("organism-tiny")
    many = ActivationPatching(kinds=("resid_pre",)).resolved(lm, known)
    several = export.protocol_text(many(lm, known[:2]))
    assert "Subject swapped for another of equal length; direction denoise" in several
    assert "relations" not in several
    assert known[0].relation not in several


def test_a_swapped_trace_and_circuit_name_their_counterfactual_too(gpt2: LM) -> None:
    swap: dict[str, Any] = {"corrupt": "swap", "substitutes": (TURNED,)}
    for locator in (CausalTrace(kinds=("mlp_out",), window=1, **swap), CircuitEdges(top=5, exact=0, steps=1, **swap)):
        assert "ounterfactual prompt “The Tower Eiffel is in”" in export.protocol_text(locator(gpt2, [SAID]))
