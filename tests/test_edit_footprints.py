"""Where an edit changes a model: norms, ranks and shares against plain linear algebra; activations against two runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analyses.locator_agreement import agreement
from tests.examples import EIFFEL, SAID, tiny_lm
from tests.test_edits import Doubling, Saying, dense, edit_of
from workbench.edit_footprints import functional_footprint, kind_of, singular_values, weight_footprint
from workbench.editors.rome import Rome
from workbench.edits import Edit, EditError, LowRank
from workbench.facts import Probe
from workbench.hooks import run
from workbench.locators.logit_lens import LogitLens
from workbench.results import FOOTPRINT_COLUMNS, Footprint

NEIGHBORS = (Probe(prompt="The Colosseum is in", target="Rome"), Probe(prompt="Big Ben is in", target="London"))
FACT = replace(EIFFEL, neighbors=NEIGHBORS)


def down(family: str, layer: int = 2) -> str:
    lm = tiny_lm(family)
    return f"{lm.layout.blocks}.{layer}.{lm.layout.down_proj}.weight"


def test_the_row_of_the_changed_layer_has_the_relative_norm(family: str) -> None:
    lm, name = tiny_lm(family), down(family)
    edit = edit_of(lm, name, rank=1)
    found = weight_footprint(lm, edit)
    assert list(found.table.columns) == list(FOOTPRINT_COLUMNS)
    assert list(found.table["layer"]) == list(range(lm.n_layers))
    (row,) = found.table[found.table["value"] > 0].to_dict("records")
    change, weight = edit.changes[name], lm.model.get_parameter(name).detach()
    assert isinstance(change, LowRank)
    assert (row["layer"], row["kind"], row["token"]) == (2, "mlp_out", "all")
    assert row["value"] == pytest.approx(float(change.dense().norm() / weight.norm()), rel=1e-5)
    (matrix,) = found.extras["matrices"].to_dict("records")
    assert matrix["rank"] == 1
    assert matrix["stable_rank"] == pytest.approx(1)
    # A neuron of the MLP is an input of the down projection, whatever way the matrix is stored.
    by_neuron = change.columns if change.rows.shape[0] == lm.d_model else change.rows
    assert matrix["neurons"][0] == int(by_neuron[:, 0].abs().argmax())
    assert matrix["cosine"] == pytest.approx(
        float(torch.cosine_similarity(weight.flatten(), (weight + change.dense()).flatten(), dim=0)), abs=1e-5
    )


def test_a_dense_change_has_full_rank_and_spreads_over_neurons() -> None:
    lm, name = tiny_lm("llama"), down("llama")
    matrix = weight_footprint(lm, edit_of(lm, name)).extras["matrices"].iloc[0]
    assert matrix["rank"] == min(lm.d_model, lm.d_mlp)
    assert matrix["share_1"] < 0.1
    assert matrix["share_1"] < matrix["share_5"] < matrix["share_20"] < 1


def test_matrices_that_act_on_one_site_are_taken_together() -> None:
    lm = tiny_lm("llama")
    names = [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ]
    edit = edit_of(lm, *names)
    table = weight_footprint(lm, edit).table
    table = table[table["value"] > 0]
    assert list(zip(table["layer"], table["kind"], strict=True)) == [(1, "mlp_post"), (3, "z")]
    new = torch.tensor([float(dense(edit, name).norm()) for name in names[:2]])
    old = torch.tensor([float(lm.model.get_parameter(name).detach().norm()) for name in names[:2]])
    assert table["value"].iloc[0] == pytest.approx(float(new.norm() / old.norm()), rel=1e-5)


def test_every_matrix_of_a_block_has_a_kind(family: str) -> None:
    lm = tiny_lm(family)
    for name, parameter in lm.blocks[0].named_parameters():
        if parameter.ndim == 2:
            kind = kind_of(lm, name.rpartition(".")[0])
            assert kind in ("mlp_out", "mlp_post", "attn_out", "z"), name
    assert kind_of(lm, lm.layout.down_proj) == "mlp_out"
    assert kind_of(lm, lm.layout.o_proj) == "attn_out"


def test_singular_values_of_a_product_are_those_of_its_matrix() -> None:
    change = LowRank(rows=torch.randn(9, 3), columns=torch.randn(7, 3))
    assert torch.allclose(singular_values(change), torch.linalg.svdvals(change.dense().double())[:3], atol=1e-5)


def test_activations_move_from_the_changed_layer_on_and_nowhere_before(family: str) -> None:
    lm = tiny_lm(family)
    edit = replace(edit_of(lm, down(family), scale=0.5), facts=(FACT,))
    found = functional_footprint(lm, edit)
    table = found.table
    assert table.loc[table["layer"] < 2, "value"].max() == 0
    assert (found.grid(kind="mlp_out").loc[:, 2] > 0).all()
    assert (table.loc[(table["layer"] == 2) & (table["kind"] == "attn_out"), "value"] == 0).all()
    site = lm.sites("resid_post")[3]
    tokens = lm.encode([FACT])
    own = run(lm, tokens, read=[site])[site][0]
    with edit.on(lm):
        new = run(lm, tokens, read=[site])[site][0]
    expected = (new - own).norm(dim=-1) / own.norm(dim=-1)
    assert np.allclose(found.grid(kind="resid_post")[3], expected.detach(), atol=1e-5)
    lens = found.extras["lens"]
    assert (lens["kl"] >= 0).all()
    assert lens.loc[lens["layer"] < 2, "kl"].max() < 1e-6
    neighbors = found.extras["neighbors"]
    assert set(neighbors["prompt"]) == {probe.prompt for probe in NEIGHBORS}
    assert neighbors.loc[neighbors["layer"] < 2, "value"].max() == 0


def test_what_stands_beside_the_weights_has_a_functional_footprint_only() -> None:
    lm = tiny_lm("llama")
    memory = Doubling(module="model.layers.1.mlp.down_proj", factor=torch.tensor(2.0))
    edit = Edit(base=lm.weight_hash, sides=(memory,), facts=(SAID,))
    grid = functional_footprint(lm, edit).grid(kind="mlp_out")
    assert grid.loc[grid.index[-1], 1] == pytest.approx(1)  # twice as much at the last token
    assert (grid.iloc[:-1][1] == 0).all()
    with pytest.raises(EditError, match="functional footprint"):
        weight_footprint(lm, edit)


def test_a_prompt_with_text_before_it_is_compared_token_by_token() -> None:
    lm = tiny_lm("gpt2")
    found = functional_footprint(lm, Edit(base=lm.weight_hash, sides=(Saying(text="Imagine that. "),), facts=(SAID,)))
    assert found.tokens()["text"].tolist() == list(lm.encode([SAID]).texts[0])
    assert (found.table["value"] > 0).any()


def test_located_and_edited_stand_in_one_table(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = Rome(layers=(2,), covariance=False, steps=2, prefix_lengths=(), reference="resid_post")(lm, [FACT])
    left = functional_footprint(lm, edit, neighbors=False)
    located = LogitLens()(lm, [FACT])
    joined = agreement([located, left])
    assert len(joined.table)
    again = Footprint.load(weight_footprint(lm, edit).save(tmp_path / "w"))
    assert again.extras["matrices"]["rank"].tolist() == [1]
    assert "neighbors" not in left.extras
