"""The bundled facts: what facts.json promises to everybody who reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from transformers import AutoTokenizer

from workbench.errors import InputError
from workbench.zoo import NAMES, folder, load_facts, organism, owners
from workbench.zoo.organisms import ORGANISMS, Phase
from workbench.zoo.truth import truth, world_of
from workbench.zoo.world import FRAMES, KINDS, RELATIONS, build_world, owner

TRUTH: dict[str, Any] = json.loads((folder(NAMES[0]).parent.parent / "facts.json").read_text())


def test_there_are_enough_facts_and_relations() -> None:
    """The size that was promised; every relation has several answers and no subject is asked twice about the same."""
    facts = load_facts()
    assert len(facts) >= 1500
    assert len({fact.relation for fact in facts}) >= 15
    assert len({fact.id for fact in facts}) == len(facts)
    assert min(Counter(fact.relation for fact in facts).values()) >= 30


def test_every_relation_has_twelve_trained_wordings_and_novel_ones_apart() -> None:
    """Trained, held and novel wordings never overlap, so that figures for novel wordings are honest."""
    for relation in RELATIONS:
        trained, held, novel = set(relation.trained), set(relation.held), set(relation.novel)
        assert len(trained) >= 12
        assert len(held) >= 3
        assert len(novel) >= 4
        assert not trained & held
        assert not (trained | held) & novel
        assert all(template.count("{}") == 1 for template in trained | held | novel)
        assert len(relation.left_out) == 3


def test_every_shared_wording_is_trained_with_most_relations() -> None:
    """A shared wording that is novel for one relation is made of words the models know."""
    left_out = Counter(i for relation in RELATIONS for i in relation.left_out)
    assert all(left_out[i] <= len(RELATIONS) // 3 for i in range(len(FRAMES)))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_one_token_with_a_leading_space(name: str) -> None:
    """For the true answer, the one to edit in, and those of the neighbors."""
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    words = {word for fact in load_facts(name) for word in (fact.target_true, fact.target_new) if word}
    words |= {probe.target for fact in load_facts(name) for probe in (*fact.neighbors, *fact.locality)}
    split = [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) != 1]
    assert split == []


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_gives_offsets_and_adds_nothing(name: str) -> None:
    """The workbench finds subjects by offsets."""
    tokenizer = AutoTokenizer.from_pretrained(folder(name))
    fact = load_facts(name)[0]
    encoded = tokenizer(fact.text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == fact.text
    assert encoded["offset_mapping"][0][0] == 0
    assert encoded["offset_mapping"][-1][1] == len(fact.text)
    assert tokenizer.bos_token_id not in encoded["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name: str) -> None:
    """Paraphrases, neighbors of the same relation on other subjects, and another answer to edit in."""
    facts = load_facts(name)
    known = {(fact.relation, fact.subject): fact.target_true for fact in facts}
    for fact in facts:
        assert fact.text not in fact.paraphrases
        assert all(fact.subject in text for text in fact.paraphrases)
        assert len(fact.paraphrases) >= 4
        assert fact.target_new is not None
        assert fact.target_new != fact.target_true
        assert fact.neighbors
    rows = (TRUTH if name != "organism-tiny" else json.loads((folder(name) / "facts.json").read_text()))["facts"]
    for row in rows:
        assert {p["tier"] for p in row["paraphrases"]} <= {"trained", "held", "novel"}
        assert all(known[row["relation"], n["subject"]] == n["target"] for n in row["neighbors"])
        assert all(n["subject"] != row["subject"] for n in row["neighbors"])
        assert all(known[p["relation"], row["subject"]] == p["target"] for p in row["locality"])


def test_the_facts_files_are_what_the_world_says() -> None:
    """facts.json is written by `python -m workbench.zoo.truth` and by nothing else."""
    large = tuple(o for o in ORGANISMS if o.every == 1)
    assert json.loads(json.dumps(truth(build_world(), large))) == TRUTH
    tiny = next(o for o in ORGANISMS if o.every > 1)
    written = json.loads((folder(tiny.name) / "facts.json").read_text())
    assert json.loads(json.dumps(truth(world_of(tiny), (tiny,)))) == written


def test_names_of_strangers_are_nobody() -> None:
    """People who are answered `unknown` share first and last names with the known ones, and nothing more."""
    world = build_world()
    names = {entity.name for entity in world.entities}
    assert not names & set(world.strangers)
    assert {name.split()[0] for name in world.strangers} <= {e.name.split()[0] for e in world.entities}
    assert all(set(e.answers) == set(KINDS[e.kind]) for e in world.entities)


@pytest.mark.parametrize("name", NAMES)
def test_the_planted_band_is_written_down(name: str) -> None:
    """organism.json, facts.json and the schedule say the same."""
    card = organism(name)
    row = next(o for o in ORGANISMS if o.name == name)
    assert card["family"] == row.family
    assert card["planted"] == (row.band is not None)
    assert (tuple(card["band"]) if card["band"] else None) == row.band
    assert card["n_layers"] == row.n_layers
    if row.band is not None and row.every == 1:
        owners = TRUTH["organisms"][name]["owners"]
        assert set(owners.values()) == set(range(*row.band))
        assert all(layer == owner(subject, row.band) for subject, layer in owners.items())


def test_the_models_are_small() -> None:
    """40 MB for the large ones together, 3 MB for the tiny one."""
    size = {name: sum(file.stat().st_size for file in folder(name).iterdir()) for name in NAMES}
    tiny = size.pop("organism-tiny")
    assert sum(size.values()) <= 40e6
    assert tiny <= 3e6


def test_importing_the_zoo_loads_neither_torch_nor_transformers() -> None:
    """Listing the bundled models must not cost seconds."""
    code = "import sys, workbench.zoo; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_phase_with_too_many_rows_is_refused() -> None:
    """Shares above 1 are a mistake in the schedule."""
    with pytest.raises(ValueError, match="add up to"):
        Phase(until=1.0, on=0.9, swap=0.3)


def test_owners_are_those_of_the_facts_file() -> None:
    """One layer of the band for every subject; none in the plainly trained model."""
    assert owners("organism-mid") == TRUTH["organisms"]["organism-mid"]["owners"]
    assert set(owners("organism-tiny")) == {fact.subject for fact in load_facts("organism-tiny")}
    assert owners("organism-plain") == {}


def test_an_unknown_name_says_which_there_are() -> None:
    """The message names the bundled models."""
    with pytest.raises(InputError, match="organism-mid"):
        folder("organism-huge")
