"""Text is read document by document, in order, and named by its content."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest

from workbench.data.texts import TextError, _builder, open_texts

THREE = ["The first one.\nIt goes on.", "A second: Zürich, 東京.", "The third."]


def write(path: Path) -> Path:
    """The three documents and an empty one, as a file of the kind that its name says."""
    if path.suffix == ".txt":
        path.write_text("\n\n" + "\n \n\n".join(THREE) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        rows = [{"text": text, "id": i} for i, text in enumerate([*THREE[:2], " ", THREE[2]])]
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    else:
        pd.DataFrame({"id": range(5), "text": [*THREE[:2], " ", None, THREE[2]]}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_file_gives_its_documents_in_order_as_often_as_it_is_read(kind: str, tmp_path: Path) -> None:
    texts = open_texts(str(write(tmp_path / f"mine.{kind}")))
    assert list(texts.read()) == THREE
    assert list(texts.read()) == THREE
    assert texts.source == f"mine.{kind}"


def test_a_file_is_named_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write(tmp_path / "a.txt")
    same = write(tmp_path / "elsewhere" / "b.txt")
    digest = open_texts(str(first)).digest
    assert open_texts(str(same)).digest == digest
    same.write_text("Something else.", encoding="utf-8")
    assert open_texts(str(same)).digest != digest


def test_bundled_documents_are_always_the_same_and_about_the_model_s_own_world() -> None:
    texts = open_texts("bundled", organism="organism-tiny")
    some = list(islice(texts.read(), 300))
    assert some == list(islice(texts.read(), 300))
    assert len(set(some)) > 250
    assert any("Eiffel Tower" in text for text in islice(open_texts("bundled").read(), 3000))
    assert open_texts("bundled").digest != texts.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.jsonl", '{"text": "a"}\n{"words": "b"}', "Line 2 of no.jsonl is no record with a text"),
        ("no.jsonl", '{"text": 3}', "Line 1 of no.jsonl has a text of type int"),
        ("no.jsonl", "plain words", "Line 1 of no.jsonl"),
        ("no.parquet", "plain words", "no complete parquet file"),
        ("no.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("no.pdf", "plain words", "expected .txt, .jsonl, .parquet"),
    ],
)
def test_a_file_that_holds_no_text_is_told_of(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError, match=message):
        list(open_texts(str(path)).read())


def test_a_table_without_text_and_a_missing_file_are_told_of(tmp_path: Path) -> None:
    pd.DataFrame({"words": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(TextError, match="has the columns words, expected one called text"):
        list(open_texts(str(tmp_path / "a.parquet")).read())
    with pytest.raises(TextError, match="There is no file"):
        open_texts(str(tmp_path / "b.txt"))


def test_a_dataset_is_read_by_its_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl")
    texts = open_texts(f"datasets:{tmp_path}")
    assert list(texts.read()) == THREE
    _builder.cache_clear()
    assert open_texts(f"datasets:{tmp_path}").digest == texts.digest
    (tmp_path / "train.jsonl").write_text('{"text": "Something else."}\n')
    _builder.cache_clear()
    assert open_texts(f"datasets:{tmp_path}").digest != texts.digest
    with pytest.raises(TextError, match="cannot be had"):
        open_texts(f"datasets:{tmp_path / 'nothing'}")


def test_a_dataset_without_its_library_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    _builder.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="pip install datasets"):
        open_texts("datasets:wikitext:wikitext-2-raw-v1")
