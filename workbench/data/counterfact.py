"""`counterfact.json` of ROME: 21,919 facts, each with a false answer to edit in (arXiv 2202.05262, sec. 3.3)."""

from __future__ import annotations

from workbench.data.base import Reader, Record, texts
from workbench.facts import Fact, Probe


class CounterFact(Reader):
    """{case_id, requested_rewrite{prompt, relation_id, target_new, target_true, subject}, paraphrase_prompts, ...}"""

    name = "CounterFact"
    fields = frozenset({"case_id", "requested_rewrite"})

    def fact(self, record: Record) -> Fact:
        """One fact. Neighbors share the true answer, so it is theirs as well."""
        rewrite = record["requested_rewrite"]
        true = rewrite["target_true"]["str"].strip()
        neighbors = texts("neighborhood_prompts", record.get("neighborhood_prompts", []))
        return Fact(
            id=f"counterfact-{record['case_id']}",
            subject=rewrite["subject"],
            prompt=rewrite["prompt"],
            relation=rewrite.get("relation_id", ""),
            target_true=true,
            target_new=rewrite["target_new"]["str"].strip(),
            paraphrases=texts("paraphrase_prompts", record.get("paraphrase_prompts", [])),
            neighbors=tuple(Probe(prompt=prompt, target=true) for prompt in neighbors),
        )
