"""How good are edits: does the model say the new answer, also in other words, and does it leave the rest alone?

Each fact is edited alone and scored with the measures of ROME's evaluation (arXiv 2202.05262, section 3.4), on probabilities that
are the geometric mean over an answer's tokens under teacher forcing:

- `efficacy`, `paraphrase`: the new answer is more probable than the old one, after the prompt and after its paraphrases
- `said`, `said_paraphrase`: the new answer is what the model says, greedily
- `neighborhood`: after prompts of the same relation on other subjects, their own answer is more probable than the new one
- `neighborhood_same`, `other_same`: after these, and after other relations of the subject, the model says what it said before
- `entropy`: of the 2- and 3-grams of 60 tokens sampled after the prompt, weighed 2/3 and 4/3 and halved, in bits (GE, without the
  factor 100); it falls where a model repeats itself. `entropy_before` is that of the model without the edit
- `seconds`: for the edit; `peak_mb`: the process's peak memory so far

`python -m analyses.edit_quality --model organism-mid --edits 50 --out results/quality` makes the committed table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import log2
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from analyses.answers import is_said, log_p, next_tokens
from analyses.editing import fitted_editors
from workbench import zoo
from workbench.cli_parts import one_sentence, progress_bar
from workbench.editors import all_editors
from workbench.editors.base import Editor
from workbench.errors import InputError
from workbench.facts import Fact, spread
from workbench.generation import continue_prompts
from workbench.loading import load
from workbench.locators.base import peak_memory
from workbench.models import LM
from workbench.progress import track
from workbench.results import Result, manifest
from workbench.store import Store

MEASURES = (
    "efficacy",
    "paraphrase",
    "said",
    "said_paraphrase",
    "neighborhood",
    "neighborhood_same",
    "other_same",
    "entropy",
)
"""Columns of the table that are means over a fact's prompts; larger is better."""

_WHAT = "Edit quality"

SAMPLED = 60
"""Tokens of text whose entropy is taken."""


def edit_quality(lm: LM, facts: Sequence[Fact], editors: Mapping[str, Editor], *, store: Store | None = None) -> Result:
    """Edits every fact alone by every editor, and scores it.

    Args:
        lm: the model.
        facts: with `target_new`; paraphrases, neighbors and locality as far as they are there.
        editors: by label.
        store: where each editor's rows are kept and looked for, so that a stopped run goes on.

    Returns:
        One row an editor and fact with `MEASURES` (0 to 1, `entropy` in bits; NaN where a fact has no such prompts),
        `entropy_before`, `seconds` and `peak_mb`; `left_out` in the manifest: by editor and fact, why it could not be edited.

    Raises:
        InputError: no fact could be edited by any editor.
    """
    parts: list[Result] = []
    before: dict[str, dict[str, Any]] = {}
    for label, editor in editors.items():
        run_ = manifest(_WHAT, model=lm.protocol, parameters={label: repr(editor)}, facts=facts, left_out={})
        part = store.find(run_, Result) if store else None
        if part is None:
            part = _of_one(lm, facts, label, editor, run_, before)
            if store:
                store.save(part)
        parts.append(part)
    left_out = {what: why for part in parts for what, why in part.run["left_out"].items()}
    table = pd.concat([part.table for part in parts if len(part.table)] or [pd.DataFrame()], ignore_index=True)
    if table.empty:
        raise InputError(f"No fact could be edited. The first: {next(iter(left_out.values()), 'none was given')}")
    run_ = manifest(
        _WHAT, model=lm.protocol, parameters={label: repr(editor) for label, editor in editors.items()},
        facts=facts, left_out=left_out,
    )  # fmt: skip
    return Result(table=table, run=run_)


def _of_one(
    lm: LM, facts: Sequence[Fact], label: str, editor: Editor, run_: dict[str, Any], said: dict[str, dict[str, Any]]
) -> Result:
    """The rows of one editor; what the model says without an edit is kept in `said`."""
    rows, left_out = [], {}
    for fact in track(facts, "facts", len(facts)):
        try:
            edit = editor(lm, [fact])
        except InputError as error:
            left_out[f"{label}: {fact.id}"] = str(error)
            continue
        before = said[fact.id] = said.get(fact.id) or _said(lm, fact)
        with edit.on(lm):
            after = _said(lm, fact)
            scored = {
                "efficacy": wins(lm, [fact.text], fact.target_new, fact.target_true),
                "paraphrase": wins(lm, fact.paraphrases, fact.target_new, fact.target_true),
                "said": says(lm, [fact.text], fact.target_new),
                "said_paraphrase": says(lm, fact.paraphrases, fact.target_new),
                "neighborhood": _mean(
                    [
                        wins(lm, [p.prompt], p.target, fact.target_new)
                        for p in fact.neighbors
                        if p.target != fact.target_new
                    ]
                ),
                "neighborhood_same": _same(before["neighbors"], after["neighbors"]),
                "other_same": _same(before["locality"], after["locality"]),
                "entropy": after["entropy"],
            }
        rows.append({
            "editor": label, "fact": fact.id, **scored, "entropy_before": before["entropy"],
            "seconds": edit.run["seconds"], "peak_mb": peak_memory(lm),
        })  # fmt: skip
    return Result(table=pd.DataFrame(rows), run={**run_, "left_out": left_out})


def summary(result: Result) -> pd.DataFrame:
    """Means over facts by editor, in the order of the table."""
    columns = [*MEASURES, "entropy_before", "seconds"]
    means = result.table.groupby("editor", sort=False).agg(**{c: (c, "mean") for c in columns}, facts=("fact", "size"))
    means["peak_mb"] = result.table.groupby("editor", sort=False)["peak_mb"].max()
    table: pd.DataFrame = means.reset_index()
    return table


def markdown(result: Result) -> str:
    """The summary as a table for a document."""
    table = summary(result)
    digits = {"seconds": 2, "peak_mb": 0, "facts": 0}
    lines = ["| " + " | ".join(table.columns) + " |", "|---" + "|--:" * (len(table.columns) - 1) + "|"]
    for row in table.itertuples(index=False):
        cells = [
            str(value) if isinstance(value, str) else f"{value:.{digits.get(name, 2)}f}" if value == value else ""
            for name, value in zip(table.columns, row, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def says(lm: LM, prompts: Sequence[str], answer: str | None) -> float:
    """How often all tokens of the answer are the most probable ones."""
    if not prompts or not answer:
        return float("nan")
    return float(np.mean(is_said(lm, prompts, [answer] * len(prompts))))


def wins(lm: LM, prompts: Sequence[str], first: str | None, second: str | None) -> float:
    """How often the first answer is more probable than the second."""
    if not prompts or not first or not second:
        return float("nan")
    n = len(prompts)
    found = log_p(lm, [*prompts, *prompts], [first] * n + [second] * n)
    return float((found[:n] > found[n:]).float().mean())


def _said(lm: LM, fact: Fact) -> dict[str, Any]:
    """What the model says now: next tokens after the probes, and how varied its text is."""
    text = continue_prompts(lm, [fact.text], n=SAMPLED, top_k=5)[0]
    return {
        "neighbors": next_tokens(lm, [probe.prompt for probe in fact.neighbors]),
        "locality": next_tokens(lm, [probe.prompt for probe in fact.locality]),
        "entropy": ngram_entropy(text),
    }


def _same(before: Sequence[int], after: Sequence[int]) -> float:
    return _mean([float(a == b) for a, b in zip(before, after, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def ngram_entropy(text: str) -> float:
    """(2/3 H_2 + 4/3 H_3) / 2 in bits, H_n the entropy of the words' n-grams; 0 for less than three words."""
    words = text.split()

    def entropy(n: int) -> float:
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        total = counts.total()
        return -sum(c / total * log2(c / total) for c in counts.values()) if total else 0.0

    return (2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str, typer.Option(help="Hub name, folder, or bundled model.")] = zoo.NAMES[0],
    edits: Annotated[int, typer.Option(min=1, help="How many facts, spread over those of the model.")] = 50,
    editors: Annotated[
        str, typer.Option(help="Editors, comma-separated, e.g. Rome,FineTune(stop_below=0.0); default: all.")
    ] = "",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Edits facts of a bundled model by every editor, one at a time, and prints how good the edits are."""
    with one_sentence():
        torch.set_num_threads(threads)
        names = [name.strip() for name in re.split(r",(?![^(]*\))", editors) if name.strip()] or list(all_editors())
        fitted_editors(None, names)
        lm, facts = load(model, dtype="float32"), [fact for fact in zoo.load_facts(model) if fact.target_new]
        chosen = spread(facts, edits)
        store = Store(folder=out / Path(model).name)
        with progress_bar(len(names) * len(chosen)):
            result = edit_quality(lm, chosen, fitted_editors(lm, names), store=store)
        store.save(result)
        typer.echo(markdown(result))
        for what, why in result.run["left_out"].items():
            typer.echo(f"left out: {what}: {why}", err=True)


if __name__ == "__main__":
    typer.run(main)
