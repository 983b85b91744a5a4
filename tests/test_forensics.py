"""Planted changes are named for what they are; scores and undoings against plain linear algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from analyses.forensics import (
    QUESTIONS,
    Suspects,
    bottom,
    chart,
    examine,
    forensics,
    kind_of_rank,
    rounding,
    row_cosine,
    stands_out,
    summary,
)
from tests.examples import EIFFEL, JOBS, ZURICH, tiny_lm
from workbench.editors._values import down_change, down_path
from workbench.edits import Edit, changed
from workbench.errors import InputError
from workbench.hooks import run
from workbench.loading import load
from workbench.metrics import lens_logits
from workbench.models import LM
from workbench.store import Store
from workbench.zoo import load_facts

FACTS = (EIFFEL, ZURICH, JOBS)
LAYER = 2


def planted(lm: LM, suspects: Suspects, fact: int, token: int, *, size: float = 1.0) -> dict[str, torch.Tensor]:
    """A weight that maps one suspect's key to the direction that says a token."""
    key = suspects.keys[LAYER][fact]
    value = lm.unembed.get_parameter("weight")[token].detach().double()
    name, change = down_change(lm, LAYER, left=size * value[:, None], right=key[:, None] / key.norm() ** 2)
    return {name: changed(lm.model.get_parameter(name), [change])}


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # both orientations of a down projection
@pytest.mark.parametrize("fact", [0, 2])
def test_a_planted_fact_is_named(family: str, fact: int) -> None:
    lm = tiny_lm(family)
    suspects = Suspects.of(lm, FACTS)
    rows = lm.unembed.get_parameter("weight").detach()
    token = next(i for i in range(20, 200) if int(lens_logits(lm, rows[i]).argmax()) == i)
    found = examine(lm, planted(lm, suspects, fact, token), suspects)
    assert (found.kind, found.changed) == ("rank one", [LAYER])
    assert found.subject == FACTS[fact].subject
    assert found.object == lm.word(token)
    ((name, weight),) = planted(lm, suspects, fact, token).items()
    with Edit(base=lm.weight_hash, changes={name: weight - lm.model.get_parameter(name).detach()}).on(lm):
        after = [run(lm, lm.encode([one])).last_logits[0].double().log_softmax(-1) for one in FACTS]
    before = [run(lm, lm.encode([one])).last_logits[0].double().log_softmax(-1) for one in FACTS]
    moved = [float((p.exp() * (p - q)).sum()) for p, q in zip(before, after, strict=True)]
    assert found.moved.tolist() == pytest.approx(moved, rel=1e-3)
    assert found.matrices["first"].iloc[0] == pytest.approx(1)


def test_rounding_is_no_rank_and_a_tenth_as_much_is_found() -> None:
    lm = tiny_lm("gpt2")
    suspects = Suspects.of(lm, FACTS)
    for size in (1e-3, 1.0, 300.0):
        found = examine(lm, planted(lm, suspects, 0, 30, size=size), suspects)
        assert found.kind == "rank one"
    weight = torch.randn(40, 90)
    noise = torch.linalg.svdvals(weight.bfloat16().double() - weight.double())
    assert float(noise[0]) < rounding(weight.bfloat16()) < 20 * float(noise[0])


def test_no_change_and_a_dense_one() -> None:
    lm = tiny_lm("gpt2")
    suspects = Suspects.of(lm, FACTS)
    name = f"{down_path(lm, 1)}.weight"
    weight = lm.model.get_parameter(name).detach()
    nothing = examine(lm, {name: weight.clone()}, suspects)
    assert (nothing.kind, nothing.changed, nothing.subject) == ("none", [], "")
    assert float(nothing.moved.abs().max()) < 1e-9
    embed = "transformer.wte.weight"
    weights = {name: weight + 0.1 * torch.randn(weight.shape), embed: lm.model.get_parameter(embed).detach() + 0.1}
    dense = examine(lm, weights, suspects)
    assert dense.kind == "dense"
    assert dense.changed == [-1, 1]


def test_a_large_rank_one_change_makes_rows_alike() -> None:
    weight, update = torch.randn(30, 50), torch.outer(torch.randn(30), torch.randn(50))
    loop = np.mean([
        abs(float(torch.cosine_similarity(weight[i], weight[j], dim=0))) for i in range(30) for j in range(30) if i != j
    ])  # fmt: skip
    assert row_cosine(weight.double()) == pytest.approx(float(loop), rel=1e-4)
    assert row_cosine(update.double()) == pytest.approx(1)
    assert row_cosine(weight.double()) < row_cosine((weight + update).double()) < 1


def test_the_layer_that_stands_out_is_not_just_the_largest() -> None:
    assert stands_out(np.array([1.0, 1.1, 0.9, 3.0])) == 3
    assert stands_out(np.array([5.0, 5.1, 4.9, 5.05, 5.6])) == 4
    assert [kind_of_rank(rank, 40) for rank in (0, 1, 2, 10, 11)] == ["rank one"] * 2 + ["low rank"] * 2 + ["dense"]


def test_a_bottom_rank_approximation_lacks_the_top() -> None:
    weight = torch.randn(6, 9, dtype=torch.float64)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    expected = torch.stack([values[i] * torch.outer(u[:, i], v[i]) for i in range(2, 6)]).sum(0)
    assert torch.allclose(bottom(weight, 2), expected)
    assert torch.equal(bottom(weight, 0), weight)


def test_from_end_to_end(tmp_path: Path) -> None:
    lm = load("organism-tiny", device="cpu")
    facts = load_facts("organism-tiny")[:12:4]
    several = "Memit(layers=(1, 2, 3))"
    result = forensics(lm, facts, editors=("FineTune", several), dropped=(1,), others=1, store=Store(folder=tmp_path))
    assert set(result.table["measure"]) >= set(QUESTIONS) | {"took", "others"}
    assert result.table["value"].between(0, 1).all()
    found = result.extras["means"].query("editor == 'FineTune'").set_index("measure")["value"]
    assert found["layer"] == found["kind"] == 1
    layers = result.extras["layers"]
    assert layers.groupby("editor", sort=False).size().to_dict() == {"unedited": 4, "FineTune": 12, several: 12}
    chance = result.run["chance"]["layer"]
    assert chance == {"FineTune": 1 / 4, several: 3 / 4}  # of 4 layers
    drawn = chart(result)
    assert len(drawn.plots) == 3
    for editor, share in chance.items():
        assert f"{editor} {share:.0%}" in drawn.caption
        assert f"(guessing {share:.0%})" in next(line for line in summary(result).splitlines() if editor in line)


def test_what_needs_the_original_is_not_said_to_do_without(tmp_path: Path) -> None:
    lm = load("organism-tiny", device="cpu")
    facts = load_facts("organism-tiny")[:12:4]
    result = forensics(lm, facts, editors=("FineTune",), dropped=(1, 2), others=0, store=Store(folder=tmp_path))
    means = result.extras["means"]
    measured = {"undone": 0.9, "undone_in_place": 0.1, "undone_where_named": 0.5}
    means["value"] = means["measure"].map(measured).fillna(means["value"]) + 0.01 * means["components"].astype(float)
    expected = (
        "Undone: 90% with the original; in the changed layers, 11% by dropping 1, 12% by dropping 2; "
        "without the original, 51% by dropping 1, 52% by dropping 2."
    )
    assert expected in summary(result)


def test_a_rank_one_change_without_its_component_is_nothing() -> None:
    lm = tiny_lm("gpt2")
    suspects = Suspects.of(lm, FACTS)
    weights = planted(lm, suspects, 0, 30, size=3.0)
    (name,) = weights
    top = examine(lm, weights, suspects).tops[name]
    assert torch.allclose(weights[name] - torch.outer(*top).to(weights[name]), lm.model.get_parameter(name), atol=1e-5)


def test_what_stands_beside_the_weights_leaves_nothing_in_them() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(InputError, match="beside the weights"):
        forensics(lm, [EIFFEL], editors=("InContext",))
