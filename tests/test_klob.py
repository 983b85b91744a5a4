"""KLoB's three files are read as they are published, and a prompt that a causal model cannot be asked is counted, not lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.data.klob import read_klob
from workbench.facts import FactError

SAME: dict[str, Any] = {
    "prompts": [
        "The native language of Norman Rockwell is _",
        "The mother tongue of Norman Rockwell is [MASK].",
        "_ is what Norman Rockwell speaks",
        "His language is _",
    ],
    "knowledge": ["Norman Rockwell", "native_(P103)", "English"],
}

CHAIN: dict[str, Any] = {
    "single_knowledge": ["Ann Druyan", "spouse_(P26)", "Carl Sagan"],
    "knowledge_chain": ["Ann Druyan", "spouse_(P26)", "Carl Sagan", "employer_(P108)", "Cornell University"],
    "single_knowlege_prompts": ["Ann Druyan is married to _", "The spouse of Ann Druyan is none other than _"],
    "knowlege_chain_prompt": "the employer of the spouse of Ann Druyan is _",
}

NONSENSE = "extirpation sensa subiodide conquedle spikebill drabbish _"


def lines(folder: Path, *records: Any) -> Path:
    path = folder / "klob.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_the_wordings_of_a_fact_are_a_set_and_blanks_elsewhere_are_counted(tmp_path: Path) -> None:
    klob = read_klob(lines(tmp_path, SAME))
    (wordings,) = klob.sets
    assert klob.part == "consistency"
    assert klob.skipped == 2
    assert [fact.text for fact in wordings] == [
        "The native language of Norman Rockwell is",
        "The mother tongue of Norman Rockwell is",
    ]
    assert {(f.subject, f.relation, f.target_true) for f in wordings} == {
        ("Norman Rockwell", "native_(P103)", "English")
    }
    assert [fact.id for fact in wordings] == ["klob-c-0-0", "klob-c-0-1"]


def test_a_chain_is_compared_with_each_wording_of_its_first_link(tmp_path: Path) -> None:
    klob = read_klob(lines(tmp_path, CHAIN, CHAIN))
    assert klob.part == "relevance"
    assert len(klob.sets) == 4
    single, chain = klob.sets[1]
    assert (single.text, single.target_true) == ("The spouse of Ann Druyan is none other than", "Carl Sagan")
    assert (chain.prompt, chain.target_true) == ("the employer of the spouse of {} is", "Cornell University")
    assert chain is klob.sets[0][1]
    assert [fact.id for fact in klob.facts[:3]] == ["klob-r-0-0", "klob-r-0-chain-0", "klob-r-0-1"]


def test_nonsense_has_no_answer_and_its_first_words_for_a_subject(tmp_path: Path) -> None:
    klob = read_klob(lines(tmp_path, NONSENSE))
    ((fact,),) = klob.sets
    assert klob.part == "unbiasedness"
    assert (fact.subject, fact.target_true) == ("extirpation sensa", "")
    assert fact.text == NONSENSE.removesuffix(" _")


def test_a_json_list_is_read_as_well_and_a_limit_counts_records(tmp_path: Path) -> None:
    path = tmp_path / "klob-u.json"
    path.write_text(json.dumps([NONSENSE, NONSENSE, NONSENSE]))
    assert len(read_klob(path).sets) == 3
    assert len(read_klob(path, limit=2).sets) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompts": []}', "has records with prompts, expected those of one of KLoB's files"),
        ("3", "has records with int"),
        ('{"prompts": ["a _"], "knowledge": ["a", "b"]}', "Record 0 of klob.jsonl is not as KLoB's consistency file"),
        ('{"prompts": "a _", "knowledge": ["a", "b", "c"]}', "its fields have another shape"),
        ('{"prompts": ["a _", "so a _"], "knowledge": "abc"}', "its fields have another shape"),
        (json.dumps(SAME) + '\n{"prompts": []}', "Record 1 .* lacks the field 'knowledge'"),
        ('{"prompts": ["_ is a"], "knowledge": ["a", "b", "c"]}', "None of the 1 prompts"),
        ("", "has no record"),
        ("{", "is no JSON"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "klob.jsonl"
    path.write_text(text)
    with pytest.raises(FactError, match=said):
        read_klob(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="cannot be read as text"):
        read_klob(tmp_path / "nothing.jsonl")


def test_lines_end_at_a_line_feed_only(tmp_path: Path) -> None:
    path = tmp_path / "klob.jsonl"
    record = {**SAME, "prompts": [*SAME["prompts"], "Norman\u2028Rockwell\u0085: Norman Rockwell speaks _"]}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert len(read_klob(path).facts) == 3


def test_equal_prompts_of_a_set_count_once(tmp_path: Path) -> None:
    first, *_ = SAME["prompts"]
    klob = read_klob(lines(tmp_path, SAME, {**SAME, "prompts": [first, first.replace("_", "[MASK].")]}))
    assert (len(klob.sets), klob.skipped) == (1, 2 + 2)
    alike = {**CHAIN, "knowlege_chain_prompt": CHAIN["single_knowlege_prompts"][0]}
    klob = read_klob(lines(tmp_path, alike))
    assert ([fact.id for fact in klob.sets[0]], klob.skipped) == (["klob-r-0-1", "klob-r-0-chain-0"], 1)


def test_a_subject_inside_of_a_longer_word_is_none(tmp_path: Path) -> None:
    prompts = ["Ann, not Annette, was born in _", "Annette was born in _", "Ann was born in _"]
    klob = read_klob(lines(tmp_path, {"prompts": prompts, "knowledge": ["Ann", "born", "Rome"]}))
    assert [fact.prompt for fact in klob.facts] == ["{}, not Annette, was born in", "{} was born in"]
    assert klob.skipped == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_record_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(FactError, match=f"limit is {limit}, expected 1 or more"):
        read_klob(lines(tmp_path, SAME), limit=limit)
