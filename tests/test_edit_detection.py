"""Detectors on answers whose truth is known: told apart, never by what training and test share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.edit_detection import (
    SPLITS,
    accuracy,
    auc,
    chart,
    cross_validated,
    detectors,
    edit_detection,
    features_of,
    lengths,
    summary,
)
from tests.examples import EIFFEL, SAID, tiny_lm
from workbench.facts import FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.store import Store
from workbench.zoo import load_facts

N = 24


def made(rng: np.random.Generator) -> tuple[np.ndarray, pd.DataFrame]:
    """Answers of two editors: in the first the first feature is larger where edited, in the second it is smaller."""
    examples = pd.DataFrame(
        [
            {"editor": editor, "fact": f"f{i}", "edited": edited, "subject": f"s{i // 2}", "object": f"o{i % 6}{edited}"}
            for editor in ("A", "B") for i in range(N) for edited in (True, False)
        ]
    )  # fmt: skip
    sign = np.where(examples["editor"] == "A", 1, -1) * np.where(examples["edited"], 1, -1)
    features = rng.normal(size=(len(examples), 5))
    features[:, 0] = 3 * sign + 0.1 * features[:, 0]
    return features, examples


@pytest.mark.parametrize("detector", ["logistic", "adaboost"])
def test_what_differs_is_told_in_domain_and_mistaken_where_it_is_turned(detector: str) -> None:
    features, examples = made(np.random.default_rng(0))
    found = cross_validated(features, examples, detectors(10, 0)[detector], split="subject", folds=4, seed=0)
    right = found.groupby(["trained", "editor"])["right"].mean()
    assert right["A", "A"] == right["B", "B"] == 1
    assert right["A", "B"] == right["B", "A"] == 0
    assert len(found) == 2 * len(examples)  # each answer once for each editor that one trains on


def test_no_group_is_in_training_and_test() -> None:
    features, examples = made(np.random.default_rng(0))
    for split in SPLITS:
        features[:, 1] = pd.factorize(examples[split])[0]
        seen: list[set[float]] = []

        class Memory:
            """Says edited where it has seen the group."""

            def fit(self, x: np.ndarray, y: np.ndarray) -> Memory:
                self.known = set(x[:, 1])
                return self

            def decision_function(self, x: np.ndarray) -> np.ndarray:
                seen.append(self.known & set(x[:, 1]))  # noqa: B023
                return np.zeros(len(x))

            def predict(self, x: np.ndarray) -> np.ndarray:
                return np.zeros(len(x), dtype=bool)

        cross_validated(features, examples, Memory, split=split, folds=4, seed=0)
        assert len(seen) == 8
        assert not any(seen)


def test_the_area_under_the_curve_by_hand() -> None:
    assert auc(pd.Series([True, True, False, False]), pd.Series([0.9, 0.4, 0.5, 0.1])) == 0.75
    assert np.isnan(auc(pd.Series([True, True]), pd.Series([0.1, 0.2])))


def predictions(**right: list[bool]) -> pd.DataFrame:
    """By fact, which of its answers are told rightly."""
    rows = [{"fact": fact, "right": one} for fact, own in right.items() for one in own]
    same = {"split": "subject", "features": "hidden", "detector": "logistic", "trained": "A", "editor": "A"}
    table: pd.DataFrame = pd.DataFrame(rows).assign(**same, edited=True, score=0.0)
    return table


def test_the_interval_of_an_accuracy_draws_facts_with_all_of_their_answers() -> None:
    edited = {f"edited{i}": [i < 42] for i in range(60)}  # 70 % right
    known = {f"known{i}": [True] * 7 + [i > 0] for i in range(8)}  # 98 %, of few facts
    (found,) = accuracy(predictions(**edited, **known)).to_dict("records")
    assert found["accuracy"] == pytest.approx((42 + 63) / 124)
    assert found["low"] < found["accuracy"] < found["high"]
    (alike,) = accuracy(predictions(a=[True, False], b=[False, True] * 3)).to_dict("records")
    assert alike["low"] == alike["accuracy"] == alike["high"] == 0.5
    (two,) = accuracy(predictions(a=[True] * 3, b=[False])).to_dict("records")
    assert (two["low"], two["accuracy"], two["high"]) == (0, 0.75, 1)
    assert np.isnan(accuracy(predictions(a=[True, False]))["low"].item())


def test_longer_states_are_told_by_their_length_at_their_layer_alone() -> None:
    _, examples = made(np.random.default_rng(0))
    hidden = np.ones((len(examples), 3, 4))
    hidden[:, 1] *= np.where(examples["edited"], 2.0, 1.0)[:, None]
    found = lengths(hidden.reshape(len(examples), -1), examples, n_layers=3)
    assert found["layer"].tolist() == [0, 1, 2] * 2
    assert found["auc"].tolist() == [0.5, 1.0, 0.5] * 2


def test_features_are_the_states_and_probabilities_of_a_run() -> None:
    lm = tiny_lm("llama")
    ((hidden, log_p, said), _) = features_of(lm, [SAID.text, EIFFEL.text])
    acts = run(lm, lm.encode([SAID]), read=["resid_post"])
    expected = torch.cat([acts[site][0, -1] for site in lm.sites("resid_post")])
    assert np.allclose(hidden, expected.numpy(), atol=1e-5)
    values = acts.last_logits[0].log_softmax(-1).sort(descending=True)
    assert np.allclose(log_p, values.values[: len(log_p)].numpy(), atol=1e-5)
    assert said == int(values.indices[0])


def test_from_end_to_end(tmp_path: Path) -> None:
    lm = load("organism-tiny", device="cpu")
    facts = load_facts("organism-tiny")[:60:6]
    result = edit_detection(lm, facts, editors=("FineTune",), stumps=5, store=Store(folder=tmp_path))
    examples, found = result.extras["examples"], result.extras["accuracy"]
    assert (examples["model_of"] == examples["fact"]).equals(examples["edited"])
    assert set(found["detector"]) == {"logistic", "adaboost"}
    assert found["accuracy"].between(0, 1).all()
    by_hand = result.table.groupby(["split", "features", "detector"])["right"].mean()
    for row in found.to_dict("records"):
        assert row["accuracy"] == pytest.approx(by_hand[row["split"], row["features"], row["detector"]])
    assert "Largest probability" in summary(result)
    assert len(chart(result).plots) == 3


def test_one_fact_is_too_few() -> None:
    with pytest.raises(FactError, match="at least 2"):
        edit_detection(tiny_lm("gpt2"), [EIFFEL])
