"""`known_1000.json` of ROME: 1,209 facts that GPT-2 XL knows (arXiv 2202.05262, App. B.1).

A record's `template` is often shorter than its `prompt`, which is what the model was asked; the template still tells which
occurrence of the subject is meant.
"""

from __future__ import annotations

from workbench.data.base import Reader, Record
from workbench.facts import SLOT, Fact


class Known1000(Reader):
    """{known_id, subject, attribute, template, prediction, prompt, relation_id}"""

    name = "ROME's known_1000"
    fields = frozenset({"known_id", "subject", "attribute", "prompt"})

    def fact(self, record: Record) -> Fact:
        """One fact; its answer is the `attribute`."""
        subject, text = record["subject"], record["prompt"]
        before = record.get("template", "").partition(SLOT)[0]
        identity = {"id": f"known-{record['known_id']}", "target_true": record["attribute"]}
        if text.startswith(before + subject):
            prompt = before + SLOT + text[len(before + subject) :]
            return Fact(subject=subject, prompt=prompt.rstrip(), relation=record.get("relation_id", ""), **identity)
        return Fact.typed(text=text, subject=subject, occurrence="first", **identity)
