"""Text to take statistics over: the bundled models' documents, a local file, or a dataset of the `datasets` library.

A document is a paragraph of a .txt file (paragraphs are parted by empty lines), or the `text` of one row of a .jsonl file, a
.parquet file or a dataset. Documents are read one by one, so a file may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from workbench import zoo
from workbench.errors import InputError

BUNDLED = "bundled"
"""The name of the bundled models' documents."""

DATASETS = "datasets:"
"""What the name of a dataset begins with."""

_SEED = 20_000
"""Of the bundled documents; none of those that the models were trained with."""

_SAMPLE = 500
"""How many bundled documents stand for all of them in their digest."""

_LONGEST = 1_000_000
"""Characters after which a paragraph of a .txt file is cut at the end of its line."""


class TextError(InputError):
    """Text that cannot be read; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Documents, in a fixed order."""

    source: str
    """Where they come from, in words."""

    digest: str
    """16 hexadecimal digits that name their content; not where it lies."""

    read: Callable[[], Iterator[str]]
    """Gives the documents from the first on; none is empty."""


def open_texts(corpus: str, *, organism: str = zoo.NAMES[0]) -> Texts:
    """The documents of a corpus.

    Args:
        corpus: `bundled`, the path of a .txt, .jsonl or .parquet file, or `datasets:NAME` or `datasets:NAME:CONFIG`.
        organism: whose documents `bundled` means.

    Raises:
        TextError: there is no such file, it is of another kind, or the dataset cannot be had. A row without text is found when
            it is read.
    """
    if corpus == BUNDLED:
        return Texts(
            source=f"documents like those {organism} was trained with",
            digest=_bundled_digest(organism),
            read=lambda: _bundled(organism),
        )
    if corpus.startswith(DATASETS):
        name, _, config = corpus.removeprefix(DATASETS).partition(":")
        return _of_dataset(name, config or None)
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise TextError(
            f"There is no file {corpus!r}. Give a {', '.join(_READ)} file, {BUNDLED!r} or {DATASETS}NAME[:CONFIG]."
        )
    if path.suffix not in _READ:
        raise TextError(f"{path.name} is no text that can be read, expected {', '.join(_READ)}. Convert it.")
    about = path.stat()
    return Texts(
        source=path.name,
        digest=_file_digest(path.resolve(), about.st_size, about.st_mtime_ns),
        read=lambda: (text for text in _READ[path.suffix](path) if text.strip()),
    )


# --- the bundled models ---


def _bundled(organism: str) -> Iterator[str]:
    """Documents without end."""
    from tokenizers import Tokenizer

    from workbench.zoo.corpus import Corpus
    from workbench.zoo.organisms import organism_named
    from workbench.zoo.truth import world_of

    class Documents(Corpus):
        def __next__(self) -> str:
            return self._document().text

        def __iter__(self) -> Iterator[str]:
            return self

    tokenizer = Tokenizer.from_file(str(zoo.folder(organism) / "tokenizer.json"))
    return iter(Documents(world_of(organism_named(organism)), tokenizer, length=1, seed=_SEED))


@cache
def _bundled_digest(organism: str) -> str:
    return hashlib.blake2b("\n".join(islice(_bundled(organism), _SAMPLE)).encode(), digest_size=8).hexdigest()


# --- files ---


@cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Of a file's content; read again once its size or time of change is another."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_txt(path: Path) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in _lines(path):
        if line.strip():
            lines.append(line)
            length += len(line)
        if lines and (not line.strip() or length > _LONGEST):
            yield "".join(lines).strip("\n")
            lines, length = [], 0
    yield "".join(lines).strip("\n")


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TextError(
                f"Line {number} of {path.name} is no record with a text ({type(error).__name__}), expected "
                '{"text": "..."}. Mend or drop it.'
            ) from error
        yield _checked(text, f"Line {number} of {path.name}")


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise TextError(
                    f"{path.name} has the columns {', '.join(file.schema_arrow.names)}, expected one called text. Rename it."
                )
            row = 0
            for batch in file.iter_batches(columns=["text"], batch_size=1000):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, f"Row {row} of {path.name}")
                    row += 1
    except ArrowException as error:
        raise TextError(f"{path.name} is no complete parquet file ({type(error).__name__}). Write it again.") from error


_READ: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path.name} cannot be read as UTF-8 ({type(error).__name__}). Save it as UTF-8.") from error


def _checked(text: Any, what: str) -> str:
    """A text, empty for none."""
    if not isinstance(text, str | None):
        raise TextError(f"{what} has a text of type {type(text).__name__}, expected a string. Mend or drop it.")
    return text or ""


# --- datasets ---


def _of_dataset(name: str, config: str | None) -> Texts:
    builder = _builder(name, config)
    named = f"dataset {name}" + (f" ({config})" if config else "")

    def read() -> Iterator[str]:
        splits = builder.as_streaming_dataset()
        split = "train" if "train" in splits else next(iter(splits))
        for row, record in enumerate(splits[split]):
            if "text" not in record:
                raise TextError(
                    f"The {named} has the columns {', '.join(record)}, expected one called text. Save that column as a file."
                )
            text = _checked(record["text"], f"Row {row} of the {named}")
            if text.strip():
                yield text

    identity = f"{builder.dataset_name} {builder.config_id} {builder.hash}"
    return Texts(source=named, digest=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(), read=read)


@cache
def _builder(name: str, config: str | None) -> Any:
    """What reads a dataset: asked for once a process, since the hub is asked too."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise TextError(
            "A dataset needs the library `datasets`. Run `pip install datasets`, or give a file of text."
        ) from error
    try:
        return load_dataset_builder(name, config)
    except Exception as error:  # a foreign name makes the library raise anything
        reason = " ".join(str(error).split())[:200].rstrip(" .")
        raise TextError(
            f"The dataset {name!r} cannot be had ({type(error).__name__}: {reason}). Check name, configuration and network, or "
            "download it and give its parquet file."
        ) from error
