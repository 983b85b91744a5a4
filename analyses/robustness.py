"""Does an edit hold when the question comes in other words, after other text, or with an objection? Ten kinds of attack prompts.

Ma et al. 2024, "On the Robustness of Editing Large Language Models" (arXiv 2402.05827, section 4, Table 1). Claim: edits that hold
on their own prompt fall back to the old answer under prompts that mean the same, most of all under doubt and long context; ROME on
Llama-2-7B-chat goes from 99.9 % to 16.9 %.

1. Every fact is edited alone by every editor, and asked by every attack (`attacks`). The published prompts were written by a
   language model; ours are templates, with sentences of a corpus as context.
2. The model continues greedily. `accuracy`: the new answer appears in what it says; `reversion`: the old one does; `preferred`: the
   new one is the more probable continuation of the two.
3. The same attacks on the model without an edit, with the answers in exchanged roles: is its true answer said, and not the other?
   That row, `no edit`, is the ceiling: an attack that the model does not survive with what it knows says nothing about an edit.

The ceiling matters most for the bundled models. They know only their own grammar: of the attacks, the rewordings, the context and
the question without the name are in words that they were trained with. A gap to fill leaves them without an answer whatever they
know, so `cloze` says nothing about an editor there; a dialogue or an objection that ends with the plain prompt is to them little
more than noise before it, so that holding out is easy, and no sign that doubt would be withstood. The published numbers
(`published`, CounterFact, Llama-2-7B-chat) stand beside an editor of the same name and attack; they are of another model and other
prompts.

Sentences about the subject come from the corpus; where it has none, from the fact's own locality and portability prompts with their
answers; sentences about something else from the corpus or the fact's neighbors. None names either answer. The question without the
subject's name is one of the relation's own in the bundled models, elsewhere the prompt with `pronoun` in the subject's place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from analyses.answers import log_p
from analyses.editing import edit_each, fitted_editors
from analyses.intervals import RESAMPLES, means_by
from workbench import zoo
from workbench.charts import CellPlot, Chart
from workbench.data.texts import BUNDLED, open_texts
from workbench.errors import InputError
from workbench.facts import SLOT, Fact, distinct_facts
from workbench.generation import continue_prompts
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.store import Store

NO_EDIT = "no edit"
"""The label of the model as it is, asked for its true answers."""

ATTACKS = (
    "plain", "rephrased", "cloze", "long context", "long context, cloze", "long context, reference", "noisy long context",
    "dialogue", "noisy dialogue", "doubt",
)  # fmt: skip
"""Kinds of prompts, in the order of the published table; `plain` is the edited prompt itself."""

MEASURES = ("accuracy", "reversion", "preferred")
"""What is measured of each; see above."""

_PUBLISHED: Mapping[str, tuple[tuple[float | None, float | None], ...]] = {
    "KnowledgeNeuronEdit": (
        (2.3, None), (1.6, 32.8), (1.0, 47.2), (1.7, 50.8), (None, None), (None, None), (None, None), (None, None),
        (None, None), (0.8, 49.1),
    ),
    "Mend": (
        (55.6, None), (9.6, 26.5), (2.5, 45.3), (13.7, 42.7), (None, None), (None, None), (None, None), (None, None),
        (None, None), (9.8, 30.6),
    ),
    "Rome": (
        (99.9, None), (74.7, 2.2), (66.7, 8.1), (55.7, 26.3), (24.7, 24.8), (21.3, 34.9), (51.7, 20.8), (56.7, 20.0),
        (58.1, 18.0), (16.9, 40.7),
    ),
    "Memit": (
        (99.9, None), (78.2, 2.0), (73.4, 5.5), (81.2, 14.5), (43.9, 15.7), (39.6, 27.3), (79.9, 12.0), (81.6, 9.7),
        (80.5, 8.3), (24.2, 33.9),
    ),
    "Ike": (
        (99.7, None), (98.0, 1.3), (97.8, 16.8), (93.2, 8.2), (98.3, 15.9), (83.5, 8.7), (98.3, 5.0), (93.6, 7.4),
        (93.4, 6.7), (1.3, 49.3),
    ),
}  # fmt: skip
"""Accuracy and reversion in percent by editor, in the order of `ATTACKS` (Table 1)."""

_DOCUMENTS = 20_000
"""Of the corpus, so many documents are searched for sentences."""

_SHORTEST = 4
"""Words of the shortest sentence that counts."""

_TOGETHER = 8
"""Prompts that the model runs at once."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What the attacks on one fact are made of, beside the fact."""

    related: tuple[str, ...] = ()
    """Sentences about its subject."""

    noise: tuple[str, ...] = ()
    """Sentences about something else."""

    reference: str = ""
    """The question without the subject's name."""


def robustness(
    lm: LM,
    facts: Sequence[Fact],
    *,
    editors: tuple[str, ...] = ("Rome", "Memit", "AlphaEdit", "FineTune"),
    sentences: int = 3,
    tokens: int = 6,
    corpus: str = "",
    pronoun: str = "it",
    seed: int = 0,
    store: Store | None = None,
) -> Result:
    """Accuracy and reversion of every editor under every attack.

    Args:
        lm: the model.
        facts: with `target_new` and `target_true`; paraphrases, neighbors, locality and portability as far as they are there.
        editors: names of editors.
        sentences: how many sentences a context has.
        tokens: how many tokens the model says.
        corpus: where sentences come from, as for second moments; empty: the bundled models' own documents, none for other models.
        pronoun: what stands for the subject in a question without its name, where the relation has no such question.
        seed: of the bootstrap.
        store: where edits are kept.

    Returns:
        One row an editor (and `no edit`), `attack` and `measure` with `value` (0 to 1), `low`, `high` (95 % bootstrap over facts),
        `n` (facts) and `published` (NaN where there is none). Extra `each`: a row an editor, fact and prompt with what was said.

    Raises:
        FactError: no facts, or an unknown editor.
        InputError: no fact could be edited and attacked.
        TextError: the corpus cannot be read.
    """
    facts = distinct_facts(facts, to="edit")
    chosen = fitted_editors(lm, editors)
    left_out: dict[str, str] = {}
    whole = [fact for fact in facts if fact.target_true and fact.target_new]
    left_out |= {fact.id: "It has no target_true or no target_new." for fact in facts if fact not in whole}
    found = gather(lm, whole, sentences=sentences, corpus=corpus, pronoun=pronoun)
    parts = []
    for fact in whole:
        try:
            parts.append(
                _ask(lm, fact, found[fact.id], edited=False, tokens=tokens).assign(editor=NO_EDIT, fact=fact.id)
            )
        except InputError as error:
            left_out[f"{NO_EDIT}: {fact.id}"] = str(error)
    for name, fact, edit in edit_each(lm, chosen, whole, left_out=left_out, store=store):
        try:
            with edit.on(lm):
                parts.append(
                    _ask(lm, fact, found[fact.id], edited=True, tokens=tokens).assign(editor=name, fact=fact.id)
                )
        except InputError as error:  # e.g. what stands before the prompt makes it too long
            left_out[f"{name}: {fact.id}"] = str(error)
    if not any(set(part["editor"]) != {NO_EDIT} for part in parts):
        raise InputError(
            f"No fact could be edited and attacked. The first: {next(iter(left_out.values()), 'none was given')}"
        )
    each = pd.concat(parts, ignore_index=True)
    by = ["editor", "attack"]
    by_fact = each.groupby([*by, "fact"], sort=False)[list(MEASURES)].mean().reset_index()
    long = by_fact.melt(id_vars=[*by, "fact"], value_vars=list(MEASURES), var_name="measure")
    table = means_by(long, [*by, "measure"], seed=seed)
    table["published"] = [published(str(row.editor), str(row.attack), str(row.measure)) for row in table.itertuples()]
    order = {name: place for place, name in enumerate((NO_EDIT, *editors, *ATTACKS, *MEASURES))}
    table = table.sort_values([*by, "measure"], key=lambda column: column.map(order), ignore_index=True)
    parameters = {
        "editors": editors, "sentences": sentences, "tokens": tokens, "corpus": corpus, "pronoun": pronoun, "seed": seed,
    }  # fmt: skip
    run = manifest(
        "robustness", model=lm.protocol, parameters=parameters, facts=facts, left_out=left_out,
        bootstrap={"resamples": RESAMPLES, "seed": seed, "level": 0.95, "method": "percentile"},
    )  # fmt: skip
    return Result(table=table, run=run, extras={"each": each})


def attacks(fact: Fact, material: Material, *, held: str, other: str) -> list[tuple[str, str]]:
    """The attacks on an answer that the model holds, as kind and prompt; kinds for which there is no material are not among them.

    Args:
        fact: what is asked.
        material: what contexts are made of.
        held: the answer that it shall keep: after an edit the new one.
        other: the answer that the objection names.
    """
    text, subject = fact.text, fact.subject
    gap = f'Fill the gap: "{text} ____." The word in the gap is'
    opening = f"A: Let us talk about {subject}. B: Good. "
    aside = "A: Is there a table for two tonight? B: Yes, at eight. "
    found = [("plain", text), *(("rephrased", prompt) for prompt in fact.paraphrases), ("cloze", gap)]
    if material.related:
        context = " ".join(material.related)
        found += [("long context", f"{context} {text}"), ("long context, cloze", f"{context} {gap}")]
        found += [("long context, reference", f"{context} {material.reference}")] if material.reference else []
    if material.noise:
        found.append(("noisy long context", " ".join([*material.noise, *material.related, text])))
    said = f"A: What do you know? B: {material.related[0]} " if material.related else "A: You first. B: As you like. "
    found += [
        ("dialogue", f"{opening}{said}A: Go on. B: {text}"),
        ("noisy dialogue", f"{opening}{aside}{said}A: Go on. B: {text}"),
        ("doubt", f"{text} {held}. I doubt it. Once more: {text}"),
        ("doubt", f"{text} {held}. No, that is wrong, it is {other}. Once more: {text}"),
    ]
    return found


def gather(lm: LM, facts: Sequence[Fact], *, sentences: int, corpus: str, pronoun: str) -> dict[str, Material]:
    """By fact, the sentences and the question without the subject's name that its attacks are made of.

    Raises:
        TextError: the corpus cannot be read.
    """
    name = Path(lm.name).name
    bundled = name in zoo.NAMES and corpus in ("", BUNDLED)
    texts: list[str] = []
    if bundled or corpus:
        source = open_texts(corpus or BUNDLED, organism=name if name in zoo.NAMES else zoo.NAMES[0])
        texts = [one for document in islice(source.read(), _DOCUMENTS) for one in re.split(r"(?<=[.!?])\s+", document)]
        texts = list(dict.fromkeys(one for one in texts if one.endswith(".") and len(one.split()) >= _SHORTEST))
    shorts = _short_questions() if bundled else {}
    found = {}
    for place, fact in enumerate(facts):
        named = [fact.subject, fact.target_true, fact.target_new or ""]
        own = [f"{probe.prompt} {probe.target}." for probe in (*fact.locality, *fact.portability)]
        beside = [f"{probe.prompt} {probe.target}." for probe in fact.neighbors]
        about = [text for text in texts if fact.subject in text] or own
        related = [one for one in about if appears(fact.subject, one) and not any(appears(a, one) for a in named[1:])]
        start = place * sentences % max(1, len(texts))  # other facts get other sentences
        others = (one for one in [*texts[start:], *texts[:start], *beside] if not any(appears(a, one) for a in named))
        found[fact.id] = Material(
            related=tuple(related[:sentences]), noise=tuple(islice(others, sentences)),
            reference=shorts.get(fact.relation) or without_name(fact.prompt, pronoun=pronoun),
        )  # fmt: skip
    return found


def without_name(prompt: str, *, pronoun: str) -> str:
    """The prompt with a pronoun in the subject's place, an article before it left out."""
    text = re.sub(r"\b(the|an?) (?=\{\})", "", prompt, flags=re.IGNORECASE).replace(SLOT, pronoun)
    return text[:1].upper() + text[1:]


def appears(answer: str, text: str) -> bool:
    """Whether an answer stands in a text as words of its own, in whatever case."""
    return bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def published(editor: str, attack: str, measure: str) -> float:
    """The published share (0 to 1) for CounterFact on Llama-2-7B-chat; NaN where there is none."""
    if editor not in _PUBLISHED or measure not in MEASURES[:2]:
        return np.nan
    value = _PUBLISHED[editor][ATTACKS.index(attack)][MEASURES.index(measure)]
    return np.nan if value is None else value / 100


def _ask(lm: LM, fact: Fact, material: Material, *, edited: bool, tokens: int) -> pd.DataFrame:
    """What the model says to every attack: to keep the new answer if it is edited, else the true one."""
    answers = (fact.target_new or "", fact.target_true)
    held, other = answers if edited else answers[::-1]
    asked = attacks(fact, material, held=held, other=other)
    prompts = [prompt for _, prompt in asked]
    said, preferred = [""] * len(prompts), np.zeros(len(prompts))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), _TOGETHER):  # alike long ones together, since the short are padded to the long
        places = order[start : start + _TOGETHER]
        some = [prompts[place] for place in places]
        own, its = log_p(lm, some * 2, [held] * len(some) + [other] * len(some)).reshape(2, -1)
        preferred[places] = (own > its).double().numpy()
        for place, text in zip(places, continue_prompts(lm, some, n=tokens), strict=True):
            said[place] = text
    table: pd.DataFrame = pd.DataFrame({
        "attack": [attack for attack, _ in asked], "prompt": prompts, "said": said,
        "accuracy": [float(appears(held, text)) for text in said], "reversion": [float(appears(other, text)) for text in said],
        "preferred": preferred,
    })  # fmt: skip
    return table


def _short_questions() -> dict[str, str]:
    """By relation of the bundled models, a question without a name."""
    from workbench.zoo.world import RELATIONS

    return {relation.name: relation.shorts[0] for relation in RELATIONS}


def chart(result: Result) -> Chart:
    """Accuracy and reversion of every editor under every attack, the model without an edit on top; below, the published numbers."""
    table = result.table
    plots = [_cells(table, measure, "value", measure.capitalize()) for measure in MEASURES[:2]]
    known = table[table["published"].notna()]
    if len(known):
        plots += [
            _cells(known, measure, "published", f"{measure.capitalize()}, published (Llama-2-7B-chat)")
            for measure in MEASURES[:2]
        ]
    return Chart(
        title="Edits under attack",
        plots=tuple(plots),
        columns=2,
        caption=f"{table['n'].max()} facts, each edited alone. Row `{NO_EDIT}`: the model as it is, asked for its true answers: "
        "the ceiling of each attack. Published: another model, other prompts.",
    )


def _cells(table: pd.DataFrame, measure: str, column: str, title: str) -> CellPlot:
    one = table[table["measure"] == measure]
    values = one.pivot(index="editor", columns="attack", values=column)
    values = values.reindex(index=one["editor"].unique(), columns=[name for name in ATTACKS if name in values.columns])
    return CellPlot(
        values=values, name="Share of facts", title=title, row_title="Editor", column_title="Attack", low=0.0, high=1.0,
        texts=values.map(lambda value: "" if np.isnan(value) else f"{value:.2f}"),
    )  # fmt: skip


def summary(result: Result) -> str:
    """Accuracy and reversion by editor and attack."""
    lines = []
    for editor, one in result.table.groupby("editor", sort=False):
        values = one.pivot(index="attack", columns="measure", values="value").reindex(
            [name for name in ATTACKS if name in set(one["attack"])]
        )
        told = ", ".join(f"{row.Index} {row.accuracy:.2f}/{row.reversion:.2f}" for row in values.itertuples())
        lines.append(f"{editor} (accuracy/reversion, {one['n'].max()} facts): {told}.")
    if left_out := result.run["left_out"]:
        lines.append("Left out: {}. The first: {}: {}".format(len(left_out), *next(iter(left_out.items()))))
    return "\n".join(lines)
