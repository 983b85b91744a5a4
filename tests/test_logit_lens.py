"""The logit lens: what a model would say if it stopped after a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.examples import EIFFEL, SAID, ZURICH, fresh_lm
from workbench.hooks import run
from workbench.loading import load
from workbench.locators import logit_lens
from workbench.locators.logit_lens import LogitLens, _from
from workbench.models import LM
from workbench.zoo import load_facts


def test_the_last_layer_says_what_the_model_says(lm: LM) -> None:
    here = LogitLens()(lm, [EIFFEL])
    p = run(lm, lm.encode([EIFFEL])).logits[0].float().softmax(-1)
    answer = lm.target_ids(EIFFEL.text, EIFFEL.target_true)[0]
    rows = here.table[here.table["layer"] == lm.n_layers - 1].sort_values("position")
    assert rows["value"].tolist() == pytest.approx(p[:, answer].tolist(), rel=1e-4)
    assert rows["rank"].tolist() == (p > p[:, [answer]]).sum(-1).tolist()
    assert rows["entropy"].tolist() == pytest.approx((-p * p.log()).sum(-1).tolist(), rel=1e-4)
    assert rows["top"].tolist() == [lm.word(int(i)) for i in p.argmax(-1)]
    assert here.extras["facts"]["clean"][0] == pytest.approx(float(p[-1, answer]), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "cohere"])
def test_a_layer_says_what_the_model_without_the_layers_above_says(family: str) -> None:
    whole, cut = fresh_lm(family), fresh_lm(family)
    parent, _, name = cut.layout.blocks.rpartition(".")
    setattr(cut.model.get_submodule(parent), name, nn.ModuleList(list(cut.blocks)[:2]))
    cut.model.config.num_hidden_layers = 2
    below = LM(cut.model, cut.tokenizer, name="cut")
    assert below.n_layers == 2
    fact = EIFFEL
    rows = LogitLens()(whole, [fact]).grid(kind="resid_post")[[0, 1]]
    short = LogitLens()(below, [fact])
    torch.testing.assert_close(torch.tensor(rows.to_numpy()), torch.tensor(short.grid(kind="resid_post").to_numpy()))
    own = run(below, below.encode([fact])).last_logits[0].softmax(-1)
    answer = whole.target_ids(fact.text, fact.target_true)[0]
    assert rows[1].iloc[-1] == pytest.approx(float(own[answer]), rel=1e-4)
    assert abs(rows[0].iloc[-1] / rows[1].iloc[-1] - 1) > 1e-2


def test_values_are_the_probability_its_logarithm_or_minus_the_rank(gpt2: LM) -> None:
    p, logp, rank = (LogitLens(value=value)(gpt2, [ZURICH]).table for value in ("p", "logp", "rank"))
    assert p["value"].to_list() == pytest.approx(logp["value"].map(torch.e.__pow__).to_list())
    assert (-rank["value"]).to_list() == p["rank"].to_list()
    assert rank["rank"].max() > 0
    assert p["score"].equals(rank["score"])
    assert p["score"].equals(p["value"])


def test_reading_a_few_states_at_a_time_changes_nothing(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LogitLens()(gpt2, [SAID]).table
    monkeypatch.setattr(logit_lens, "LOGITS_AT_ONCE", 3 * gpt2.d_vocab)
    some = LogitLens()(gpt2, [SAID]).table
    assert some["value"].to_list() == pytest.approx(whole["value"].to_list(), rel=1e-5)
    assert some["top"].equals(whole["top"])


@pytest.mark.parametrize(
    ("on_top", "expected"),
    [
        ([0, 1, 0, 1, 1], (1, 3)),
        ([0, 0, 0], (None, None)),
        ([1, 1, 1], (0, 0)),
        ([0, 1, 0], (1, None)),
        ([0, 0, 1], (2, 2)),
    ],
)
def test_where_the_answer_comes_to_the_top(on_top: list[int], expected: tuple[int | None, int | None]) -> None:
    assert _from(torch.tensor(on_top, dtype=torch.bool)) == expected


def test_a_trained_model_has_its_answer_on_top_from_some_layer_on() -> None:
    lm = load("organism-tiny", device="cpu")
    here = LogitLens()(lm, load_facts("organism-tiny")[:6])
    facts = here.extras["facts"]
    assert facts["correct"].any()
    assert (facts["correct"] == facts["stays_top1"].notna()).all()
    for row in facts[facts["correct"]].itertuples():
        ranks = here.grid(kind="resid_post", fact=row.fact, column="rank").iloc[-1]
        assert ranks[ranks.index >= row.stays_top1].eq(0).all()
        assert row.first_top1 <= row.stays_top1
        assert row.stays_top1 == 0 or ranks[row.stays_top1 - 1] > 0
