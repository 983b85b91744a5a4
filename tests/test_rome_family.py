"""The algebra of the closed-form editors: what W' gives for the fact's key, of which rank it is, what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples import EIFFEL, JOBS, MESSI, tiny_lm
from workbench.editors._values import (
    ValueEditor,
    down_weight,
    find_values,
    read_keys,
    read_values,
    solve,
    write_prefixes,
)
from workbench.editors.alpha_edit import AlphaEdit, null_space
from workbench.editors.emmet import Emmet
from workbench.editors.memit import Memit, fact_keys
from workbench.editors.pmet import Pmet
from workbench.editors.r_rome import RRome
from workbench.editors.rome import Rome
from workbench.edits import Edit, EditError, LowRank
from workbench.facts import Fact
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.models import LM
from workbench.moments import second_moments

FACTS = [EIFFEL, replace(JOBS, target_new="Google"), replace(MESSI, target_new="Rome")]
QUICK: dict[str, Any] = {
    "steps": 4,
    "prefix_lengths": (3, 4),
    "moment_tokens": 600,
    "corpus": "bundled",
    "reference": "resid_post",
}
LAYER = 2


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))


def prefixes_of(lm: LM) -> tuple[str, ...]:
    return write_prefixes(lm, (3, 4), seed=0)


def matrix(edit: Edit, lm: LM, layer: int = LAYER) -> Tensor:
    """The change of W as a map from keys to values, float64."""
    (change,) = [change for name, change in edit.changes.items() if f".{layer}." in name]
    assert isinstance(change, LowRank)
    dense = change.rows.double() @ change.columns.double().T
    return dense if dense.shape == down_weight(lm, layer).shape else dense.T


def rank(delta: Tensor) -> int:
    return int((torch.linalg.svdvals(delta) > 1e-5 * torch.linalg.svdvals(delta)[0]).sum())


def moment(lm: LM, layer: int = LAYER) -> Tensor:
    return second_moments(lm, [layer], corpus="bundled", tokens=600).matrix(layer)


def test_rome_maps_the_key_to_the_value_by_rank_one(family: str) -> None:
    """W' k* = v*, and dW = (v* - W k*) (C^-1 k)^T / ... (arXiv 2202.05262, eq. 2)."""
    lm, editor = tiny_lm(family), Rome(layers=(LAYER,), **QUICK)
    edit, prefixes = editor(lm, [EIFFEL]), prefixes_of(lm)
    value = find_values(lm, EIFFEL, LAYER, ["down_out"], editor, prefixes)["down_out"]
    with edit.on(lm):
        assert torch.allclose(read_values(lm, [EIFFEL], LAYER, "down_out")[0], value.wanted, atol=1e-4)
    delta = matrix(edit, lm)
    assert rank(delta) == 1
    keys = read_keys(lm, [EIFFEL], [LAYER], prefixes)[LAYER][0].double()
    direction = delta[delta.norm(dim=1).argmax()]
    expected, _ = solve(moment(lm), keys.mean(0)[:, None], what="C")
    assert torch.cosine_similarity(direction, expected[:, 0], dim=0).abs() > 1 - 1e-6


def test_rome_is_the_closest_change_that_maps_the_key_to_the_value() -> None:
    """Any other W' with W' k = v moves W on usual keys (in the norm of C) at least as much, with one key for both."""
    lm = tiny_lm("gpt2")
    delta, c = matrix(RRome(layers=(LAYER,), key="prompt", **QUICK)(lm, [EIFFEL]), lm), moment(lm)
    key = read_keys(lm, [EIFFEL], [LAYER])[LAYER][0, 0].double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.randn(delta.shape, generator=generator, dtype=torch.float64) * delta.norm() / delta.numel() ** 0.5
        other = other - torch.outer(other @ key, key) / (key @ key)  # leaves the key's value alone
        further = delta + 0.1 * other
        assert torch.trace(further @ c @ further.T) > torch.trace(delta @ c @ delta.T)


def test_r_rome_takes_one_key_everywhere() -> None:
    lm = tiny_lm("llama")
    editor = RRome(layers=(LAYER,), **QUICK)
    delta = matrix(editor(lm, [EIFFEL]), lm)
    prefixes = prefixes_of(lm)
    keys = read_keys(lm, [EIFFEL], [LAYER], prefixes)[LAYER][0].double()
    value = find_values(lm, EIFFEL, LAYER, ["down_out"], editor, prefixes)["down_out"]
    average, weight = keys.mean(0), down_weight(lm, LAYER).double()
    assert torch.allclose((weight + delta) @ average, value.wanted.double(), atol=1e-4)
    assert not torch.allclose((weight + delta) @ keys[0], value.wanted.double(), atol=1e-4)


def test_without_covariance_the_direction_is_the_key() -> None:
    lm = tiny_lm("gpt2")
    delta = matrix(Rome(layers=(LAYER,), covariance=False, **QUICK)(lm, [EIFFEL]), lm)
    average = read_keys(lm, [EIFFEL], [LAYER], prefixes_of(lm))[LAYER][0].double().mean(0)
    assert torch.cosine_similarity(delta[0], average, dim=0).abs() > 1 - 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_memit_is_the_least_squares_solution(family: str) -> None:
    """One layer: dW solves min |dW K - R|^2 + lambda tr(dW C dW^T), here by lstsq on stacked rows (arXiv 2210.07229, eq. 14)."""
    lm, ridge = tiny_lm(family), 0.7
    editor = Memit(layers=(LAYER,), ridge=ridge, **QUICK)
    delta, prefixes = matrix(editor(lm, FACTS), lm), prefixes_of(lm)
    keys = fact_keys(read_keys(lm, FACTS, [LAYER], prefixes)[LAYER])
    values = [find_values(lm, fact, LAYER, ["resid_post"], editor, prefixes)["resid_post"] for fact in FACTS]
    missing = torch.stack([value.wanted - value.was for value in values]).double()
    root = torch.linalg.cholesky(moment(lm)).T * ridge**0.5
    left = torch.cat([keys, root])
    right = torch.cat([missing, torch.zeros(len(root), lm.d_model, dtype=torch.float64)])
    expected = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    assert torch.allclose(delta, expected, atol=1e-4 * float(expected.abs().max()))
    assert rank(delta) <= len(FACTS)


@pytest.mark.parametrize("editor", [Memit(ridge=0.1), Pmet(ridge=0.1), AlphaEdit(threshold=0.05, ridge=0.1), Emmet()])
def test_several_layers_take_a_share_each_and_ranks_are_at_most_the_facts(editor: ValueEditor) -> None:
    lm = tiny_lm("llama")
    edit = replace(editor, layers=(1, 2), **QUICK)(lm, FACTS)
    assert len(edit.changes) == 2
    for layer in (1, 2):
        assert rank(matrix(edit, lm, layer)) <= len(FACTS)


def test_more_weight_on_usual_keys_changes_them_less() -> None:
    lm = tiny_lm("gpt2")
    moved = []
    for ridge in (0.01, 1.0, 100.0):
        delta = matrix(Memit(layers=(LAYER,), ridge=ridge, **QUICK)(lm, FACTS), lm)
        moved.append(float(torch.trace(delta @ moment(lm) @ delta.T)))
    assert moved == sorted(moved, reverse=True)


def test_alpha_edit_stays_in_the_null_space_and_keeps_earlier_keys() -> None:
    """dW P = dW (arXiv 2410.02355, eq. 12), and with no ridge left a second edit gives earlier keys what they had."""
    lm = tiny_lm("gpt2")
    editor = AlphaEdit(layers=(LAYER,), threshold=0.05, ridge=1e-4, **QUICK)
    first = editor(lm, FACTS[:1])
    basis = null_space(moment(lm), 0.05, layer=LAYER)
    assert 0 < basis.shape[1] < lm.d_mlp
    delta = matrix(first, lm)
    assert torch.allclose(delta @ basis @ basis.T, delta, atol=1e-5 * float(delta.abs().max()))
    outside = torch.linalg.eigh(moment(lm)).eigenvectors[:, -1]
    assert float((delta @ outside).norm()) < 1e-4 * float(delta.norm())

    key = first.state[f"keys.{LAYER}"][0].double()
    both = editor(lm, FACTS[1:2], after=first)
    assert both.state[f"keys.{LAYER}"].shape == (2, lm.d_mlp)
    careless = editor(lm, FACTS[1:2])
    moved = (matrix(both, lm) - delta) @ key
    assert float(moved.norm()) < 0.05 * float((matrix(careless, lm) @ key).norm())


def test_emmet_with_one_fact_and_no_slack_is_rome_with_the_blocks_target() -> None:
    """arXiv 2403.14236, section 4.2."""
    lm = tiny_lm("llama")
    editor = Emmet(layers=(LAYER,), slack=0.0, **QUICK)
    delta, prefixes = matrix(editor(lm, [EIFFEL]), lm), prefixes_of(lm)
    key = fact_keys(read_keys(lm, [EIFFEL], [LAYER], prefixes)[LAYER])[0]
    value = find_values(lm, EIFFEL, LAYER, ["resid_post"], editor, prefixes)["resid_post"]
    direction, _ = solve(moment(lm), key[:, None], what="C")
    missing = (value.wanted - value.was).double()
    expected = torch.outer(missing, direction[:, 0]) / (direction[:, 0] @ key)
    assert torch.allclose(delta, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(delta @ key, missing, atol=1e-5)


def test_the_search_lowers_its_loss_and_stays_within_the_clamp() -> None:
    lm = tiny_lm("gpt2")
    options = Rome(layers=(LAYER,), **{**QUICK, "steps": 10}, learning_rate=0.05, weight_decay=0.0, kl_factor=0.0)
    value = find_values(lm, EIFFEL, LAYER, ["down_out"], options, ())["down_out"]
    assert value.losses[-1] < value.losses[0]
    tight = find_values(lm, EIFFEL, LAYER, ["down_out"], replace(options, clamp=0.01), ())["down_out"]
    reference = read_values(lm, [EIFFEL], LAYER, "resid_post")[0].norm()
    assert (tight.wanted - tight.was).norm() <= 0.01 * reference * (1 + 1e-5)


def test_the_first_loss_is_the_answers_mean_negative_log_probability() -> None:
    lm = tiny_lm("llama")
    options = Rome(layers=(LAYER,), **{**QUICK, "steps": 1}, kl_factor=0.0)
    prefixes = prefixes_of(lm)
    value = find_values(lm, EIFFEL, LAYER, ["down_out"], options, prefixes)["down_out"]
    by_hand = []
    for prefix in ("", *prefixes):
        prompt = prefix + EIFFEL.text
        ids = lm.target_ids(prompt, "Rome")
        logits = run(lm, lm.encode([prompt], targets=["Rome"])).logits[0]
        start = len(lm.encode([prompt]).texts[0]) - 1
        by_hand.append(-sum(float(logits[start + i].log_softmax(-1)[t]) for i, t in enumerate(ids)) / len(ids))
    assert value.losses[0] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_prefixes_are_the_models_own_words_and_the_same_for_a_seed() -> None:
    lm = tiny_lm("gpt2")
    assert write_prefixes(lm, (3, 5), seed=1) == write_prefixes(lm, (3, 5), seed=1)
    assert write_prefixes(lm, (8,), seed=1) != write_prefixes(lm, (8,), seed=2)
    assert all(prefix.endswith(". ") and "{" not in prefix for prefix in write_prefixes(lm, (6,) * 5, seed=0))
    assert write_prefixes(lm, (), seed=0) == ()
    with pytest.raises(ModelError, match="positions"):
        write_prefixes(lm, (100_000,), seed=0)


def test_what_cannot_be_inverted_is_told_with_its_condition_number() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(EditError, match="condition number is inf"):
        solve(singular, torch.ones(3, 1), what="C")
    with pytest.raises(EditError, match=r"condition number is 1\.0e\+15"):
        solve(torch.diag(torch.tensor([1.0, 1e-15])).double(), torch.ones(2, 1), what="C")
    dead = torch.diag(torch.tensor([2.0, 0.0])).double()
    found, condition = solve(dead, torch.tensor([[1.0], [0.0]]), what="C")
    assert [*found[:, 0].tolist(), condition] == pytest.approx([0.5, 0.0, 1.0])
    with pytest.raises(EditError, match="cannot be inverted"):
        solve(dead, torch.ones(2, 1), what="C")


def test_moments_are_those_of_the_model_without_edits() -> None:
    lm, editor = tiny_lm("llama"), Rome(layers=(LAYER,), **QUICK)
    own = editor.moments(lm)[LAYER]
    with Rome(layers=(1,), covariance=False, **QUICK)(lm, [EIFFEL]).on(lm):
        assert torch.equal(editor.moments(lm)[LAYER], own)


def test_facts_of_a_batch_are_edited_one_after_the_other_by_rome() -> None:
    lm = tiny_lm("gpt2")
    edit = Rome(layers=(LAYER,), **QUICK)(lm, FACTS)
    assert rank(matrix(edit, lm)) == len(FACTS)
    assert [row["fact"] for row in edit.run["edited"]] == [fact.id for fact in FACTS]


def test_a_fact_whose_subject_ends_the_prompt_can_be_edited() -> None:
    fact: Fact = FACTS[2]
    assert fact.text.endswith(fact.subject)
    assert Rome(layers=(LAYER,), **QUICK)(tiny_lm("llama"), [fact]).changes
