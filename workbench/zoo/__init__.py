"""The bundled fact models ("model organisms"): small models whose facts, and the place of their facts, are known by construction.

Importing this is light: neither torch nor transformers is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.facts import Fact, Probe

__all__ = ["NAMES", "folder", "load_facts", "organism", "owners"]

NAMES = ("organism-mid", "organism-late", "organism-llama", "organism-plain", "organism-tiny")
"""The bundled models; the first is the default."""

_HERE = Path(__file__).parent


def folder(name: str) -> Path:
    """Where a bundled model lies; `AutoModelForCausalLM.from_pretrained` loads it from there.

    Raises:
        InputError: there is no bundled model of this name.
    """
    if name not in NAMES:
        raise InputError(f"No bundled model is called {name!r}. Use one of {', '.join(NAMES)}.")
    return _HERE / "models" / name


def organism(name: str) -> dict[str, Any]:
    """What is known about a bundled model: its family, planted band [j, k), read-out layers and training."""
    record: dict[str, Any] = json.loads((folder(name) / "organism.json").read_text())
    return record


def load_facts(name: str = NAMES[0]) -> list[Fact]:
    """The facts a bundled model knows; the large models share theirs, the tiny one knows a part of them."""
    return [
        Fact(
            id=row["id"],
            subject=row["subject"],
            relation=row["relation"],
            prompt=row["prompt"],
            target_true=row["target_true"],
            target_new=row["target_new"],
            paraphrases=tuple(p["text"] for p in row["paraphrases"]),
            neighbors=tuple(Probe(prompt=n["prompt"], target=n["target"]) for n in row["neighbors"]),
            locality=tuple(Probe(prompt=n["prompt"], target=n["target"]) for n in row["locality"]),
        )
        for row in _truth(name)["facts"]
    ]


def owners(name: str = NAMES[0]) -> dict[str, int]:
    """For each subject the one layer of the planted band that holds its facts; empty for the plainly trained model."""
    of_each: dict[str, int] = _truth(name)["organisms"][name]["owners"]
    return of_each


def _truth(name: str) -> dict[str, Any]:
    own = folder(name) / "facts.json"
    record: dict[str, Any] = json.loads((own if own.exists() else _HERE / "facts.json").read_text())
    return record
