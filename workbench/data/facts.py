"""The workbench's own format: the fields of `Fact`, as `workbench/zoo/facts.json` has them under `facts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from workbench.data.base import Reader, Record, texts
from workbench.facts import Fact, FactError, Probe

_PROBES = ("neighbors", "portability", "locality")


class Facts(Reader):
    """{id, subject, prompt with {}, target_true, and optionally the other fields of `Fact`}; a paraphrase may carry its tier"""

    name = "the workbench's own format"
    fields = frozenset({"id", "subject", "prompt"})

    def fact(self, record: Record) -> Fact:
        """One fact; other fields than `Fact`'s are left out."""
        known = {f.name for f in fields(Fact)}
        values: dict[str, Any] = {key: value for key, value in record.items() if key in known}
        for name in _PROBES:
            probes = values.get(name, [])
            prompts, targets = (texts(name, [one[part] for one in probes], part=part) for part in ("prompt", "target"))
            values[name] = tuple(Probe(prompt=p, target=t) for p, t in zip(prompts, targets, strict=True))
        told = values.get("paraphrases", [])
        if isinstance(told, list):
            told = [one["text"] if isinstance(one, Mapping) else one for one in told]
        values["paraphrases"] = texts("paraphrases", told)
        if not isinstance(values["prompt"], str) or not isinstance(values["subject"], str):
            raise FactError("subject and prompt must be text.")
        return Fact(**values)
