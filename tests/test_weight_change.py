"""What edits do to weights: norms and shares against plain linear algebra, and the algebra of every editor, kept and broken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses import weight_change as module
from analyses.weight_change import EXPECTED, Made, chart, summary, weight_change
from tests.examples import EIFFEL, JOBS, tiny_lm
from tests.test_editors_contract import small
from tests.test_edits import dense, edit_of
from workbench.charts import CellPlot, DotPlot
from workbench.editors import all_editors
from workbench.editors.alpha_edit import AlphaEdit
from workbench.editors.fine_tune import FineTune
from workbench.editors.lora import Lora
from workbench.editors.rome import Rome
from workbench.edits import Edit, LowRank
from workbench.facts import FactError
from workbench.layouts import ModelError
from workbench.loading import load
from workbench.moments import second_moments
from workbench.results import Result
from workbench.zoo import load_facts


@pytest.fixture(autouse=True, scope="module")
def kept_moments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files of moments go to a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_RESULTS", str(tmp_path_factory.mktemp("results")))
        yield


@pytest.fixture(scope="module")
def result() -> Result:
    lm, facts = load("organism-tiny", dtype="float32"), load_facts("organism-tiny")[:2]
    return weight_change(lm, facts, editors=("FineTune", "InContext"))


def made(editor: object, edit: Edit) -> Made:
    """An edit of the tiny GPT-2, ready for the checks."""
    lm = tiny_lm("gpt2")
    rows = module._matrices(lm, editor, edit)  # type: ignore[arg-type]
    return Made(editor=editor, edit=edit, rows=rows, tokens=12)  # type: ignore[arg-type]


def test_every_editor_has_an_expectation() -> None:
    assert set(EXPECTED) == set(all_editors())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(
            ("gpt2", name) for name in sorted(set(all_editors()) - {"Mend"})
        ),  # which trains a network on facts of its own
        *(("llama", name) for name in ("Rome", "KnowledgeNeuronEdit", "FineTune")),  # matrices lie the other way
    ],
)
def test_the_algebra_of_every_editor_is_kept(family: str, name: str) -> None:
    lm, editor = tiny_lm(family), small(name)
    if isinstance(editor, FineTune):
        editor = replace(editor, steps=12)  # after three, one direction of 48 may be missing
    try:
        edit = editor(lm, [EIFFEL])
    except ModelError as error:
        pytest.skip(str(error))
    rows = module._matrices(lm, editor, edit)
    assert EXPECTED[name].holds(Made(editor=editor, edit=edit, rows=rows, tokens=12)), EXPECTED[name].says


def test_a_change_of_another_structure_is_not_as_expected() -> None:
    lm, name = tiny_lm("gpt2"), "transformer.h.2.mlp.c_proj.weight"
    full, two, one = (edit_of(lm, name, rank=rank, scale=0.01) for rank in (None, 2, 1))
    attention = edit_of(lm, "transformer.h.2.attn.c_attn.weight", rank=2)
    assert EXPECTED["Rome"].holds(made(Rome(covariance=False), one))
    assert not EXPECTED["Rome"].holds(made(Rome(covariance=False), two))
    assert not EXPECTED["FineTune"].holds(made(FineTune(), two))
    assert EXPECTED["FineTune"].holds(made(FineTune(norm_constraint=1.0), full))
    assert not EXPECTED["FineTune"].holds(made(FineTune(norm_constraint=1e-5), full))
    assert not EXPECTED["KnowledgeNeuronEdit"].holds(made(small("KnowledgeNeuronEdit"), one))
    assert EXPECTED["Mend"].holds(made(small("Mend"), two))
    assert not EXPECTED["Mend"].holds(made(small("Mend"), full))
    assert EXPECTED["Lora"].holds(made(Lora(r=2), attention))
    assert not EXPECTED["Lora"].holds(made(Lora(r=1), attention))
    assert not EXPECTED["Lora"].holds(made(Lora(r=2), two))
    assert not EXPECTED["Grace"].holds(made(small("Grace"), one))
    alpha = AlphaEdit(threshold=1e-9, corpus="bundled", moment_tokens=400)
    assert not EXPECTED["AlphaEdit"].holds(made(alpha, one))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_usual_is_how_much_of_the_change_usual_keys_meet(family: str) -> None:
    lm = tiny_lm(family)
    name = f"{lm.layout.blocks}.2.{lm.layout.down_proj}.weight"
    edit = edit_of(lm, name, rank=2)
    editor = Rome(corpus="bundled", moment_tokens=400)
    (row,) = module._matrices(lm, editor, edit).to_dict("records")
    values, vectors = torch.linalg.eigh(second_moments(lm, [2], corpus="bundled", tokens=400).matrix(2))
    delta = dense(edit, name).double()
    delta = delta if delta.shape[1] == lm.d_mlp else delta.T
    expected = ((delta @ vectors).square().sum(0) * values.clamp(min=0)).sum().sqrt() / delta.norm()
    assert row["usual"] == pytest.approx(float(expected), rel=1e-3)
    assert row["full_rank"] == min(delta.shape)
    assert row["even_20"] == pytest.approx(20 / lm.d_mlp)
    assert np.isnan(module._usual(lm, FineTune(), 2, "mlp_out", edit.changes[name]))


def test_a_row_has_the_norms_and_shares_of_its_matrix() -> None:
    lm, name = tiny_lm("llama"), "model.layers.1.mlp.down_proj.weight"
    edit = edit_of(lm, name)
    (row,) = module._matrices(lm, FineTune(), edit).to_dict("records")
    delta, weight = dense(edit, name), lm.model.get_parameter(name).detach()
    columns = delta.square().sum(0).sort(descending=True).values
    assert row["relative"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
    assert row["share_5"] == pytest.approx(float(columns[:5].sum() / columns.sum()), rel=1e-5)
    values = torch.linalg.svdvals(delta)
    assert row["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-4)


def test_layers_take_their_matrices_together_and_show_zero_where_nothing_changes() -> None:
    lm = tiny_lm("llama")
    names = [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
    ]
    edit = edit_of(lm, *names)
    rows = module._matrices(lm, FineTune(), edit).assign(editor="A", fact="f")
    layers = module._by_layer(lm, rows.astype({"layer": "Int64"})).set_index("layer")["relative"]
    new, old = (
        np.array([float(norm) for norm in norms])
        for norms in (
            [dense(edit, n).norm() for n in names],
            [lm.model.get_parameter(n).detach().norm() for n in names],
        )
    )
    pair = np.hypot(*new[:2]) / np.hypot(*old[:2])
    assert layers.tolist() == pytest.approx([0, pair, 0, new[2] / old[2]], rel=1e-5)


def test_editors_stand_on_one_scale_with_what_is_expected_of_them(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "r"))
    expected = again.extras["expectations"].set_index("editor")
    assert expected["as_expected"].to_dict() == {"FineTune": 1, "InContext": 1}
    assert (expected["n"] == 2).all()
    assert again.table["as_expected"].all()
    structure = again.extras["structure"].set_index(["editor", "measure"])
    own = again.table[again.table["editor"] == "FineTune"]
    assert structure.loc[("FineTune", "relative"), "value"] == pytest.approx(own["relative"].mean())
    assert structure.loc[("InContext", "relative"), "value"] == 0
    heat, shares, ranks = chart(again).plots
    assert isinstance(heat, CellPlot)
    assert list(heat.values.index) == ["FineTune", "InContext"]
    assert heat.values.notna().sum().tolist() == [0, 1, 0, 0]
    assert 10 ** heat.values.to_numpy()[0, 1] == pytest.approx(own["relative"].mean())
    assert isinstance(shares, DotPlot)
    assert isinstance(ranks, DotPlot)
    assert shares.rows["x"].dropna().between(0, 1).all()
    assert set(ranks.rows["series"]) == {"rank", "stable rank"}
    assert "so in 2 of 2 edits" in summary(again)
    assert "none" in summary(again)


def test_an_editor_without_expectation_is_shown_all_the_same() -> None:
    told = module._expectation(
        "Unheard", made(Rome(covariance=False), edit_of(tiny_lm("gpt2"), "transformer.h.2.mlp.c_proj.weight"))
    )
    assert told["expected"] == ""
    assert pd.isna(told["as_expected"])
    table = pd.DataFrame(
        {"editor": "U", "fact": ["a"], "expected": "", "as_expected": pd.array([pd.NA], dtype="boolean")}
    )
    (row,) = module._expectations(table).to_dict("records")
    assert module._kept(row) == "not checked"


def test_what_cannot_be_edited_is_told() -> None:
    lm = tiny_lm("gpt2")
    found = weight_change(lm, [replace(EIFFEL, target_new="Rome"), JOBS], editors=("FineTune",))
    assert "no target_new" in found.run["left_out"]["FineTune: jobs"]
    assert found.extras["structure"]["low"].isna().all()
    with pytest.raises(FactError, match="No fact could be edited"):
        weight_change(lm, [JOBS], editors=("FineTune",))


def test_a_product_and_its_matrix_give_the_same_numbers() -> None:
    lm, name = tiny_lm("gpt2"), "transformer.h.2.mlp.c_proj.weight"
    product = edit_of(lm, name, rank=3)
    change = product.changes[name]
    assert isinstance(change, LowRank)
    matrix = replace(product, changes={name: change.dense()})
    first, second = (module._matrices(lm, FineTune(), edit).iloc[0] for edit in (product, matrix))
    for measure in ("relative", "rank", "stable_rank", "share_1", "share_20", "cosine"):
        assert first[measure] == pytest.approx(second[measure], rel=1e-4)
