"""What a reader is, and how a file finds its reader."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.facts import Fact, FactError
from workbench.registry import discover

Record = Mapping[str, Any]


class Reader(ABC):
    """Turns records of one published format into facts."""

    name: str
    """What the format is called, for messages."""

    fields: frozenset[str]
    """Fields that every record of this format has, and that together no other format has."""

    @abstractmethod
    def fact(self, record: Record) -> Fact:
        """The fact of one record.

        Raises:
            KeyError, TypeError, FactError: the record is not as the format says.
        """


def read_facts(path: Path | str) -> list[Fact]:
    """All facts of a JSON or JSON-lines file in a known format.

    Raises:
        FactError: the file is missing, is no JSON list of records, is of no known format, or has a record that does not fit; the
            message names the record.
    """
    path = Path(path)
    if path.is_dir():
        raise FactError(f"{str(path)!r} is a folder. Give a JSON file of facts.")
    if not path.is_file():
        raise FactError(f"There is no file {str(path)!r}. Give a JSON file of facts.")
    records = _records(path)
    readers = [reader() for reader in discover("workbench.data", Reader).values()]  # type: ignore[type-abstract]
    keys = set(records[0])
    reader = next((reader for reader in readers if reader.fields <= keys), None)
    if reader is None:
        known = "; ".join(f"{reader.name} ({', '.join(sorted(reader.fields))})" for reader in readers)
        raise FactError(
            f"{path.name} has records with the fields {', '.join(sorted(keys))}, which is no known format. Known are {known}."
        )
    facts = []
    for index, record in enumerate(records):
        try:
            facts.append(reader.fact(record))
        except (KeyError, TypeError, AttributeError, FactError) as error:
            what = f"it lacks the field {error}." if isinstance(error, KeyError) else _reason(error)
            raise FactError(
                f"Record {index} of {path.name} is not as {reader.name} has it: {what} Mend or drop it."
            ) from error
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        double = next(name for name in ids if ids.count(name) > 1)
        raise FactError(f"{path.name} has the id {double!r} {ids.count(double)} times. Give every fact its own id.")
    return facts


def texts(name: str, value: Any, *, part: str = "") -> tuple[str, ...]:
    """The texts of a list; the message of what is none gives its name, and as what (`part`) it is one.

    Raises:
        FactError: it is no list, or has something else.
    """
    if not isinstance(value, list):
        raise FactError(f"{name} is {value!r:.80}, expected a list.")
    for one in value:
        came = f"{name} has {one!r:.80}{part and f' as a {part}'}"
        if not isinstance(one, str):
            raise FactError(f"{came}, expected text.")
        try:
            one.encode()
        except UnicodeEncodeError:
            raise FactError(f"{came}, which holds half a character. Write it as valid Unicode.") from None
    return tuple(value)


def _reason(error: Exception) -> str:
    """The error's own sentence, or one for a record of another shape."""
    return str(error) if isinstance(error, FactError) else "its fields have another type."


def _records(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FactError(
            f"{str(path)!r} cannot be read as text ({type(error).__name__}). Give a JSON file of facts."
        ) from error
    try:
        records = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (ValueError, RecursionError) as error:
        raise FactError(
            f"{path.name} is no JSON: {error}. Give a JSON list of records, or .jsonl with one a line."
        ) from error
    if isinstance(records, Mapping) and isinstance(records.get("facts"), list):
        records = records["facts"]
    if not isinstance(records, list) or not records or not all(isinstance(record, Mapping) for record in records):
        raise FactError(f"{path.name} holds no list of records, expected a JSON list with at least one fact.")
    return records
