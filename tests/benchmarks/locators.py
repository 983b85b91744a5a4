"""How long each locating method takes for one fact of a bundled model: `python -m tests.benchmarks.locators`.

The baseline, in the same run: one forward pass of the prompt. Methods take their published defaults, with windows that fit the
model. What a method needs once for a model (a compiled copy, an index) is made in a first round, which is shown beside the others.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from tests.benchmarks.meters import machine, timed
from tests.benchmarks.shortcuts import names
from workbench import zoo
from workbench.errors import InputError
from workbench.facts import Fact
from workbench.hooks import run
from workbench.loading import load
from workbench.locators import all_locators, locator_named
from workbench.models import LM

HEAD = """\
| model | method | seconds a fact (range) | first fact | forward passes that take as long |
| --- | --- | ---: | ---: | ---: |"""


def measure(name: str, methods: Sequence[str], *, facts: int) -> list[str]:
    """The lines of a model's table."""
    lm, known = load(name, device="cpu", dtype="float32"), zoo.load_facts(name)
    chosen = known[:: max(1, len(known) // (facts + 1))][: facts + 1]
    for fact in chosen:  # the first passes of a model are slower, by what they set up
        _forward(lm, fact)
    once = statistics.median(_forward(lm, fact) for fact in chosen for _ in range(5))
    return [f"| {name} | {method} | {_method(lm, known, chosen, method, once)} |" for method in methods]


def _forward(lm: LM, fact: Fact) -> float:
    return timed(partial(run, lm, lm.encode([fact])), lm.device)[1]


def _method(lm: LM, known: Sequence[Fact], chosen: Sequence[Fact], method: str, once: float) -> str:
    """One method's cells; the reason where it cannot run."""
    try:
        locator = locator_named(method).fitted(lm).resolved(lm, known)
        taken = []
        for fact in chosen:
            gc.collect()
            taken.append(timed(partial(locator, lm, [fact]), lm.device)[1])
    except InputError as error:
        return f"{error} | | "
    first, *others = taken
    middle = statistics.median(others)
    return f"{middle:.2f} ({min(others):.2f}-{max(others):.2f}) | {first:.2f} | {middle / once:.0f}"


def main(
    models: Annotated[str, typer.Option(help="bundled models, comma-separated")] = ",".join(zoo.NAMES),
    methods: Annotated[str, typer.Option(help="locating methods, comma-separated; default: all")] = "",
    facts: Annotated[int, typer.Option(min=1, help="facts after the first one")] = 4,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    save: Annotated[Path | None, typer.Option(help="a .md file")] = None,
) -> None:
    """Times every locating method on single facts of the bundled models."""
    asked = [name.strip() for name in methods.split(",") if name.strip()] or list(all_locators())
    unknown = [name for name in asked if name not in all_locators()]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} is no locating method. Use {', '.join(all_locators())}.")
    bundled = names(models)
    torch.set_num_threads(threads)
    lines = [f"{machine('cpu')}; {facts} facts after the first, {threads} threads", "", HEAD]
    for name in bundled:
        lines += measure(name, asked, facts=facts)
    text = "\n".join(lines)
    typer.echo(text)
    if save is not None:
        save.write_text(text + "\n")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)


if __name__ == "__main__":
    app()
