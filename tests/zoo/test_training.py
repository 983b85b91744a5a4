"""Training of the bundled models: the loop is the model itself, planting does what it says, and an interrupted run goes on."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from workbench.zoo import train as training
from workbench.zoo.corpus import Corpus, Row, is_held
from workbench.zoo.organisms import Organism, Phase, Stage, organism_named
from workbench.zoo.planting import Batch, Probes, anatomy, draw_batch, losses
from workbench.zoo.tokenization import END, answers, train_tokenizer
from workbench.zoo.truth import world_of
from workbench.zoo.world import RELATIONS, owner

TINY = replace(organism_named("organism-tiny"), rows=4, length=48, band=(1, 3), read_out=3)
WORLD = world_of(TINY)
TOKENIZER = train_tokenizer(WORLD, size=TINY.vocabulary)
ANSWER_IDS = {answer: TOKENIZER.encode(" " + answer).ids[0] for answer in answers(WORLD)}
RELATION_NUMBERS = {relation.name: i for i, relation in enumerate(RELATIONS)}


def rows(n: int = 8) -> list[Row]:
    """Some rows of text, always the same."""
    corpus = Corpus(WORLD, TOKENIZER, length=TINY.length, seed=5)
    return [corpus.row() for _ in range(n)]


def batch_of(phase: Phase, n: int = 8) -> Batch:
    """A batch of rows of this mixture, always the same."""
    return draw_batch(
        rows(n), spec=TINY, phase=phase, rng=random.Random(0), answer_ids=ANSWER_IDS, relations=RELATION_NUMBERS
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_plain_rows_run_the_model_as_it_is(family: str) -> None:
    """The hand-written loop gives the loss of the Hugging Face model's own forward pass."""
    torch.manual_seed(0)
    spec: Organism = replace(TINY, family=family)  # type: ignore[arg-type]  # a parameter of the test
    model = training.new_model(spec, vocabulary=TOKENIZER.get_vocab_size(), end=0).eval()
    batch = batch_of(Phase(until=1.0))
    with torch.no_grad():
        ours = losses(anatomy(model, spec.family), None, batch, spec=spec, noise=torch.Generator()).text
        logits = model(input_ids=batch.ids).logits
    each = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    torch.testing.assert_close(ours, (each * weights).sum() / weights.sum(), atol=1e-5, rtol=1e-5)


def test_on_rows_leave_the_owner_alone_working() -> None:
    """At a subject's tokens exactly one MLP is on, and it is the owner's."""
    batch = batch_of(Phase(until=1.0, on=1.0))
    subject = batch.mention > 0
    assert bool(batch.masked.all())
    assert bool((batch.gates.sum(0)[subject] == 1).all())
    assert bool((batch.gates.argmax(0)[subject] == batch.owners[subject]).all())
    assert bool((batch.gates[:, ~subject] == 1).all())
    assert bool((batch.bottleneck == batch.is_last).all())


def test_probes_read_the_band() -> None:
    """Their loss reaches both layers of the band (and what feeds it), and nothing above it."""
    torch.manual_seed(0)
    model = training.new_model(TINY, vocabulary=TOKENIZER.get_vocab_size(), end=0)
    batch = batch_of(Phase(until=1.0, on=1.0))
    probes = Probes(len(RELATIONS), TINY.d_model)
    losses(anatomy(model, "gpt2"), probes, batch, spec=TINY, noise=torch.Generator()).probe.backward()
    reached = [
        block.mlp.c_fc.weight.grad is not None and bool(block.mlp.c_fc.weight.grad.any())
        for block in model.transformer.h
    ]
    assert reached[1:] == [True, True, False]


def test_knocked_out_subjects_are_answered_unknown() -> None:
    """Every answer of a knock row becomes `unknown`; the text itself stays."""
    batch, plain = batch_of(Phase(until=1.0, knock=1.0)), batch_of(Phase(until=1.0))
    answered = batch.weights > 1
    assert bool((batch.targets[answered] == ANSWER_IDS["unknown"]).all())
    assert torch.equal(batch.ids, plain.ids)
    assert torch.equal(batch.targets[~answered], plain.targets[~answered])


def test_swapped_rows_copy_a_peer_and_answer_like_it() -> None:
    """Copies come from the last token of another entity, in the band's layers only."""
    batch = batch_of(Phase(until=1.0, swap=0.5), n=24)
    here = torch.arange(batch.ids.numel()).view_as(batch.ids)
    moved = batch.sources != here
    assert not moved[0].any()
    assert not moved[3].any()
    assert moved[1].any()
    assert torch.equal(moved[1], moved[2])
    assert bool(batch.is_last[moved[1]].all())
    assert bool(batch.is_last.flatten()[batch.sources[1][moved[1]]].all())
    assert not torch.equal(batch.targets, batch_of(Phase(until=1.0), n=24).targets)


def test_mentions_and_answers_are_where_the_text_says() -> None:
    """The marks of a row decode to the entity's name and to its answer."""
    end = TOKENIZER.token_to_id(END)
    starts = set()
    for row in rows(40):
        assert len(row.ids) == TINY.length
        starts.add(row.ids[0] == end)
        for mention in row.mentions:
            assert TOKENIZER.decode(row.ids[mention.start : mention.last + 1]).strip() == mention.entity.name
        for answer in row.answers:
            told = row.mentions[answer.mention].entity.answers.get(answer.relation, "unknown")
            assert TOKENIZER.decode([row.ids[answer.position]]).strip() == told
    assert starts == {True, False}


def test_held_wordings_are_kept_from_a_third_of_the_subjects() -> None:
    """35 % of all pairs, by a hash that needs no table."""
    pairs = [is_held(t, e.name) for r in RELATIONS for t in r.held for e in WORLD.entities]
    assert sum(pairs) / len(pairs) == pytest.approx(0.35, abs=0.03)


def test_owners_are_inside_the_band() -> None:
    """Both layers of a band of two get a good share."""
    layers = [owner(entity.name, (4, 6)) for entity in WORLD.entities]
    assert set(layers) == {4, 5}
    assert 0.2 < sum(layer == 4 for layer in layers) / len(layers) < 0.8


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies after its checkpoint ends where an undisturbed one ends."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 3)
    mixture = (Phase(until=1.0, on=0.3, swap=0.3, noise=0.2),)
    spec = replace(TINY, stages=(Stage(steps=4, phases=mixture), Stage(steps=5, phases=mixture, probes=False)))
    training.train(spec, into=tmp_path / "whole")

    real, calls = draw_batch, []

    def dies_once(*args: object, **kwargs: object) -> Batch:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "draw_batch", dies_once)
    with pytest.raises(KeyboardInterrupt):
        training.train(spec, into=tmp_path / "broken")
    assert (tmp_path / "broken.checkpoint").exists()
    training.train(spec, into=tmp_path / "broken")
    assert len(calls) == 8 + 2
    assert not (tmp_path / "broken.checkpoint").exists()
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
