"""Zeroing MLP outputs against bare hooks, and what must come out where nothing or everything is zeroed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from tests.examples import EIFFEL, JOBS, SAID, fresh_lm, tiny_lm
from workbench.errors import InputError
from workbench.hooks import run
from workbench.locators import representation_zeroing
from workbench.locators.representation_zeroing import RepresentationZeroing
from workbench.models import LM
from workbench.sites import Site


def with_zeroed_mlps(lm: LM, path: str, ids: Tensor, layers: range, positions: slice) -> Tensor:
    """Log-probabilities at every position, with MLPs' outputs set to zero by hooks put on for this alone."""

    def zero(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, positions] = 0
        return output

    handles = [lm.blocks[layer].get_submodule(path).register_forward_hook(zero) for layer in layers]
    try:
        with torch.no_grad():
            logits: Tensor = lm.model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits[0].log_softmax(-1)


@pytest.mark.parametrize(("family", "path"), [("gpt2", "mlp"), ("llama", "mlp"), ("gpt_neox", "mlp")])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("fact", [EIFFEL, JOBS], ids=lambda fact: fact.id)
def test_bare_hooks_delete_the_same_share_of_the_whole_answer(family: str, path: str, width: int, fact: Any) -> None:
    lm = fresh_lm(family)
    found = RepresentationZeroing(window=width)(lm, [fact])
    tokens, answer = lm.encode([fact], targets=[fact.target_true]), lm.target_ids(fact.text, fact.target_true)
    assert len(answer) == (1 if fact is JOBS else 4)
    steps = range(tokens.lengths[0] - 1, tokens.lengths[0] - 1 + len(answer))
    subject = slice(*(tokens.spans[0] or ()))

    def p(layers: range) -> float:
        log_p = with_zeroed_mlps(lm, path, tokens.ids, layers, subject)
        return float(sum(log_p[step, token] for step, token in zip(steps, answer, strict=True)).exp())  # type: ignore[union-attr]

    clean = p(range(0))
    assert found.extras["facts"]["clean"][0] == pytest.approx(clean, rel=1e-4)
    for row in found.table.to_dict("records"):
        half = width // 2
        left = p(range(max(0, row["layer"] - half), min(lm.n_layers, row["layer"] + half + 1)))
        assert row["score"] == pytest.approx(left, rel=1e-3)
        assert row["value"] == pytest.approx(1 - left / clean, abs=1e-3)
    assert found.table["value"].abs().max() > 0.05


def test_a_row_of_the_subject_belongs_to_no_single_token(gpt2: LM) -> None:
    table = RepresentationZeroing()(gpt2, [SAID]).table
    assert list(table["site"]) == [f"L{layer}.mlp_out" for layer in range(gpt2.n_layers)]
    assert set(table["token"]) == {"all"}
    assert table["position"].isna().all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_each_token_alone_is_a_map(family: str) -> None:
    lm = tiny_lm(family)
    found = RepresentationZeroing(tokens="each", window=1, score="p")(lm, [SAID])
    tokens, answer = lm.encode([SAID]), int(found.extras["facts"]["answer_ids"][0])
    grid = found.grid(kind="mlp_out", column="score")
    assert grid.shape == (tokens.lengths[0], lm.n_layers)
    for position, layer in ((0, 0), (tokens.lengths[0] - 1, lm.n_layers - 1), (2, 1)):
        site = Site(layer=layer, kind="mlp_out", token=position)
        patched = run(lm, tokens, write={site: torch.zeros(lm.d_model)})
        expected = float(patched.last_logits[0].softmax(-1)[answer])
        assert grid.loc[position, layer] == pytest.approx(expected, abs=1e-6)


def test_a_subject_of_one_token_has_the_same_rows_in_both_ways() -> None:
    lm = tiny_lm("gpt2")
    fact = replace(JOBS, subject="Tower", prompt="The {} is in")
    assert lm.encode([fact]).spans[0] == (1, 2)
    together, each = (RepresentationZeroing(tokens=tokens, window=3)(lm, [fact]) for tokens in ("subject", "each"))
    alone = each.table[each.table["token"] == "subject_last"]
    assert np.allclose(together.table["score"], alone["score"], atol=1e-7)


def test_a_window_over_the_model_has_one_value_and_mlps_that_add_nothing_have_none() -> None:
    lm = fresh_lm("llama")
    wide = RepresentationZeroing(window=2 * lm.n_layers)(lm, [SAID]).table
    assert wide["value"].nunique() == 1
    assert abs(wide["value"][0]) > 1e-2
    with torch.no_grad():
        lm.part(2, lm.layout.down_proj).get_parameter("weight").zero_()
    narrow = RepresentationZeroing(window=1)(lm, [SAID]).table
    assert narrow["value"][2] == pytest.approx(0, abs=1e-6)
    assert narrow["value"][:2].abs().min() > 1e-2
    # What the last layer adds to the subject reaches no other token.
    assert narrow["value"][3] == pytest.approx(0, abs=1e-6)


def test_many_layers_are_run_in_several_batches(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RepresentationZeroing(window=3)(gpt2, [EIFFEL]).table
    monkeypatch.setattr(representation_zeroing, "_ROWS_AT_ONCE", 3)
    pd.testing.assert_frame_equal(RepresentationZeroing(window=3)(gpt2, [EIFFEL]).table, whole)


def test_a_window_of_no_layers_is_refused() -> None:
    with pytest.raises(InputError, match="0 layers wide"):
        RepresentationZeroing(window=0)
