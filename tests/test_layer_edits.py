"""Edits of all layers in one batch are those that the editors make one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.layer_edits import (
    Ascent,
    Moments,
    Shifts,
    find_deltas,
    fine_tune_shifts,
    log_p_with,
    memit_shifts,
    noised,
    rome_shifts,
)
from tests.examples import EIFFEL, SAO_PAULO, TRACED, tiny_lm
from workbench.editors.base import Editor
from workbench.editors.fine_tune import FineTune
from workbench.editors.memit import Memit
from workbench.editors.rome import Rome
from workbench.edits import EditError
from workbench.facts import Fact
from workbench.hooks import run
from workbench.models import LM, ModelError
from workbench.sites import Site, window

ALONE: dict[str, Any] = {"prefix_lengths": (), "essence": (), "moment_tokens": 400, "corpus": "bundled", "steps": 4}
LONG = replace(SAO_PAULO, target_new="Rome or Paris")


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / "moments"
    monkeypatch.setenv("WORKBENCH_RESULTS", str(folder))


def log_p(lm: LM, fact: Fact) -> torch.Tensor:
    """Of the new answer's tokens, by a plain run."""
    answer = fact.target_new or ""
    tokens, ids = lm.encode([fact], targets=[answer]), lm.target_ids(fact.text, answer)
    steps = int(tokens.last[0]) + torch.arange(len(ids))
    return run(lm, tokens).logits[0, steps].float().log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def same_as_editors(lm: LM, fact: Fact, made: dict[int, Shifts], editors: dict[int, Editor]) -> None:
    """Both give the answer the same probability, and not the model's own."""
    ascent = Ascent.of(lm, fact, fact.target_new or "")
    together = log_p_with(ascent, list(made.values()))
    assert list(made) == list(editors)
    for row, editor in zip(together, editors.values(), strict=True):
        try:
            with editor(lm, [fact]).on(lm):
                alone = log_p(lm, fact)
        except EditError:  # nothing changes: what the last block does at an earlier token does not reach the answer
            alone = ascent.own
        assert torch.allclose(row, alone, atol=2e-3), (editor, row, alone)
    assert not torch.allclose(together, ascent.own.expand_as(together), atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gpt_neox", "bloom", "opt", "cohere", "falcon"])
def test_a_run_from_any_layer_gives_the_models_own_probabilities(family: str) -> None:
    lm = tiny_lm(family)
    ascent = Ascent.of(lm, LONG, "Rome or Paris")
    assert torch.allclose(ascent.own, log_p(lm, LONG), atol=1e-5)
    rows = ascent.log_p([2, 0, 3, 0], lambda layer, row, x: None)
    assert torch.allclose(rows, ascent.own.expand_as(rows), atol=1e-4)


@pytest.mark.parametrize("fact", [EIFFEL, LONG], ids=["one token", "several tokens"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_rome_at_every_layer_is_rome(family: str, fact: Fact) -> None:
    lm = tiny_lm(family)
    layers = range(lm.n_layers)
    editors = {layer: Rome(layers=(layer,), reference="resid_post", **ALONE) for layer in layers}
    ascent, options = Ascent.of(lm, fact, fact.target_new or ""), editors[0]
    deltas = find_deltas(ascent, layers, options, place="mlp_out", lower=False)
    made, refused = rome_shifts(ascent, deltas, Moments(lm=lm, options=options))
    assert not refused
    same_as_editors(lm, fact, dict(sorted(made.items())), dict(editors))


def test_memit_at_every_window_is_memit() -> None:
    lm = tiny_lm("gpt2")
    windows = {layer: window(layer, 3, lm.n_layers) for layer in range(lm.n_layers)}
    editors = {
        layer: Memit(layers=tuple(own), reference="resid_post", ridge=0.5, **ALONE) for layer, own in windows.items()
    }
    ascent, options = Ascent.of(lm, EIFFEL, "Rome"), editors[0]
    lasts = sorted({own[-1] for own in windows.values()})
    deltas = find_deltas(ascent, lasts, options, place="resid_post", lower=False)
    made = memit_shifts(ascent, windows, deltas, options, Moments(lm=lm, options=options))
    same_as_editors(lm, EIFFEL, made, dict(editors))


@pytest.mark.parametrize("bound", [None, 2e-3])
def test_fine_tuning_of_every_window_is_fine_tuning(bound: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    windows = {layer: window(layer, 3, lm.n_layers) for layer in range(lm.n_layers)}
    options = FineTune(steps=5, learning_rate=1e-2, norm_constraint=bound, stop_below=3.0)
    editors = {layer: replace(options, layers=tuple(own)) for layer, own in windows.items()}
    ascent = Ascent.of(lm, EIFFEL, "Rome")
    made = dict(sorted(fine_tune_shifts(ascent, windows, options, lower=False).items()))
    same_as_editors(lm, EIFFEL, made, dict(editors))
    monkeypatch.setattr("analyses.layer_edits.MOST_NUMBERS", 1)
    grouped = fine_tune_shifts(ascent, windows, options, lower=False)
    for name, shifts in grouped.items():
        for layer, shift in shifts.items():
            assert torch.allclose(shift, made[name][layer], atol=1e-6)  # type: ignore[arg-type]  # dense


def test_a_lowered_answer_falls_at_every_layer() -> None:
    lm = tiny_lm("gpt2")
    said = lm.word(int(run(lm, lm.encode([EIFFEL])).last_logits[0].argmax())).strip()
    ascent = Ascent.of(lm, EIFFEL, said)
    options = Rome(reference="resid_post", stop_below=0.0, **{**ALONE, "steps": 10})
    deltas = find_deltas(ascent, range(lm.n_layers - 1), options, place="mlp_out", lower=True)
    made, _ = rome_shifts(ascent, deltas, Moments(lm=lm, options=options))
    assert (log_p_with(ascent, list(made.values())) < ascent.own).all()
    tuned = fine_tune_shifts(
        ascent, {0: range(1), 2: range(1, 4)}, FineTune(steps=3, stop_below=1e-9, learning_rate=1e-2), lower=True
    )
    assert (log_p_with(ascent, list(tuned.values())) < ascent.own).all()


def test_noise_is_on_the_subject_alone() -> None:
    lm = tiny_lm("gpt2")
    tokens = lm.encode([EIFFEL])
    start, stop = tokens.spans[0] or (0, 0)
    noise = torch.full((stop - start + 2, lm.d_model), 0.5)
    ascent = Ascent.of(lm, EIFFEL, "Rome", noise=noise)
    site = Site(layer=0, kind="embed")
    acts = run(lm, tokens, read=[site], write={site: noised(tokens, noise)})
    plain = run(lm, tokens, read=[site])[site]
    moved = (acts[site] - plain)[0].abs().amax(-1)
    assert torch.allclose(moved[start:stop], torch.tensor(0.5))
    assert moved[:start].max() == moved[stop:].max() == 0
    own = acts.logits[0, -1].log_softmax(-1)[lm.target_ids(EIFFEL.text, "Rome")[0]]
    assert float(ascent.own[0]) == pytest.approx(float(own), abs=1e-5)


def test_a_family_that_normalises_what_its_mlps_add_is_refused() -> None:
    family = next(name for name in TRACED if tiny_lm(name).layout.mlp_out.endswith("norm"))
    with pytest.raises(ModelError, match="normalises"):
        Ascent.of(tiny_lm(family), EIFFEL, "Rome")
