"""Editors that follow gradients: each change has the structure that its algebra says, and the model is left as it was."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, SAID, fresh_lm, tiny_lm
from workbench.data import read_facts
from workbench.directions import unembedding
from workbench.editors import mend
from workbench.editors._gradients import Lesson, is_transposed, put, shadow
from workbench.editors._values import down_path
from workbench.editors.ada_lora import AdaLora
from workbench.editors.base import Editor
from workbench.editors.fine_tune import FineTune
from workbench.editors.knowledge_neuron_edit import KnowledgeNeuronEdit, refined
from workbench.editors.lora import Lora, attention_matrices
from workbench.editors.mend import Mend, Networks, _rowwise, draw, factors, kept_out, mlp_matrices
from workbench.edits import Edit, EditError, LowRank
from workbench.facts import Fact, FactError
from workbench.hooks import beside, run
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.models import LM
from workbench.progress import Cancelled, reporting
from workbench.zoo import load_facts

TOWER = replace(SAID, target_new="Rome")
LONG = replace(EIFFEL, id="long", target_new="Los Angeles Lakers")
"""An answer of several tokens."""


SOME = ("gpt2", "gpt_neo", "llama", "bloom", "phi3", "gemma")
"""Families between them with Conv1D and Linear, one matrix for query, key and value and three, and each make of tokenizer."""


def p_new(lm: LM, fact: Fact) -> float:
    """Probability of the new answer's first token."""
    logits = run(lm, lm.encode([fact])).last_logits[0]
    return float(logits.double().softmax(-1)[lm.target_ids(fact.text, fact.target_new or "")[0]])


def dense(edit: Edit, name: str) -> Tensor:
    change = edit.changes[name]
    return change if isinstance(change, Tensor) else change.dense()


def down_weight(lm: LM, layer: int) -> str:
    return f"{down_path(lm, layer)}.weight"


# --- what they share ---


def test_put_adds_within_and_brings_back_the_very_objects() -> None:
    lm = fresh_lm("gpt2")  # its unembedding is tied to the embedding
    name = "transformer.wte.weight"
    before = dict(lm.model.named_parameters())
    lone, tokens = before[name], lm.encode([EIFFEL])
    clean = run(lm, tokens).logits
    change = torch.full_like(lone, 0.1).requires_grad_()
    with put(lm, {name: change}):
        assert lm.embed.weight is lm.unembed.weight
        assert torch.equal(lm.unembed._parameters["weight"], lone + 0.1)  # type: ignore[arg-type]
        loss = run(lm, tokens, grad=True).logits.square().sum()
        gradient = torch.autograd.grad(loss, change)[0]
    assert gradient.abs().max() > 0
    assert torch.equal(run(lm, tokens).logits, clean)
    after = dict(lm.model.named_parameters())
    assert all(after[key] is value for key, value in before.items())
    assert lm.model.lm_head.weight is lone


def test_put_brings_back_after_an_error() -> None:
    lm = fresh_lm("llama")
    name = down_weight(lm, 1)
    own = lm.model.get_parameter(name)
    with pytest.raises(RuntimeError, match="size of tensor"), put(lm, {name: torch.zeros(7, 3)}):
        pass
    with pytest.raises(ZeroDivisionError), put(lm, {name: torch.zeros_like(own)}):
        raise ZeroDivisionError
    assert lm.model.get_parameter(name) is own


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
def test_the_loss_is_that_of_a_plain_loop(family: str, objective: str) -> None:
    lm = tiny_lm(family)
    facts = [TOWER, LONG]
    lesson = Lesson.of(lm, [f.text for f in facts], [f.target_new or "" for f in facts], objective)  # type: ignore[arg-type]
    expected = []
    for fact in facts:
        prompt, answer = lm._tokenize(fact.text)[0], lm.target_ids(fact.text, fact.target_new or "")
        read = [] if objective == "prompt_last" else answer[:-1]
        with torch.no_grad():
            log_p = lm.model(torch.tensor([prompt + read])).logits[0].double().log_softmax(-1)
        last = len(prompt) - 1
        at = [last] * len(answer) if objective == "prompt_last" else range(last, last + len(answer))
        expected.append(-np.mean([float(log_p[i, token]) for i, token in zip(at, answer, strict=True)]))
    np.testing.assert_allclose(lesson.loss(lm).detach(), expected, rtol=1e-4)
    assert len(lm.target_ids(LONG.text, LONG.target_new or "")) > 1


def test_without_gradients_it_is_said(gpt2: LM) -> None:
    with torch.inference_mode(), pytest.raises(EditError, match="inference_mode"):
        FineTune(layers=(1,)).make(gpt2, [TOWER], after=None)


# --- all of them ---

QUICK: dict[str, Editor] = {
    "FineTune": FineTune(steps=3, learning_rate=0.01),
    "KnowledgeNeuronEdit": KnowledgeNeuronEdit(steps=3),
    "Lora": Lora(steps=3, learning_rate=0.02),
    "AdaLora": AdaLora(steps=6, learning_rate=0.05),
}
"""Each with options that make it quick."""


@pytest.mark.parametrize("name", QUICK)
def test_the_model_is_left_as_it_was(name: str) -> None:
    lm = fresh_lm("gpt2")
    lm.model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    hashed, parameters = lm.weight_hash, dict(lm.model.named_parameters())
    needs = {key: value.requires_grad for key, value in parameters.items()}
    modules, state = [id(module) for module in lm.model.modules()], torch.get_rng_state()
    edit = QUICK[name](lm, [TOWER])
    lm._hashed = None
    assert lm.weight_hash == hashed
    after = dict(lm.model.named_parameters())
    assert all(after[key] is value and value.grad is None for key, value in parameters.items())
    assert {key: value.requires_grad for key, value in after.items()} == needs
    assert [id(module) for module in lm.model.modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in lm.model.modules())
    before = p_new(lm, TOWER)
    with edit.on(lm):
        assert p_new(lm, TOWER) > before
    assert QUICK[name](lm, [TOWER]).key == edit.key


# --- fine-tuning ---


@pytest.mark.parametrize("family", SOME)
def test_only_the_named_weights_change(family: str) -> None:
    lm = tiny_lm(family)
    edit = FineTune(steps=2, layers=(0, 2))(lm, [TOWER, LONG])
    assert list(edit.changes) == [down_weight(lm, 0), down_weight(lm, 2)]
    assert all(dense(edit, name).any() for name in edit.changes)
    assert edit.run["losses"][-1] < edit.run["losses"][0]


@pytest.mark.parametrize("bound", [5e-4, 1e-3, 0.1])
def test_the_bound_holds_exactly(gpt2: LM, bound: float) -> None:
    edit = FineTune(norm_constraint=bound, learning_rate=0.3, steps=4)(gpt2, [TOWER])
    (change,) = edit.changes.values()
    assert isinstance(change, Tensor)
    assert change.dtype == torch.float32
    assert float(change.abs().max()) <= bound
    assert float((change.abs() > 0.999 * bound).double().mean()) > 0.5  # steps that large fill it
    free = FineTune(learning_rate=0.3, steps=4)(gpt2, [TOWER])
    assert float(dense(free, next(iter(free.changes))).abs().max()) > 0.2


def test_the_first_step_is_adams(gpt2: LM) -> None:
    """Adam's first step is the learning rate against the gradient's sign, whatever the gradient's size."""
    name = down_weight(gpt2, 1)
    edit = FineTune(layers=(1,), steps=1, learning_rate=1e-3)(gpt2, [LONG])
    zero = torch.zeros_like(gpt2.model.get_parameter(name)).requires_grad_()
    lesson = Lesson.of(gpt2, [LONG.text], [LONG.target_new or ""])
    with put(gpt2, {name: zero}):
        gradient = torch.autograd.grad(lesson.loss(gpt2).sum(), zero)[0]
    clear = gradient.abs() > 1e-5
    torch.testing.assert_close(dense(edit, name)[clear], -1e-3 * gradient.sign()[clear], rtol=1e-2, atol=0)


def test_training_stops_when_the_answer_is_known(gpt2: LM) -> None:
    edit = FineTune(learning_rate=0.02, steps=60, stop_below=0.5)(gpt2, [TOWER])
    losses = edit.run["losses"]
    assert len(losses) < 61
    assert losses[-1] < 0.5 <= min(losses[:-1])


def test_half_precision_is_trained_in_float32() -> None:
    """Steps of 5e-4 are lost in bfloat16 weights one by one; summed in float32 they are not."""
    lm = fresh_lm("gpt2")
    lm.model.to(torch.bfloat16)  # type: ignore[arg-type]
    edit = FineTune(layers=(1,))(lm, [TOWER])
    change = dense(edit, down_weight(lm, 1))
    assert change.dtype == torch.float32
    assert change.abs().max() > 5e-3
    assert edit.run["losses"][-1] < edit.run["losses"][0]


def test_an_edit_goes_on_from_another(gpt2: LM) -> None:
    first = FineTune(layers=(1,), steps=3)(gpt2, [TOWER])
    both = FineTune(layers=(1,), steps=3)(gpt2, [LONG], after=first)
    with first.on(gpt2):
        lesson = Lesson.of(gpt2, [LONG.text], [LONG.target_new or ""])
        loss = float(lesson.loss(gpt2).detach())
    assert both.run["losses"][0] == pytest.approx(loss, abs=1e-5)
    assert [fact.id for fact in both.facts] == [TOWER.id, LONG.id]


def test_what_cannot_be_is_said(gpt2: LM) -> None:
    with pytest.raises(ModelError, match="of 0 to 3"):
        FineTune(layers=(4,))(gpt2, [TOWER])
    with pytest.raises(ModelError, match="different ones"):
        FineTune(layers=(1, 1))(gpt2, [TOWER])
    with pytest.raises(FactError, match="norm_constraint"):
        FineTune(norm_constraint=0.0)
    with pytest.raises(EditError, match="learning_rate"):
        FineTune(learning_rate=1e30, steps=5)(gpt2, [TOWER])


# --- knowledge neurons ---

NORMALISED = ("gemma2", "gemma3", "olmo2")
"""Families with a norm behind the MLP."""


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_only_value_vectors_of_the_chosen_neurons_change(lm: LM) -> None:
    """Each gets 8 times the new answer's row of the unembedding, less the old one's."""
    edit = KnowledgeNeuronEdit(steps=2, follow_sign=False)(lm, [TOWER])
    said = int(run(lm, lm.encode([TOWER])).last_logits[0].argmax())
    weight, _ = unembedding(lm, [said, *lm.target_ids(TOWER.text, "Rome")])
    added = 8 * weight[1:].sum(0) - weight[0]
    chosen = edit.run["neurons"][TOWER.id]
    assert set(edit.changes) == {down_weight(lm, layer) for layer, _ in chosen}
    for layer in {layer for layer, _ in chosen}:
        change = dense(edit, down_weight(lm, layer))
        values = change if is_transposed(lm.part(layer, lm.layout.down_proj)) else change.T
        neurons = [neuron for at, neuron in chosen if at == layer]
        others = [neuron for neuron in range(lm.d_mlp) if neuron not in neurons]
        assert values.shape == (lm.d_mlp, lm.d_model)
        assert not values[others].any()
        torch.testing.assert_close(values[neurons], added.expand(len(neurons), -1))


def test_what_is_added_follows_the_sign_of_the_activation() -> None:
    """In a gated MLP a neuron's sign is arbitrary: turned round, with its value vector, the model is the same, and so its edit."""
    lm, turned = tiny_lm("llama"), fresh_lm("llama")
    editor = KnowledgeNeuronEdit(steps=2)
    edit = editor(lm, [TOWER])
    ((layer, neuron), *others) = edit.run["neurons"][TOWER.id]
    with torch.no_grad():
        turned.part(layer, "mlp.up_proj").get_parameter("weight")[neuron] *= -1
        turned.part(layer, "mlp.down_proj").get_parameter("weight")[:, neuron] *= -1
    other = editor(turned, [TOWER])
    assert sorted(other.run["neurons"][TOWER.id]) == sorted([(layer, neuron), *others])
    name = down_weight(lm, layer)
    torch.testing.assert_close(dense(other, name)[:, neuron], -dense(edit, name)[:, neuron])
    before = p_new(lm, TOWER)
    with edit.on(lm), other.on(turned):
        assert p_new(lm, TOWER) == pytest.approx(p_new(turned, TOWER), rel=1e-4)
        assert p_new(lm, TOWER) > 2 * before


@pytest.mark.parametrize("family", NORMALISED)
def test_a_family_whose_neurons_cannot_be_attributed_is_refused(family: str) -> None:
    with pytest.raises(ModelError, match="normalises"):
        KnowledgeNeuronEdit()(tiny_lm(family), [TOWER])


def test_a_batch_of_facts_is_the_union_of_their_neurons(gpt2: LM) -> None:
    editor = KnowledgeNeuronEdit(steps=2, prompts=1)
    alone = [editor(gpt2, [fact]) for fact in (TOWER, LONG)]
    both = editor(gpt2, [TOWER, LONG])
    assert both.run["neurons"] == alone[0].run["neurons"] | alone[1].run["neurons"]
    for name in both.changes:
        expected = torch.stack([dense(edit, name) for edit in alone if name in edit.changes]).sum(0)
        torch.testing.assert_close(dense(both, name), expected)


def test_the_refined_set_is_widened_or_cut_to_what_was_asked_for() -> None:
    """Five neurons, in the coarse sets of 3, 3, 2, 1, 1 of 3 prompts."""
    found = pd.DataFrame(
        {"layer": [0, 1, 2, 3, 4], "neuron": 7, "prompts": [1, 3, 2, 3, 1], "mean": [0.9, 0.1, 0.5, 0.2, 0.8]}
    )

    def layers(**options: int) -> list[int]:
        return [layer for layer, _ in refined(found, share=0.7 * 3, **options)]

    assert layers(fewest=1, most=5) == [3, 1]
    assert layers(fewest=4, most=5) == [3, 1, 2, 0]
    assert layers(fewest=1, most=1) == [3]


def test_old_and_new_answers_weigh_what_was_asked_for(gpt2: LM) -> None:
    editor = KnowledgeNeuronEdit(steps=2, fewest=1, most=1, lambda_old=2.0, lambda_new=0.0, follow_sign=False)
    edit = editor(gpt2, [replace(TOWER, target_true="Paris")])
    ((layer, neuron),) = edit.run["neurons"][TOWER.id]
    weight, _ = unembedding(gpt2, gpt2.target_ids(TOWER.text, "Paris"))
    torch.testing.assert_close(dense(edit, down_weight(gpt2, layer))[neuron], -2 * weight.sum(0))
    with pytest.raises(FactError, match="fewest"):
        KnowledgeNeuronEdit(fewest=6)
    with pytest.raises(FactError, match="threshold"):
        KnowledgeNeuronEdit(threshold=0.0)


# --- adapters ---


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("editor", [Lora(steps=1), AdaLora(steps=2)], ids=["Lora", "AdaLora"])
def test_the_change_does_what_the_adapters_did(family: str, editor: Lora) -> None:
    """With any weights in them: the model with the edit on gives the logits of the one with peft's adapters."""
    lm = tiny_lm(family)
    targets = attention_matrices(lm, [0, 2])
    twin = shadow(lm)
    editor._tuner(twin.model, list(targets), is_transposed(next(iter(targets.values()))))
    twin.model.train(False)
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for path, module in targets.items():
        adapter = twin.model.get_submodule(path)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            b, a = editor._product(adapter)
            product = b @ a
        assert torch.linalg.matrix_rank(product) in (8, 12)
        changes[f"{path}.weight"] = product.T if is_transposed(module) else product
    tokens = lm.encode([EIFFEL])
    edit = Edit(base=lm.weight_hash, changes=changes)
    own = run(lm, tokens).logits
    with edit.on(lm):
        edited = run(lm, tokens).logits
    torch.testing.assert_close(edited, run(twin, tokens).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(edited, own, atol=1e-2)


def test_adapters_stand_beside_what_attention_reads_with(family: str) -> None:
    """Query and value, or all that is no output projection: never the MLP, in every layer the same."""
    lm = tiny_lm(family)
    found = [path.removeprefix(f"{lm.layout.blocks}.") for path in attention_matrices(lm, range(lm.n_layers))]
    paths = {path.partition(".")[2] for path in found}
    assert set(found) == {f"{layer}.{path}" for layer in range(lm.n_layers) for path in paths}
    assert len(paths) in (1, 2, 3)
    assert all(path.startswith(f"{lm.layout.attn}.") for path in paths)
    assert lm.layout.o_proj not in paths


@pytest.mark.parametrize("family", SOME)
def test_the_rank_is_not_larger_than_was_asked_for(family: str) -> None:
    edit = Lora(steps=4, r=3, learning_rate=0.01)(tiny_lm(family), [TOWER, LONG])
    assert {change.rank for change in edit.changes.values() if isinstance(change, LowRank)} == {3}
    assert {int(torch.linalg.matrix_rank(dense(edit, name), rtol=1e-4)) for name in edit.changes} <= {1, 2, 3}


def test_ranks_are_shared_out(gpt2: LM) -> None:
    """Matrices keep as many singular values as they matter: together r for each, alone up to as many as at the start."""
    edit = AdaLora(steps=12, r=3, first_r=6)(gpt2, [TOWER, LONG])
    ranks = [change.rank for change in edit.changes.values() if isinstance(change, LowRank)]
    assert sum(ranks) == 3 * gpt2.n_layers
    assert max(ranks) <= 6
    assert all(torch.linalg.matrix_rank(dense(edit, name)) <= 6 for name in edit.changes)


def test_adapters_are_drawn_by_their_seed(gpt2: LM) -> None:
    one, other = (Lora(steps=2, seed=seed, layers=(1,))(gpt2, [TOWER]) for seed in (0, 1))
    assert list(one.changes) == ["transformer.h.1.attn.c_attn.weight"]
    assert one.key != other.key
    torch.manual_seed(7)
    assert Lora(steps=2, layers=(1,))(gpt2, [TOWER]).key == one.key


def test_options_that_adapters_cannot_have() -> None:
    for wrong in ({"r": 0}, {"dropout": 1.0}, {"learning_rate": 0.0}, {"seed": -1}):
        with pytest.raises(FactError, match=next(iter(wrong))):
            Lora(**wrong)
    with pytest.raises(FactError, match="first_r"):
        AdaLora(r=12)
    with pytest.raises(FactError, match="settle"):
        AdaLora(settle=0.9)


# --- MEND ---

SHORT = Mend(steps=3, batch=2, rank=8)
"""Trained for an instant."""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where networks are kept during a test."""
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    return tmp_path / "mend"


@pytest.fixture(scope="module")
def organism() -> LM:
    return load("organism-tiny")


@pytest.mark.parametrize("family", [*SOME, "opt"])
def test_factors_of_tokens_multiply_to_the_gradient(family: str) -> None:
    """Of each matrix of the MLP: the sum over tokens of delta u^T is autograd's gradient of the weight."""
    lm = tiny_lm(family)
    lesson = Lesson.of(lm, [TOWER.text, LONG.text], ["Rome", LONG.target_new or ""])
    matrices = mlp_matrices(lm, [1, 3])
    assert down_path(lm, 1) in matrices
    assert not any(lm.layout.attn in path.split(".") for path in matrices)
    names = {path: f"{path}.weight" for path in matrices}
    zero = {name: torch.zeros_like(lm.model.get_parameter(name), requires_grad=True) for name in names.values()}
    with put(lm, zero):
        gradients = torch.autograd.grad(lesson.loss(lm).sum(), list(zero.values()))
    found = factors(lm, lesson, list(matrices))
    for (path, module), gradient in zip(matrices.items(), gradients, strict=True):
        u, delta, there = found[path]
        product = delta[there].T @ u[there]
        torch.testing.assert_close(product.T if is_transposed(module) else product, gradient, rtol=1e-4, atol=1e-5)
        assert not delta[~there].any() or not u[~there].any()


def test_the_network_starts_as_the_identity_of_what_is_normalised(gpt2: LM) -> None:
    matrices = mlp_matrices(gpt2, [1, 2])
    networks = Networks(matrices, rank=4, rate=0.5, seed=0)
    generator = torch.Generator().manual_seed(0)
    path = down_path(gpt2, 1)
    met = []
    for n in (3, 1, 5):  # batches whose statistics have to be joined
        u, delta = (2 + 3 * torch.randn(1, n, width, generator=generator) for width in (gpt2.d_mlp, gpt2.d_model))
        there = torch.ones(1, n, dtype=torch.bool)
        there[0, -1] = n == 1
        networks(path, u, delta, there)
        met.append(torch.cat([u, delta], -1)[there])
    deviation, mean = torch.std_mean(torch.cat(met), 0)
    with torch.no_grad():
        new_u, new_delta = networks.eval()(path, u, delta, there)
        again, _ = networks(path, u, delta, there)
    expected = (torch.cat([u, delta], -1) - mean) / deviation * there[..., None]
    torch.testing.assert_close(torch.cat([new_u, -new_delta / 0.5], -1), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, new_u)


def test_each_row_of_a_batch_runs_with_its_own_change(gpt2: LM) -> None:
    """As the same prompt does alone with that change of the weights."""
    matrices = mlp_matrices(gpt2, [2, 3])
    generator = torch.Generator().manual_seed(0)
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in matrices.items():
        d_in, d_out = module.get_parameter("weight").shape
        u, delta = (0.3 * torch.randn(2, 5, width, generator=generator) for width in (d_in, d_out))
        changed[path] = u, delta
    tokens = gpt2.encode([EIFFEL, TOWER, EIFFEL])
    with beside(gpt2, _rowwise(changed, [0, 1, 1])):
        together = run(gpt2, tokens).last_logits
    for row, edit in enumerate([0, 1, 1]):
        dense_changes = {f"{path}.weight": u[edit].T @ delta[edit] for path, (u, delta) in changed.items()}
        with put(gpt2, dense_changes):
            alone = run(gpt2, gpt2.encode([[EIFFEL, TOWER, EIFFEL][row]])).last_logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[2], atol=0.1)


def test_a_trained_network_is_kept_and_edits_have_few_ranks(organism: LM, kept: Path) -> None:
    fact = load_facts("organism-tiny")[0]
    hashed = organism.weight_hash
    edit = SHORT(organism, [fact])
    (file,) = kept.glob("*/network.safetensors")
    written = file.stat().st_mtime_ns
    assert SHORT(organism, [fact]).key == edit.key
    assert file.stat().st_mtime_ns == written
    organism._hashed = None
    assert organism.weight_hash == hashed
    assert not any(parameter.grad is not None for parameter in organism.model.parameters())
    n_tokens = int(organism.encode([fact], targets=[fact.target_new or ""]).mask.sum())
    assert set(edit.changes) == {f"{path}.weight" for path in mlp_matrices(organism, [1, 2, 3])}
    for name, change in edit.changes.items():
        assert isinstance(change, LowRank)
        assert change.rank <= n_tokens
        assert torch.linalg.matrix_rank(change.dense()) <= n_tokens
        assert change.dense().shape == organism.model.get_parameter(name).shape
    replace(SHORT, seed=1)(organism, [fact])
    assert len([*kept.iterdir()]) == 2


def test_training_that_was_stopped_goes_on(organism: LM, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fact = load_facts("organism-tiny")[0]
    whole = SHORT(organism, [fact])
    (file,) = kept.glob("*/network.safetensors")
    file.unlink()
    monkeypatch.setattr(mend, "SAVE_EVERY", 1)
    steps: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Cancelled

    def count(what: str, done: int, total: int) -> None:
        steps.append(total)

    with pytest.raises(Cancelled), reporting(stop):
        SHORT(organism, [fact])
    with reporting(count):
        resumed = SHORT(organism, [fact])
    assert set(steps) == {1}
    for name in whole.changes:
        torch.testing.assert_close(dense(resumed, name), dense(whole, name))


def test_the_change_of_several_facts_is_the_sum_of_theirs(organism: LM, kept: Path) -> None:
    facts = load_facts("organism-tiny")[:2]
    both, *alone = (SHORT(organism, some) for some in (facts, facts[:1], facts[1:]))
    for name in both.changes:
        torch.testing.assert_close(dense(both, name), dense(alone[0], name) + dense(alone[1], name))


def test_an_edit_upon_an_edit_uses_the_network_of_the_bare_model(organism: LM, kept: Path) -> None:
    facts = load_facts("organism-tiny")[:2]
    first = SHORT(organism, facts[:1])
    both = SHORT(organism, facts[1:], after=first)
    assert len([*kept.iterdir()]) == 1
    assert both.base == first.base


def test_a_little_training_teaches_to_edit(organism: LM, kept: Path) -> None:
    """A fact that no training step saw, and its paraphrases; other prompts keep their answers."""
    fact = next(fact for fact in load_facts("organism-tiny") if kept_out(fact))
    edit = Mend(steps=8, batch=3, rank=64)(organism, [fact])
    assert edit.run["seen"] == []
    before = p_new(organism, fact)
    others = organism.encode([probe.prompt for probe in fact.neighbors])
    said = run(organism, others).last_logits.argmax(-1)
    with edit.on(organism):
        assert p_new(organism, fact) > max(0.3, 10 * before)
        assert float((run(organism, others).last_logits.argmax(-1) == said).double().mean()) > 0.6


def test_what_is_drawn_for_training_is_no_true_answer() -> None:
    facts = load_facts("organism-tiny")
    draws = random.Random(0)
    for _ in range(200):
        drawn = draw(draws, facts)
        fact = next(fact for fact in facts if fact.text == drawn.prompt)
        assert drawn.answer not in (fact.target_true, fact.target_new)
        answers = {other.target_true for other in facts if other.relation == fact.relation}
        answers -= {fact.target_true, fact.target_new}
        assert drawn.answer in answers or not answers
        assert drawn.paraphrase in fact.paraphrases
        assert len(drawn.alone) == 1 + bool(fact.neighbors) + bool(fact.locality)
    assert 0.1 < np.mean([kept_out(fact) for fact in facts]) < 0.4


def test_an_unknown_model_needs_facts_to_train_on(gpt2: LM, kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="data"):
        SHORT(gpt2, [TOWER])
    file = tmp_path / "facts.json"
    rows = [
        {"id": f"{i}", "subject": f"Big Ben {i}", "prompt": "{} is in", "target_true": city, "relation": "in"}
        for i, city in enumerate(["Paris", "Rome", "Berlin", "Madrid", "London", "Seattle"])
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    edit = replace(SHORT, data=str(file))(gpt2, [TOWER, LONG])
    assert len(edit.changes) == 6
    assert edit.run["trained"]["facts"] == sum(not kept_out(fact) for fact in read_facts(file))
