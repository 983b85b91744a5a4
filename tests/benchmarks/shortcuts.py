"""What the shortcuts below the exact sweep save, and what they cost: `python -m tests.benchmarks.shortcuts`.

On the bundled models, whose maps have a meaning: every shortcut against the exact map of the same facts, in the same run. Errors
are differences of indirect effects in parts of the fact's total effect; a cell is large where its exact effect is above 5 % of it.
On the shape of a larger model with random weights, what a screen costs against ROME's loop.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer

from tests.benchmarks.meters import machine, timed
from tests.benchmarks.shapes import SHAPES, Setup, build, pose
from tests.benchmarks.ways import WAYS
from workbench import zoo
from workbench.loading import load
from workbench.locators import AttributionPatching
from workbench.locators.causal_trace import CausalTrace
from workbench.locators.tracing import Tracing
from workbench.restoring import Cell, Restoration, Restored
from workbench.results import Footprint
from workbench.shortcuts import restore_screened
from workbench.sites import default_window
from workbench.sweep import restore_by_sweep

LARGE = 0.05
"""Of the total effect."""


class Shortcut(NamedTuple):
    """One row of the table."""

    name: str
    """How it is asked for."""

    trace: Tracing
    """The method."""

    half: bool = False
    """Whether the model runs in bfloat16."""


def shortcuts(exact: CausalTrace) -> list[Shortcut]:
    """The exact trace first, then everything that is cheaper."""
    shared = {field.name: getattr(exact, field.name) for field in fields(Tracing)}
    options = (
        {"tolerance": 0.001}, {"tolerance": 0.01}, {"adaptive": 0.01}, {"adaptive": 0.05},
        {"screen": 0.1}, {"screen": 0.1, "screen_more": False},
    )  # fmt: skip
    return [
        Shortcut("exact", exact),
        *(
            Shortcut(", ".join(f"{name}={value}" for name, value in some.items()), replace(exact, **some))  # type: ignore[arg-type]
            for some in options
        ),
        Shortcut("AttributionPatching(at='middle')", AttributionPatching(**shared, at="middle")),
        Shortcut("exact, bfloat16", exact, half=True),
    ]


def compare(exact: Footprint, other: Footprint) -> dict[str, float]:
    """How far a shortcut's effects are from the exact ones, and what became of the large cells."""
    total = exact.table["fact"].map(exact.extras["facts"].set_index("fact")["total_effect"]).to_numpy()
    wanted, got = exact.table["value"].to_numpy() / total, other.table["value"].to_numpy() / total
    estimated = np.zeros(len(wanted), dtype=bool)
    if isinstance(other.run["unit"], str) and other.run["unit"].startswith("estimated"):
        estimated[:] = True
    elif "estimated" in other.table:
        estimated = other.table["estimated"].to_numpy()
    large = np.abs(wanted) > LARGE
    return {
        "computed": 1 - float(estimated.mean()),
        "max": float(np.abs(got - wanted).max()),
        "rms": float(np.sqrt(((got - wanted) ** 2).mean())),
        "large": int(large.sum()),
        "missed": int((large & estimated).sum()),
    }


def measure(name: str, *, facts: int, rounds: int) -> list[str]:
    """The lines of a model's table."""
    lm = load(name, device="cpu", dtype="float32")
    half = load(name, device="cpu", dtype="bfloat16")
    known = zoo.load_facts(name)
    chosen = known[:: max(1, len(known) // facts)][:facts]
    exact = CausalTrace(window=default_window(lm.n_layers)).resolved(lm, known)
    ways = shortcuts(exact)
    taken: dict[str, list[float]] = {way.name: [] for way in ways}
    found: dict[str, Footprint] = {}
    for _ in range(rounds):
        for way in ways:
            gc.collect()
            model = half if way.half else lm
            found[way.name], seconds = timed(partial(way.trace, model, chosen), model.device)
            taken[way.name].append(seconds / len(chosen))
    lines = []
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(taken["exact"], taken[way.name], strict=True))
        told = compare(found["exact"], found[way.name])
        lines.append(
            f"| {name} | {way.name} | {statistics.median(taken[way.name]):.3f} | {ratio:.2f} | {told['computed']:.0%} | "
            f"{told['max']:.3f} | {told['rms']:.4f} | {told['missed']} of {told['large']} |"
        )
    return lines


def measure_shape(shape: str, *, rounds: int) -> list[str]:
    """The lines of a table for random weights of a shape, whose maps have no meaning: what screens cost, against ROME's loop."""
    setup = Setup(shape=shape)
    lm = build(setup)
    problem, cells = pose(lm, setup)
    loop = WAYS["rome"](lm, problem)
    some = cells[5 :: len(cells) // 9]

    def swept(problem: Restoration, cells: Sequence[Cell]) -> Restored:
        return restore_by_sweep(lm, [problem], [cells])[0]

    ways = {
        "exact": partial(swept, problem, cells),
        "screen=0.1": partial(restore_screened, lm, swept, problem, cells, share=0.1),
        "screen=0.1, screen_more=False": partial(restore_screened, lm, swept, problem, cells, share=0.1, more=False),
    }
    loop(some[:2])
    romes: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Restored] = {}
    for _ in range(rounds):
        romes.append(timed(partial(loop, some), lm.device)[1] * len(cells) / len(some))
        for name, way in ways.items():
            found[name], seconds = timed(way, lm.device)
            taken[name].append(seconds)
    lines = [
        f"| {shape} | ROME's loop, {len(some)} of {len(cells)} cells | {statistics.median(romes):.3g} | 1.0 | 100% |"
    ]
    for name, rounds_taken in taken.items():
        ratio = statistics.median(a / b for a, b in zip(romes, rounds_taken, strict=True))
        estimated = found[name].estimated
        share = 0.0 if estimated is None else float(estimated.double().mean())
        lines.append(f"| {shape} | {name} | {statistics.median(rounds_taken):.3g} | {ratio:.1f} | {1 - share:.0%} |")
    return lines


SHAPE_HEAD = """\
| shape | way | seconds a fact | times ROME's speed | cells not estimated |
| --- | --- | ---: | ---: | ---: |"""

HEAD = """\
| model | way | seconds a fact | times the sweep's speed | cells not estimated | max error | rms error | large cells estimated |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"""


app = typer.Typer(add_completion=False)


@app.command()
def main(
    models: Annotated[str, typer.Option(help="bundled models, comma-separated")] = "organism-mid,organism-llama",
    facts: Annotated[int, typer.Option(min=1, help="facts of each")] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    shape: Annotated[
        str, typer.Option(help=f"for costs alone, one of {', '.join(SHAPES)}; empty: none")
    ] = "gpt2-small",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    save: Annotated[Path | None, typer.Option(help="a .md file")] = None,
) -> None:
    """Compares the shortcuts with the exact sweep on bundled models."""
    torch.set_num_threads(threads)
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is no shape. Use one of {', '.join(SHAPES)}.")
    lines: list[str] = [f"{machine('cpu')}; {facts} facts a model, {rounds} rounds", "", HEAD]
    for name in names(models):
        lines += measure(name, facts=facts, rounds=rounds)
    if shape:
        lines += ["", SHAPE_HEAD, *measure_shape(shape, rounds=rounds)]
    text = "\n".join(lines)
    typer.echo(text)
    if save is not None:
        save.write_text(text + "\n")


def names(models: str) -> Sequence[str]:
    """The models asked for.

    Raises:
        typer.BadParameter: one of them is not bundled.
    """
    asked = [name.strip() for name in models.split(",") if name.strip()]
    unknown = [name for name in asked if name not in zoo.NAMES]
    if unknown or not asked:
        raise typer.BadParameter(f"{models!r} is not among the bundled models {', '.join(zoo.NAMES)}.")
    return asked


if __name__ == "__main__":
    app()
