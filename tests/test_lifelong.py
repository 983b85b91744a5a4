"""Streams go on where they were stopped; measures are those of a loop; growth is that of the matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import analyses.lifelong as module
from analyses.answers import is_said, next_tokens
from analyses.intervals import means_by
from analyses.lifelong import SAVED_EVERY, chart, edited_stream, lifelong, norms, reachable, split, summary, triangle
from tests.examples import EIFFEL, SAID, tiny_lm
from workbench.editors import alpha_edit, edit_stream
from workbench.editors.alpha_edit import AlphaEdit
from workbench.editors.base import Draft, Editor
from workbench.editors.fine_tune import FineTune
from workbench.edits import Edit, EditError, LowRank
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.hooks import run
from workbench.loading import load
from workbench.models import LM
from workbench.progress import Cancelled, reporting
from workbench.store import Store
from workbench.zoo import load_facts

NAME = "transformer.h.1.mlp.c_proj.weight"
MANY = [replace(EIFFEL, id=f"fact-{i}") for i in range(SAVED_EVERY + 4)]


@dataclass(frozen=True, kw_only=True)
class Adding(Editor):
    """Adds a rank-one change that the fact's id and the weights decide; refuses one fact."""

    def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
        if any(fact.id == "fact-2" for fact in facts):
            raise EditError("Not this one.")
        weight = lm.model.get_parameter(NAME).detach()
        generator = torch.Generator().manual_seed(int(facts[0].id.split("-")[1]))
        rows = 0.1 * torch.randn(len(weight), 1, generator=generator)
        return Draft(changes={NAME: LowRank(rows=rows, columns=weight.T @ rows + 1)}, told={"edited": [{"p_new": 0.5}]})


def dense(edit: Edit | None) -> torch.Tensor:
    assert edit is not None
    change = edit.changes[NAME]
    return change.dense() if isinstance(change, LowRank) else change


def test_a_quarter_of_the_facts_is_held_out_at_most() -> None:
    stream, held = split(MANY, held_out=20, seed=0)
    assert len(held) == len(MANY) // 4
    assert {fact.id for fact in stream} | {fact.id for fact in held} == {fact.id for fact in MANY}
    assert len(split(MANY, held_out=2, seed=0)[1]) == 2
    assert split(MANY, held_out=2, seed=0) == split(MANY, held_out=2, seed=0)
    with pytest.raises(FactError, match="at least 2"):
        split(MANY[:1], held_out=1, seed=0)


def test_no_subject_is_edited_and_held_out() -> None:
    facts = load_facts("organism-tiny")
    stream, held = split(facts, held_out=20, seed=0)
    assert len(held) == 20
    assert not {fact.subject for fact in stream} & {fact.subject for fact in held}


def test_a_corrected_fact_is_measured_anew(tmp_path: Path) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path)
    facts = [replace(SAID, target_new="Rome", id="said"), *MANY[:3]]
    options: Any = {"editors": ("InContext",), "checkpoints": (1,), "held_out": 1, "traced": 0, "store": store}
    held = lifelong(lm, facts, **options).run["held"]
    n = len(store.manifests())
    lifelong(lm, facts, **options)
    assert len(store.manifests()) == n
    lifelong(
        lm, [replace(fact, paraphrases=("Where it is:",)) if fact.id in held else fact for fact in facts], **options
    )
    assert len(store.manifests()) > n


def test_a_trace_that_is_gone_has_a_row_and_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    centres = iter([3.0, 2.0])

    def centre(*_: object) -> float:
        found = next(centres, None)
        if found is None:
            raise InputError("It is gone.")
        return found

    monkeypatch.setattr(module, "_centre", centre)
    facts = load_facts("organism-tiny")[:40:5]
    result = lifelong(load("organism-tiny", device="cpu"), facts, editors=("FineTune",), checkpoints=(1, 2), traced=1)
    drift = result.extras["drift"]
    assert drift["edits"].tolist() == [1, 2]
    assert drift["shift"].iloc[0] == -1
    assert drift["shift"].isna().iloc[1]
    assert "0 of 1 facts still traceable" in summary(result)
    assert "gone after 2 edits: 1 of FineTune's" in chart(result).caption


def test_checkpoints_end_with_the_facts() -> None:
    assert reachable((100, 1, 10), 50) == [1, 10, 50]
    assert reachable((1, 10, 100), 1) == [1]
    with pytest.raises(FactError, match="checkpoints"):
        reachable((0,), 5)


def test_the_weakest_corner_by_hand() -> None:
    rows = [
        ("A", 1, "edited", "reliability", 0.9),
        ("A", 1, "edited", "generalisation", 0.4),
        ("A", 1, "held out", "locality", 0.7),
    ]
    means = pd.DataFrame(rows, columns=["editor", "edits", "group", "measure", "value"])
    assert triangle(means)["weakest"].tolist() == [0.4]


def test_means_have_the_interval_of_the_bootstrap() -> None:
    table = pd.DataFrame({"editor": ["a"] * 4 + ["b", "c"], "value": [0.0, 1.0, 0.0, 1.0, 1.0, float("nan")]})
    found = means_by(table, ["editor"])
    assert found["editor"].tolist() == ["a", "b"]
    assert found["value"].tolist() == [0.5, 1.0]
    assert found["n"].tolist() == [4, 1]
    assert 0 <= found["low"][0] < 0.5 < found["high"][0] <= 1
    assert pd.isna(found["low"][1])


def test_a_stopped_stream_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    lm, store = tiny_lm("gpt2"), Store(folder=tmp_path)
    steps = [1, len(MANY)]
    whole = {n: (edit, refused) for n, edit, refused in edited_stream(lm, Adding(), MANY, steps)}
    assert whole[len(MANY)][1] == {"fact-2": "Not this one."}

    def stop(what: str, done: int, total: int) -> None:
        if done == SAVED_EVERY + 1:
            raise Cancelled

    with pytest.raises(Cancelled), reporting(stop):
        list(edited_stream(lm, Adding(), MANY, steps, store=store))
    assert len(list((tmp_path / "streams").iterdir())) == 2  # the checkpoint, and the edit after ten
    totals: list[int] = []
    with reporting(lambda what, done, total: totals.append(total)):
        again = {n: (edit, refused) for n, edit, refused in edited_stream(lm, Adding(), MANY, steps, store=store)}
    assert max(totals) == len(MANY) - SAVED_EVERY  # the others are not made again
    for n, (edit, refused) in whole.items():
        assert torch.allclose(dense(edit), dense(again[n][0]), atol=1e-5)
        assert refused == again[n][1]
    assert len(list((tmp_path / "streams").iterdir())) == 2  # both checkpoints


def test_an_editor_of_memories_gets_many_facts_at_a_time() -> None:
    """Its stream ends as that of single edits, and a fact that it refuses is left out alone."""
    lm, asked = tiny_lm("gpt2"), []

    @dataclass(frozen=True, kw_only=True)
    class Filling(Adding):
        one_by_one = True

        def make(self, lm: LM, facts: Sequence[Fact], *, after: Edit | None) -> Draft:
            asked.append(len(facts))
            return super().make(lm, facts, after=after)

    steps = (3, len(MANY))
    found = list(edited_stream(lm, Filling(), MANY, steps))
    assert asked == [
        3,
        1,
        1,
        1,
        SAVED_EVERY - 3,
        len(MANY) - SAVED_EVERY,
    ]  # the third is refused, so each of three alone
    for (_, one, refused), (_, other, also) in zip(found, edited_stream(lm, Adding(), MANY, steps), strict=True):
        assert one is not None
        assert other is not None
        assert [fact.id for fact in one.facts] == [fact.id for fact in other.facts]
        assert refused == also == {"fact-2": "Not this one."}


def test_growth_is_that_of_the_matrix() -> None:
    lm = tiny_lm("gpt2")
    edit = Adding()(lm, MANY[:1])
    weight = lm.model.get_parameter(NAME).detach()
    (row,) = norms(lm, edit, 1).to_dict("records")
    assert row["growth"] == pytest.approx(float((weight + dense(edit)).norm() / weight.norm()), rel=1e-5)
    assert row["relative"] == pytest.approx(float(dense(edit).norm() / weight.norm()), rel=1e-5)


def test_what_is_said_is_that_of_a_loop() -> None:
    lm = tiny_lm("llama")
    prompts = [SAID.text, "Steve Jobs", "The Eiffel Tower is located in the city of"]
    ids = [int(run(lm, lm.encode([prompt])).last_logits[0].argmax()) for prompt in prompts]
    assert next_tokens(lm, prompts) == ids
    answers = [lm.word(ids[0]).strip() or "Rome", "Rome", "Paris"]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = lm.target_ids(prompt, answer)
        tokens = lm.encode([prompt], targets=[answer])
        best = run(lm, tokens).logits[0].argmax(-1)[int(tokens.last[0]) :][: len(wanted)].tolist()
        expected.append(best == wanted)
    assert is_said(lm, prompts, answers) == expected


def test_a_sum_tells_of_its_parts() -> None:
    lm = tiny_lm("gpt2")
    *_, edit = edit_stream(Adding(), lm, [MANY[0], MANY[1], MANY[3]])
    assert [part["facts"] for part in edit.parts] == [["fact-0"], ["fact-1"], ["fact-3"]]
    assert all(part["what"] == "Adding" and part["edited"] == [{"p_new": 0.5}] for part in edit.parts)


def test_alpha_edit_takes_the_null_space_of_a_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, taken = load("organism-tiny", device="cpu"), []
    plain = alpha_edit.null_space

    def counted(moment: torch.Tensor, threshold: float, *, layer: int) -> torch.Tensor:
        taken.append(layer)
        return plain(moment, threshold, layer=layer)

    monkeypatch.setattr(alpha_edit, "null_space", counted)
    facts = load_facts("organism-tiny")[:2]
    quick = {"steps": 2, "moment_tokens": 800, "prefix_lengths": ()}
    *_, edit = edit_stream(AlphaEdit.fitted(lm, **quick), lm, facts)
    assert taken == [1]
    first = AlphaEdit.fitted(lm, **quick)(lm, facts[:1])
    other = AlphaEdit.fitted(lm, **quick, threshold=0.5)(lm, facts[:1])
    second = AlphaEdit.fitted(lm, **quick)(lm, facts[1:], after=first)
    assert second.key == edit.key
    assert other.key != first.key


def test_from_end_to_end(tmp_path: Path) -> None:
    lm, store = load("organism-tiny", device="cpu"), Store(folder=tmp_path)
    facts = load_facts("organism-tiny")[:40:5]
    options = {"editors": ("FineTune",), "checkpoints": (1, 3), "traced": 1, "samples": 2}
    result = lifelong(lm, facts, store=store, **options)  # type: ignore[arg-type]
    assert set(result.table["edits"]) == {1, 3}
    assert len(result.run["stream"]) == 3
    assert not set(result.run["stream"]) & set(result.run["held"])
    by_id = {fact.id: fact for fact in facts}
    stream = [by_id[name] for name in result.run["stream"]]
    *_, edit = edit_stream(FineTune.fitted(lm), lm, stream)
    with edit.on(lm):
        expected = is_said(lm, [fact.text for fact in stream], [fact.target_new or "" for fact in stream])
    rows = result.table[(result.table["measure"] == "reliability") & (result.table["edits"] == 3)]
    assert dict(zip(rows["fact"], rows["value"], strict=True)) == dict(
        zip(result.run["stream"], map(float, expected), strict=True)
    )
    assert result.extras["drift"]["shift"].notna().any()
    assert "FineTune" in summary(result)
    assert len(chart(result).plots) == 6
    kept = {path.name for path in tmp_path.glob("*")}
    again = lifelong(lm, facts, store=store, **options)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(result.table, again.table)
    assert {path.name for path in tmp_path.glob("*")} == kept


def test_no_edit_at_all_is_an_error() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(FactError, match="at least 2"):
        lifelong(lm, [SAID, EIFFEL])  # the first has no target_new
    with pytest.raises(InputError, match="No editor"):
        lifelong(lm, MANY[:4], editors=(), traced=0)
