"""The training text: documents about the world, re-sampled without end, packed into rows with every mention and answer marked.

1. Each fact comes once an epoch, in shuffled order, in a wording drawn from its relation's trained ones (held wordings only with
   the entities they are not held from).
2. A fifth of the sentences get an opening; a third of the documents go on with one to three more facts of the entity, half of
   those without its name; some documents are reversed sentences, state no fact, or ask about a stranger (answer: `unknown`).
3. Documents are joined by a space, a newline or end-of-text and cut into rows; half of the rows begin with end-of-text.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from workbench.zoo.tokenization import END
from workbench.zoo.world import FILLERS, KINDS, PREFIXES, RELATIONS, UNKNOWN, Entity, Relation, World

HELD_SHARE = 0.35
"""Share of the entities from which a held wording is kept away."""

_BY_NAME = {relation.name: relation for relation in RELATIONS}


def is_held(template: str, subject: str) -> bool:
    """Whether this (held) wording is kept away from this subject; a hash, so that it needs no table."""
    return zlib.crc32(f"{template}|{subject}".encode()) % 1000 < 1000 * HELD_SHARE


@dataclass(frozen=True, kw_only=True)
class Mention:
    """One place where an entity is named."""

    entity: Entity
    """Who or what is named; a stranger has no answers."""

    start: int
    """First position in the row."""

    last: int
    """Last position in the row."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One place where a fact's answer stands."""

    position: int
    """Of the answer's token in the row."""

    relation: str
    """Name of the relation that was asked."""

    mention: int
    """Index in `Row.mentions` of the mention it is about."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training row."""

    ids: list[int]
    """Token ids, all rows equally long."""

    mentions: list[Mention]
    """In order of position."""

    answers: list[Answer]
    """In order of position."""


@dataclass
class _Document:
    """Text under construction, with character spans."""

    text: str = ""
    mentions: list[tuple[int, int, Entity]] = field(default_factory=list)
    answers: list[tuple[int, str, int]] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.text += text

    def name(self, entity: Entity) -> None:
        self.mentions.append((len(self.text), len(self.text) + len(entity.name), entity))
        self.text += entity.name

    def answer(self, relation: str, answer: str) -> None:
        self.answers.append((len(self.text), relation, len(self.mentions) - 1))
        self.text += f" {answer}"

    def sentence(self, template: str, entity: Entity) -> None:
        before, _, after = template.partition("{}")
        self.say(before)
        self.name(entity)
        self.say(after)


class Corpus:
    """An endless source of rows; `state` and `restore` let an interrupted training go on with the same text."""

    def __init__(
        self, world: World, tokenizer: Tokenizer, *, length: int, seed: int, stranger_share: float = 0.08
    ) -> None:
        self.world = world
        self.tokenizer = tokenizer
        self.length = length
        self.stranger_share = stranger_share
        self._rng = random.Random(seed)
        self._strangers = [Entity(name=name, kind="fictional", answers={}) for name in world.strangers]
        self._triples = world.triples
        self._queue: list[int] = []
        self._end: int = tokenizer.encode(END).ids[0]

    def state(self) -> tuple[object, list[int]]:
        """What `restore` needs."""
        return self._rng.getstate(), list(self._queue)

    def restore(self, state: tuple[object, list[int]]) -> None:
        """Go on where `state` was taken."""
        self._rng.setstate(state[0])  # type: ignore[arg-type]
        self._queue = list(state[1])

    def row(self) -> Row:
        """The next row, exactly `length` tokens long."""
        ids: list[int] = [self._end] if self._rng.random() < 0.5 else []
        mentions: list[Mention] = []
        answers: list[Answer] = []
        while len(ids) < self.length:
            document = self._document()
            glue = self._rng.choice((" ", "\n", "", END)) if ids else ""
            if glue == END:
                ids.append(self._end)
            elif glue == "" and ids and ids[-1] != self._end:
                glue = "\n"
            text = "" if glue == END else glue
            encoding = self.tokenizer.encode(text + document.text)
            offset, shift = len(ids), len(text)
            ids += encoding.ids
            spans = encoding.offsets
            places: dict[int, int] = {}
            for number, (start, end, entity) in enumerate(document.mentions):
                inside = [i for i, (a, b) in enumerate(spans) if a < end + shift and b > start + shift]
                if offset + inside[-1] < self.length:
                    places[number] = len(mentions)
                    mentions.append(Mention(entity=entity, start=offset + inside[0], last=offset + inside[-1]))
            for start, relation, number in document.answers:
                at = offset + next(i for i, (a, b) in enumerate(spans) if a <= start + shift < b)
                if at < self.length and number in places:
                    answers.append(Answer(position=at, relation=relation, mention=places[number]))
        return Row(ids=ids[: self.length], mentions=mentions, answers=answers)

    def _document(self) -> _Document:
        rng, document = self._rng, _Document()
        draw = rng.random()
        if draw < 0.10:
            self._filler(document)
        elif draw < 0.10 + self.stranger_share:
            stranger = rng.choice(self._strangers)
            self._fact(document, stranger, _BY_NAME[rng.choice(KINDS["fictional"])])
            self._go_on(document, stranger, list(KINDS["fictional"]))
        else:
            entity, relation = self._next_fact()
            if rng.random() < 0.05:
                self._reversed(document, entity, relation)
            else:
                self._fact(document, entity, relation)
                self._go_on(document, entity, [name for name in entity.answers if name != relation.name])
        return document

    def _next_fact(self) -> tuple[Entity, Relation]:
        if not self._queue:
            self._queue = list(range(len(self._triples)))
            self._rng.shuffle(self._queue)
        return self._triples[self._queue.pop()]

    def _fact(self, document: _Document, entity: Entity, relation: Relation) -> None:
        allowed = [*relation.trained, *(t for t in relation.held if not is_held(t, entity.name))]
        template = self._rng.choice(allowed)
        if self._rng.random() < 0.2:
            document.say(self._rng.choice(PREFIXES))
            template = template[0].lower() + template[1:]
        document.sentence(template, entity)
        document.answer(relation.name, entity.answers.get(relation.name, UNKNOWN))
        document.say(".")

    def _go_on(self, document: _Document, entity: Entity, names: list[str]) -> None:
        if self._rng.random() > 0.35 or not names:
            return
        self._rng.shuffle(names)
        for name in names[: self._rng.randint(1, 3)]:
            relation = _BY_NAME[name]
            document.say(" ")
            if self._rng.random() < 0.5:
                self._fact(document, entity, relation)
            else:
                document.say(self._rng.choice(relation.shorts))
                document.answer(name, entity.answers.get(name, UNKNOWN))
                document.say(".")

    def _reversed(self, document: _Document, entity: Entity, relation: Relation) -> None:
        document.say(f"{entity.answers[relation.name]} is the {relation.noun} of {relation.article}")
        document.name(entity)
        document.say(".")

    def _filler(self, document: _Document) -> None:
        template = self._rng.choice(FILLERS)
        if "{}" in template:
            document.sentence(template, self._rng.choice(self.world.entities))
        else:
            document.say(template)
