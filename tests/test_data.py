"""Published fact files are read as they are published, and a file that is not gets one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench import zoo
from workbench.data import read_facts
from workbench.facts import FactError, Probe

KNOWN = {
    "known_id": 7,
    "subject": "Marshall Islands",
    "attribute": "English",
    "template": "In {}, the language spoken is",
    "prediction": " a mixture of English and the local language, the",
    "prompt": "In Marshall Islands, the language spoken is a mixture of",
    "relation_id": "P37",
}

COUNTERFACT = {
    "case_id": 3,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The native language of Jean Gabin is"],
}

OWN = {"id": "a", "subject": "b", "prompt": "A {} is"}


def write(folder: Path, records: Any, name: str = "facts.json") -> Path:
    path = folder / name
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


def test_known_1000_asks_the_prompt_and_not_the_shorter_template(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path, [KNOWN]))
    assert fact.text == KNOWN["prompt"]
    assert (fact.id, fact.subject, fact.target_true, fact.relation) == ("known-7", "Marshall Islands", "English", "P37")
    assert fact.prompt == "In {}, the language spoken is a mixture of"


def test_the_template_tells_which_occurrence_of_the_subject_is_meant(tmp_path: Path) -> None:
    twice = {**KNOWN, "subject": "Rome", "template": "Rome and again {} lie in", "prompt": "Rome and again Rome lie in"}
    (fact,) = read_facts(write(tmp_path, [twice]))
    assert fact.prompt == "Rome and again {} lie in"


def test_a_template_that_does_not_fit_falls_back_to_the_first_occurrence_as_in_rome(tmp_path: Path) -> None:
    odd = {**KNOWN, "subject": "Rome", "template": "Where is {}?", "prompt": "Rome or Rome is in"}
    (fact,) = read_facts(write(tmp_path, [odd]))
    assert fact.prompt == "{} or Rome is in"


def test_counterfact_neighbors_share_the_true_answer(tmp_path: Path) -> None:
    (fact,) = read_facts(write(tmp_path, [COUNTERFACT]))
    assert (fact.target_true, fact.target_new) == ("French", "English")
    assert fact.text == "The mother tongue of Danielle Darrieux is"
    assert fact.paraphrases == ("Danielle Darrieux, a native",)
    assert fact.neighbors == (Probe(prompt="The native language of Jean Gabin is", target="French"),)


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({**KNOWN, "known_id": i}) for i in range(3))
    assert [fact.id for fact in read_facts(write(tmp_path, lines, "facts.jsonl"))] == ["known-0", "known-1", "known-2"]


def test_the_bundled_file_reads_like_any_other() -> None:
    assert read_facts(Path(zoo.__file__).parent / "facts.json") == zoo.load_facts()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("not json", "is no JSON"),
        ("[]", "holds no list of records"),
        ('{"a": 1}', "holds no list of records"),
        ("[1, 2]", "holds no list of records"),
        ('[{"question": "?"}]', "no known format"),
        (json.dumps([KNOWN, {**KNOWN, "subject": "Palau"}]), "Record 1 of facts.json"),
        (json.dumps([{**COUNTERFACT, "requested_rewrite": {}}]), "lacks the field 'target_true'"),
        (json.dumps([{**COUNTERFACT, "requested_rewrite": None}]), "Record 0 of facts.json"),
        (json.dumps([{"id": "a", "subject": 1, "prompt": "{}"}]), "Record 0 of facts.json"),
        (json.dumps([{"id": 5, "subject": "b", "prompt": "{}"}]), "id is 5, expected text"),
        (json.dumps([{"id": "a", "subject": "b", "prompt": "{}", "target_new": 7}]), "target_new is 7, expected text"),
        (json.dumps([{"id": "a", "subject": "\ud800", "prompt": "{}"}]), "half a character"),
        (
            json.dumps([{**OWN, "paraphrases": [1, 2]}]),
            "is not as the workbench's own format has it: paraphrases has 1",
        ),
        (json.dumps([{**OWN, "paraphrases": "A b"}]), "paraphrases is 'A b', expected a list"),
        (json.dumps([{**OWN, "paraphrases": [{"text": None}]}]), "paraphrases has None, expected text"),
        (json.dumps([{**OWN, "paraphrases": ["\ud800"]}]), "half a character"),
        (
            json.dumps([{**OWN, "neighbors": [{"prompt": 1, "target": 2}]}]),
            "neighbors has 1 as a prompt, expected text",
        ),
        (
            json.dumps([{**OWN, "locality": [{"prompt": "A", "target": 2}]}]),
            "locality has 2 as a target, expected text",
        ),
        (json.dumps([{**OWN, "neighbors": [{"prompt": "A"}]}]), "lacks the field 'target'"),
        (json.dumps([{**OWN, "neighbors": ["A"]}]), "Record 0 of facts.json"),
        (json.dumps([{**COUNTERFACT, "paraphrase_prompts": [1]}]), "paraphrase_prompts has 1, expected text"),
        (json.dumps([{**COUNTERFACT, "neighborhood_prompts": "A"}]), "neighborhood_prompts is 'A', expected a list"),
        (json.dumps([KNOWN, KNOWN]), "has the id 'known-7' 2 times"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_file_that_does_not_fit_gets_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    with pytest.raises(FactError) as error:
        read_facts(write(tmp_path, content))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_one_that_is_no_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="There is no file"):
        read_facts(tmp_path / "nowhere.json")
    with pytest.raises(FactError, match="is a folder"):
        read_facts(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FactError, match="cannot be read"):
        read_facts(tmp_path / "bytes.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([KNOWN]).encode())
    assert len(read_facts(path)) == 1
