"""What the page on value vectors shows beside a footprint: neurons by name, readings of them in words, and a search by token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import pandas as pd

from workbench.drawing import fact_row
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.figures_neurons import neuron_label
from workbench.results import Footprint, Result
from workbench.sites import Site
from workbench.store import Store

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.vocabulary import Projection

FOUND = 20
"""How many neurons a search gives."""

_NAME = re.compile(r"L?(\d{1,6})\.(\d{1,6})", re.ASCII)


class NeuronError(InputError):
    """Text that names no neuron."""


@dataclass(frozen=True, kw_only=True, order=True)
class Neuron:
    """One MLP neuron; `L5.17` is how it is spelled."""

    layer: int
    """0-based."""

    neuron: int
    """0-based."""

    def __str__(self) -> str:
        return neuron_label(self.layer, self.neuron)

    @classmethod
    def parse(cls, text: str) -> Neuron:
        """The neuron spelled by `text`; the inverse of `str(neuron)`.

        Raises:
            NeuronError: the text names none.
        """
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise NeuronError(
                f"{text!r} names no neuron. Write it like 'L5.17': layer 5, neuron 17, both counted from 0."
            )
        return cls(layer=int(match[1]), neuron=int(match[2]))

    @classmethod
    def at(cls, site: str) -> Neuron:
        """The neuron of a site like `L5.mlp_post[17]@last`.

        Raises:
            NeuronError: the site is no single neuron.
            SiteError: the text spells no site.
        """
        place = Site.parse(site)
        if place.neuron is None:
            raise NeuronError(f"{site!r} is no single neuron. Write it like 'L5.mlp_post[17]'.")
        return cls(layer=place.layer, neuron=place.neuron)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What value vectors say about a fact in three numbers, in logits."""

    logit: float
    """The answer's logit at the end of the prompt."""

    layers: float
    """What the MLPs of all layers contribute at the footprint's token."""

    neurons: float
    """What the neurons with a row of their own contribute."""

    n: int
    """How many they are."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word as the tokenizer has it."""

    tokens: tuple[tuple[int, str], ...]
    """Ids and texts: of the ways to write the word as a single token, else of its pieces."""

    is_whole: bool
    """Whether each is the whole word."""


def sums(footprint: Footprint) -> Sums:
    """The numbers above a fact's value vectors."""
    neurons = footprint.neurons()
    return Sums(
        logit=float(fact_row(footprint, None)["logit"]),
        layers=float(footprint.whole(kind="mlp_post")["value"].sum()),
        neurons=float(neurons["value"].sum()),
        n=len(neurons),
    )


def named(table: pd.DataFrame) -> tuple[Neuron, ...]:
    """The neurons of a table with the columns `layer` and `neuron`, row by row."""
    rows = zip(table["layer"], table["neuron"], strict=True)
    return tuple(Neuron(layer=int(layer), neuron=int(neuron)) for layer, neuron in rows)


def read_words(lm: LM, neurons: Sequence[Neuron], *, projection: Projection, k: int = 5) -> pd.DataFrame:
    """The tokens that each neuron promotes and suppresses most, in words.

    Returns:
        One row a neuron, in the order given: `promoted`, `suppressed`.

    Raises:
        VocabularyError: there is no such neuron.
    """
    from workbench.vocabulary import neuron_tokens, words

    rows = []
    for one in neurons:
        ids = neuron_tokens(lm, one.layer, one.neuron, projection=projection, k=k).groupby("direction")["token_id"]
        rows.append([words(lm, ids.get_group(direction)) for direction in ("promoted", "suppressed")])
    table: pd.DataFrame = pd.DataFrame(rows, columns=["promoted", "suppressed"])
    return table


def word_tokens(lm: LM, text: str) -> Word:
    """The tokens that a search for a word can mean.

    Raises:
        VocabularyError: the word is empty, or the tokenizer knows no part of it.
    """
    from workbench.vocabulary import VocabularyError, spellings

    try:
        ids, is_whole = spellings(lm, text), True
    except VocabularyError:
        pieces = dict.fromkeys(lm.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"])
        if not text.strip():
            raise
        ids, is_whole = tuple(piece for piece in pieces if piece != lm.tokenizer.unk_token_id), False
        if not ids:
            raise VocabularyError(
                f"The tokenizer of {lm.name} does not know {text!r}. Search for another word."
            ) from None
    return Word(tokens=tuple((int(token), lm.word(int(token))) for token in ids), is_whole=is_whole)


def find_neurons(lm: LM, token: int, *, projection: Projection, n: int = FOUND) -> pd.DataFrame | None:
    """The neurons of the model that promote a token most; None until `build_words` has made the index of these weights.

    Returns:
        One row a neuron, the strongest first: `layer`, `neuron`, `value` (the token's logit per unit of activation and norm),
        `rank` (the token's place among those the neuron promotes, 0: the first), `promoted`, `suppressed`.
    """
    from workbench.vocabulary import find_index

    index = find_index(lm, projection=projection)
    if index is None:
        return None
    found = index.search(token, n=n)
    words: pd.DataFrame = pd.concat([found, read_words(lm, named(found), projection=projection)], axis=1)
    return words


def has_words(lm: LM, *, projection: Projection) -> bool:
    """Whether the index for the search is there."""
    from workbench.vocabulary import find_index

    return find_index(lm, projection=projection) is not None


def build_words(lm: LM, *, projection: Projection) -> None:
    """Makes the index for the search; long work for a worker, which reports its progress.

    Raises:
        ModelError: a norm that cannot be frozen.
        Cancelled: it was stopped; the next build goes on after the last finished layer.
    """
    from workbench.vocabulary import build_index

    build_index(lm, projection=projection)


@dataclass(frozen=True, kw_only=True, eq=False)
class Card:
    """One neuron and one fact."""

    k: float
    """The neuron's activation at the prompt's last token."""

    contribution: float
    """What it gives there to the answer's logit directly."""

    strongest: float
    """Its activation of largest size over all tokens of the prompt."""

    text: str
    """The token where that is."""

    tokens: Mapping[Projection, pd.DataFrame]
    """What it promotes and suppresses in each projection, as `figures_neurons.tokens` draws it."""


def card_of(lm: LM, fact: Fact, neuron: Neuron) -> Card:
    """A neuron at one fact, and in words.

    Raises:
        VocabularyError: there is no such neuron.
    """
    from analyses.neuron_card import neuron_card
    from workbench.vocabulary import Projection

    found = neuron_card(lm, [fact], layer=neuron.layer, neuron=neuron.neuron)
    row, tokens = found.table.iloc[0], found.extras["tokens"]
    return Card(
        k=float(row["k_last"]),
        contribution=float(row["contribution"]),
        strongest=float(row["k"]),
        text=str(row["text"]),
        tokens={name: tokens[tokens["projection"] == name] for name in get_args(Projection)},
    )


def find_prompts(lm: LM, facts: Sequence[Fact], store: Store) -> Result | None:
    """The strongest prompts of all neurons, once `keep_prompts` has stored them."""
    from analyses.strongest_prompts import find_strongest_prompts

    return find_strongest_prompts(store, lm, facts)


def keep_prompts(lm: LM, facts: Sequence[Fact], store: Store) -> None:
    """Finds the strongest prompts of all neurons and stores them; long work for a worker, which reports its progress.

    Raises:
        Cancelled: it was stopped.
    """
    from analyses.strongest_prompts import strongest_prompts

    store.save(strongest_prompts(lm, facts))


def prompts_of(lm: LM, found: Result, facts: Mapping[str, Fact], neuron: Neuron) -> pd.DataFrame:
    """One neuron's strongest prompts.

    Args:
        lm: the model.
        found: of `find_prompts`.
        facts: by id.
        neuron: which.

    Returns:
        `k`, `text` (the token where the activation is largest), `prompt` and `answer`; the strongest first.
    """
    rows = found.table[(found.table["layer"] == neuron.layer) & (found.table["neuron"] == neuron.neuron)]
    of_row = [facts[fact] for fact in rows["fact"]]
    texts = lm.encode(of_row).texts if of_row else ()
    table: pd.DataFrame = pd.DataFrame(
        {
            "k": rows["k"].to_numpy(),
            "text": [row[place].strip() or row[place] for row, place in zip(texts, rows["position"], strict=True)],
            "prompt": [fact.text for fact in of_row],
            "answer": [fact.target_true for fact in of_row],
        }
    )
    return table


def with_words(footprint: Footprint) -> Result:
    """A footprint's rows with what its extra table says about single neurons: `k`, `share`, `promoted`, `suppressed`, for files."""
    more = footprint.extras["neurons"][
        ["fact", "layer", "neuron", "k", "share", "promoted", "suppressed", "projection"]
    ]
    table = footprint.table.merge(more.astype({"neuron": "Int64"}), how="left", on=["fact", "layer", "neuron"])
    return Result(table=table, run=footprint.run)
