"""What every locator keeps, in every family: a new file in `workbench/locators` is tested here without a new test."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import workbench.locators
from tests.examples import FACTS, SAID, ZURICH, fresh_lm, tiny_lm
from workbench.facts import FactError
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.locators import Locator, all_locators, locate
from workbench.models import LM
from workbench.progress import Cancelled, reporting
from workbench.results import FOOTPRINT_COLUMNS, Footprint
from workbench.sites import KINDS, TOKEN_ROLES, Site
from workbench.store import Store

LOCATORS = all_locators()

SMALL: dict[str, Any] = {
    "samples": 2,
    "window": 3,
    "steps": 3,
    "corrupt": "noise",
    "substitutes": (
        "Tower Eiffel",
        "Steve Jabs",
        "rich",
        "Züricz",
        "Zrüich",
    ),  # as long as a subject, whatever the tokenizer
}
"""Set where a locator has such a parameter, so that it is quick and fits the facts."""


def small(name: str) -> Locator:
    """A locator with its defaults, but quick."""
    cls = LOCATORS[name]
    return cls(**{f.name: SMALL[f.name] for f in fields(cls) if f.name in SMALL})


@cache
def footprint(name: str, family: str) -> Footprint | str:
    """Where a locator finds two facts, or why it cannot run on this family."""
    try:
        return small(name)(tiny_lm(family), [SAID, ZURICH])
    except ModelError as error:
        return str(error)


def found(name: str, family: str) -> Footprint:
    here = footprint(name, family)
    if isinstance(here, str):
        pytest.skip(here)
    return here


@pytest.fixture(params=LOCATORS)
def name(request: pytest.FixtureRequest) -> str:
    """Every locator, one after the other."""
    which: str = request.param
    return which


def test_the_registry_finds_the_methods() -> None:
    assert "CausalTrace" in LOCATORS
    assert list(LOCATORS) == sorted(LOCATORS)
    assert all(issubclass(cls, Locator) for cls in LOCATORS.values())
    assert all(cls.__doc__ for cls in LOCATORS.values())


def test_a_locators_repr_makes_it_again(name: str) -> None:
    names = {**LOCATORS, **vars(workbench.locators)}
    for locator in (LOCATORS[name](), small(name)):
        assert eval(repr(locator), names) == locator
        assert repr(locator).startswith(f"{name}(")


def test_a_locator_is_frozen_and_counts_by_value(name: str) -> None:
    locator = small(name)
    with pytest.raises(FrozenInstanceError):
        setattr(locator, fields(locator)[0].name, None)
    assert hash(locator) == hash(small(name))


def test_every_parameter_says_what_it_is(name: str) -> None:
    """The app's form is made from the fields and what is written below them."""
    sources = [inspect.getsource(cls) for cls in LOCATORS[name].__mro__ if is_dataclass(cls)]
    for parameter in fields(LOCATORS[name]):
        field = f"\n    {parameter.name}: "
        after = next(source.split(field, 1)[1] for source in sources if field in source).split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), f"{name}.{parameter.name} has no docstring"


def test_the_table_has_the_columns_of_a_footprint_and_their_types(name: str, family: str) -> None:
    table = found(name, family).table
    assert list(table.columns)[: len(FOOTPRINT_COLUMNS)] == list(FOOTPRINT_COLUMNS)
    assert table["layer"].dtype == "int64"
    assert table["position"].dtype == ("Int64" if table["position"].isna().any() else "int64")
    assert table["head"].dtype == table["neuron"].dtype == "Int64"
    assert table[["value", "se", "score"]].dtypes.eq("float64").all()
    assert table["value"].notna().all()
    assert table["value"].abs().max() > 0
    assert set(table["kind"]) <= set(KINDS)
    assert set(table["token"]) <= {*TOKEN_ROLES, "all"}
    assert (table["token"] == "all").equals(table["position"].isna())


def test_every_row_is_one_place_of_one_fact(name: str, family: str) -> None:
    table, lm = found(name, family).table, tiny_lm(family)
    factors = [column for column in table.columns if column not in ("value", "se", "score")]
    assert not table.duplicated(factors).any()
    for fact in (SAID, ZURICH):
        tokens, rows = lm.encode([fact]), table[table["fact"] == fact.id]
        for row in rows.itertuples():
            head, neuron, position = (
                None if pd.isna(part) else int(part) for part in (row.head, row.neuron, row.position)
            )
            site = Site(layer=int(row.layer), kind=row.kind, token=position, head=head, neuron=neuron)
            assert Site.parse(str(row.site)) == site
            assert row.token == ("all" if position is None else tokens.roles()[position])
            assert row.text == ("" if position is None else tokens.texts[0][position])
            assert 0 <= row.layer < lm.n_layers


def test_a_map_has_every_token_and_layer_once(name: str, family: str) -> None:
    """Unless the locator looks at the tokens of one role only, or at none."""
    here, lm = found(name, family), tiny_lm(family)
    for fact in (SAID, ZURICH):
        for kind in (kind for kind in KINDS if kind in here.kinds):
            rows = here.of(fact=fact.id, kind=kind)
            whole = rows[rows["head"].isna() & rows["neuron"].isna()]
            if not whole.empty:
                rows = whole
                assert not rows.duplicated(["layer", "position"]).any()
            places = rows[["layer", "position"]].drop_duplicates()
            positions, roles = set(places["position"].dropna()), lm.encode([fact]).roles()
            assert len(places) == len(lm.sites(kind)) * max(1, len(positions))
            chosen = {roles[position] for position in positions}
            assert positions == {i for i, role in enumerate(roles) if role in chosen}
    if name == "CausalTrace":
        assert len(here.of(fact=SAID.id)) == 3 * lm.n_layers * lm.encode([SAID]).lengths[0]


def test_the_manifest_says_all_that_is_needed_to_repeat_the_run(name: str, family: str) -> None:
    here, lm = found(name, family), tiny_lm(family)
    manifest = here.run
    assert manifest["what"] == name
    assert lm.protocol.items() <= manifest.items()
    assert {"model", "weight_hash", "dtype", "attention", "device", "bos"} <= set(manifest)
    assert manifest["layer_base"] == 0
    assert manifest["parameters"].keys() <= {f.name for f in fields(LOCATORS[name])}
    assert [fact["id"] for fact in manifest["facts"]] == [SAID.id, ZURICH.id]
    assert {"torch", "transformers", "numpy", "python"} <= set(manifest["versions"])
    assert max(manifest["self_checks"].values()) < 1e-3
    assert manifest["unit"]
    if name == "CausalTrace":
        assert {"noise", "samples", "seed", "window", "window_rule", "score", "replace"} <= set(manifest["parameters"])
        assert manifest["sigma"] > 0
        facts = here.extras["facts"]
        assert {"fact", "answer", "answer_ids", "clean", "corrupted", "sigma"} <= set(facts.columns)
        assert list(facts["fact"]) == [SAID.id, ZURICH.id]


def test_a_second_run_gives_the_same_numbers(name: str) -> None:
    for family in ("gpt2", "llama"):
        again = small(name)(tiny_lm(family), [SAID, ZURICH])
        pd.testing.assert_frame_equal(again.table, found(name, family).table)


def test_facts_do_not_matter_to_each_other(name: str) -> None:
    """What a fact gets in a batch is what it gets alone, once the noise's scale and the like are fixed."""
    lm = tiny_lm("gpt2")
    locator = small(name).resolved(lm, [SAID, ZURICH])
    together = locator(lm, [ZURICH, SAID])
    for fact in (SAID, ZURICH):
        alone = locator(lm, [fact]).table
        pd.testing.assert_frame_equal(alone, together.of(fact=fact.id).reset_index(drop=True))


def test_locating_leaves_the_model_as_it_was(name: str, family: str) -> None:
    lm = fresh_lm(family)
    tokens = lm.encode([SAID])
    weights = {key: value.clone() for key, value in lm.model.state_dict().items()}
    before = run(lm, tokens).logits
    try:
        small(name)(lm, [ZURICH])
    except ModelError as error:
        pytest.skip(str(error))
    assert run(lm, tokens).logits.equal(before)
    assert all(value.equal(weights[key]) for key, value in lm.model.state_dict().items())
    assert not lm.model.training
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_footprint_is_saved_and_loaded_as_it_is(name: str, tmp_path: Path) -> None:
    here = found(name, "gpt2")
    here.save(tmp_path / "x")
    again = Footprint.load(tmp_path / "x")
    pd.testing.assert_frame_equal(again.table, here.table)
    assert again.key == here.key
    for extra, table in here.extras.items():
        pd.testing.assert_frame_equal(again.extras[extra], table)


def test_no_facts_or_two_of_one_name_are_refused(name: str, gpt2: LM) -> None:
    with pytest.raises(FactError, match="at least one"):
        small(name)(gpt2, [])
    with pytest.raises(FactError, match=r"'said' stands 2 times"):
        small(name)(gpt2, [SAID, SAID])


def test_a_stopped_run_goes_on_where_it_was(
    name: str, gpt2: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    original = LOCATORS[name].locate_together

    def counted(self: Locator, lm: LM, pieces: Any, **options: Any) -> list[Footprint]:
        computed.extend(f"{fact.id} {part}" for fact, part in pieces)
        return original(self, lm, pieces, **options)

    monkeypatch.setattr(LOCATORS[name], "locate_together", counted)
    locator, facts, store = small(name), [SAID, ZURICH, FACTS[2]], Store(folder=tmp_path)
    parts = len(locator.resolved(gpt2, facts).parts())
    pieces = len(facts) * parts

    def stop(what: str, done: int, total: int) -> None:
        if what == "facts" and done == len(facts) - 1:
            raise Cancelled

    with pytest.raises(Cancelled), reporting(stop):
        locate(locator, gpt2, facts, store=store)
    assert len(computed) == pieces - parts
    whole = locate(locator, gpt2, facts, store=store)
    assert len(computed) == pieces
    assert len(set(computed)) == pieces
    again = locate(locator, gpt2, facts, store=store)
    assert len(computed) == pieces
    pd.testing.assert_frame_equal(again.table, whole.table)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(locator(gpt2, facts).table, whole.table, check_dtype=True)


def test_facts_that_cannot_be_taken_are_left_out_where_that_is_asked(gpt2: LM, tmp_path: Path) -> None:
    swap = small("CausalTrace")
    swap = replace(swap, corrupt="swap", substitutes=("Tower Eiffel",))  # type: ignore[call-arg]
    facts, store = [ZURICH, SAID], Store(folder=tmp_path)
    with pytest.raises(FactError, match="as many tokens"):
        locate(swap, gpt2, facts)
    found = locate(swap, gpt2, facts, store=store, skip=True)
    assert found.facts == (SAID.id,)
    assert set(found.run["left_out"]) == {ZURICH.id}
    assert "as many tokens" in found.run["left_out"][ZURICH.id]
    pd.testing.assert_frame_equal(found.table, locate(swap, gpt2, [SAID]).table)
    with pytest.raises(FactError, match="None of the 1 facts"):
        locate(swap, gpt2, [ZURICH], skip=True)


def test_other_weights_are_another_question(name: str, tmp_path: Path) -> None:
    store, locator = Store(folder=tmp_path), small(name)
    one = locate(locator, tiny_lm("gpt2"), [SAID], store=store)
    n = len(store.manifests())
    other = locate(locator, tiny_lm("gpt2", seed=1), [SAID], store=store)
    assert len(store.manifests()) == 2 * n
    assert one.key != other.key
    assert not one.table["value"].equals(other.table["value"])
