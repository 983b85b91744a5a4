"""Several ways to the three causal-trace maps of one fact, timed against each other: `python -m tests.benchmarks.sweep`.

In every round each way runs once, so that what else the machine does hits all of them. To the peers a cell is a forward pass
whatever its layer and token: some cells are timed and the time is multiplied (`--full` times all). The sweep is timed whole.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tests.benchmarks.floor import Sizes, floor_work
from tests.benchmarks.meters import costs, costs_apart, machine, product_rates, timed
from tests.benchmarks.shapes import SHAPES, Setup, build, pose
from tests.benchmarks.ways import SWEEPS, WAYS, passes
from workbench.restoring import Cell
from workbench.sites import default_window
from workbench.sweep import restore_by_sweep

log = logging.getLogger(__name__)

DEFAULT_SHAPES = "bundled,gpt2-small"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way on one shape."""

    shape: str
    way: str

    cells: int
    """In the three maps."""

    timed: int
    """Of them, how many were timed; where fewer, seconds and FLOPs are multiplied up."""

    rounds: tuple[float, ...]
    """Seconds for all cells, round by round."""

    flops: float
    """For all cells."""

    floor: float
    """FLOPs that no way can do without."""

    rates: Mapping[str, float]
    """FLOP/s of a plain matrix product on this machine by each library, in the same rounds."""

    difference: float | None
    """Largest difference of a score from ROME's, over the cells that both computed; None where ROME's loop did not run."""

    peak_mb: float | None
    """Most memory of a process that computes in this way, weights and libraries included; None where not measured."""

    extra_mb: float | None
    """How much of it was not there when it began."""

    @property
    def seconds(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)


def measure(
    setup: Setup, *, ways: Sequence[str], rounds: int, some: int, full: bool, memory: bool, whole: bool = False
) -> tuple[list[Row], str]:
    """All ways on one shape, and what the sweep says of its engine."""
    cost = {}
    for way in ways:  # before a model is here: two large ones may not fit
        cost[way] = costs_apart(setup, way, whole=whole and way == "rome") if memory else costs(setup, way)
        log.info("%s: counted the work of %s", setup.shape, way)
    lm = build(setup)
    problem, cells = pose(lm, setup)
    made = {way: WAYS[way](lm, problem) for way in ways}
    chosen = range(len(cells)) if full else _spread(len(cells), some)
    asked = {way: range(len(cells)) if way in SWEEPS else chosen for way in ways}
    for way in ways:  # the first run of anything is slow
        made[way]([cells[i] for i in _spread(len(cells), some)])
    scores: dict[str, dict[int, torch.Tensor]] = {}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        for library, rate in product_rates(lm.d_model, lm.device, lm.dtype).items():
            rates.setdefault(library, []).append(rate)
        for way in ways:
            found, seconds = timed(partial(made[way], [cells[i] for i in asked[way]]), lm.device)
            share = passes(way, len(asked[way]), setup.samples) / passes(way, len(cells), setup.samples)
            taken[way].append(seconds / share)
            scores[way] = dict(zip(asked[way], found.double().cpu(), strict=True))
        log.info("%s: round %d of %d", setup.shape, number + 1, rounds)
    least = floor_work(
        Sizes.of(lm),
        tokens=setup.tokens,
        first=setup.subject[0],
        samples=setup.samples,
        width=default_window(lm.n_layers),
    )
    rows = [
        Row(
            shape=setup.shape,
            way=way,
            cells=len(cells),
            timed=len(asked[way]),
            rounds=tuple(taken[way]),
            flops=cost[way]["flops"],
            floor=2 * sum(least.values()),
            rates={library: statistics.median(each) for library, each in rates.items()},
            difference=_difference(scores[way], scores["rome"]) if "rome" in ways else None,
            peak_mb=cost[way]["peak_mb"] if memory else None,
            extra_mb=cost[way]["peak_mb"] - cost[way]["before_mb"] if memory else None,
        )
        for way in ways
    ]
    return rows, restore_by_sweep(lm, [problem], [_first_of_each(cells)])[0].engine


def _spread(n: int, some: int) -> list[int]:
    """So many of n cells, over all kinds, tokens and layers: the middles of equal parts, each a little further in its layers."""
    return sorted({int((i + (i % 4) / 4) * n / some) % n for i in range(some)})


def _first_of_each(cells: Sequence[Cell]) -> list[Cell]:
    return list({cell.kind: cell for cell in cells}.values())


def _difference(scores: Mapping[int, torch.Tensor], others: Mapping[int, torch.Tensor]) -> float:
    return max(float((scores[i] - others[i]).abs().max()) for i in scores.keys() & others.keys())


# --- the table ---


HEAD = (
    "shape", "way", "seconds (range)", "times ROME's speed", "sweep is faster by", "peak MB (of ROME's)",
    "extra MB (of ROME's)", "TFLOP", "work / floor", "of matmul rate", "max diff.", "cells timed",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """The rows in markdown."""
    lines = [_line(HEAD), _line(["---", "---", *["---:"] * (len(HEAD) - 2)])]
    for row in rows:
        others = {other.way: other for other in rows if other.shape == row.shape}
        rome, sweep = others.get("rome"), others.get("sweep")
        timed = f"{row.timed} of {row.cells}" if row.timed < row.cells else f"all {row.cells}"
        lines.append(
            _line([
                row.shape,
                row.way,
                f"{row.seconds:.3g} ({min(row.rounds):.3g}-{max(row.rounds):.3g})",
                _ratio(rome, row),
                _ratio(row, sweep),
                _megabytes(row.peak_mb, rome.peak_mb if rome else None),
                _megabytes(row.extra_mb, rome.extra_mb if rome else None),
                f"{row.flops / 1e12:.3g}",
                f"{row.flops / row.floor:.2f}",
                f"{row.flops / row.seconds / max(row.rates.values()):.0%}",
                "" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0",
                timed,
            ])
        )  # fmt: skip
    return "\n".join(lines)


def _ratio(slow: Row | None, fast: Row | None) -> str:
    """How many times faster, as the median over rounds of the ratio within a round."""
    if slow is None or fast is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)):.2f}"


def _megabytes(mine: float | None, rome: float | None) -> str:
    if mine is None:
        return ""
    return f"{mine:.0f} ({mine / rome:.2f})" if rome else f"{mine:.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


NOTES = """
Seconds for the three maps of one fact: the median of the rounds (and their range). Ratios are medians of the ratios within a round.
Where not all cells were timed, seconds and FLOPs are those of the timed ones times the number of cells. Peak: all memory of a
process that only does this (on a GPU: allocated by torch), the sweep's for all cells and the peers' for one of each map, with
--whole ROME's for all too; the extra is without weights, libraries and what is kept of the clean run. FLOPs are counted by
torch.utils.flop_counter; the floor is the least work that gives these maps (tests/benchmarks/floor.py). The matmul rate is that of
a plain (1024 x d) @ (d x 4d) in the same rounds, by the fastest library. Max diff.: largest difference of a probability from
ROME's. The peers compute products as torch does by default, and so does sweep_default_products; the sweep takes oneDNN where that
is faster (workbench/products.py), and so does rome_fast_products.
""".strip()


def report(rows: Sequence[Row], engines: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """Table, and what one has to know of it, in markdown."""
    shapes = dict.fromkeys(row.shape for row in rows)
    lines = [
        f"`{about['command']}`  ",
        f"{about['date']}, {about['machine']}  ",
        f"{about['tokens']} tokens, subject at {about['subject']}, {about['samples']} samples, {about['dtype']}  ",
        f"{about['rounds']} rounds, medians  ",
        f"sweep's engine: {', '.join(f'{engines[shape]} ({shape})' for shape in shapes)}  ",
        f"matmul rate in GFLOP/s: {'; '.join(_rates(rows, shape) for shape in shapes)}",
    ]
    return "\n".join([*lines, "", table(rows), "", NOTES, ""])


def _rates(rows: Sequence[Row], shape: str) -> str:
    rates = next(row.rates for row in rows if row.shape == shape)
    return f"{', '.join(f'{library} {rate / 1e9:.0f}' for library, rate in rates.items())} ({shape})"


def save(path: Path, rows: Sequence[Row], engines: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes the rows: as markdown, or with every round as JSON, as the name ends."""
    if path.suffix == ".json":
        everything = {**about, "engines": dict(engines), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    else:
        path.write_text(report(rows, engines, about), encoding="utf-8")


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{what} {', '.join(wrong)!r} is unknown. Use some of {','.join(known)}.")
    return names


def _span(text: str, tokens: int) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first) < tokens):
        raise typer.BadParameter(
            f"The subject is {text!r}, expected its first and last token, such as 1-3, below {tokens}."
        )
    return int(first), int(last or first)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help=f"some of {','.join(SHAPES)}")] = DEFAULT_SHAPES,
    peers: Annotated[str, typer.Option(help="what the sweep is compared with")] = ",".join(
        way for way in WAYS if way != "sweep"
    ),
    tokens: Annotated[int, typer.Option(help="length of the prompt", min=1)] = 10,
    subject: Annotated[str, typer.Option(help="first and last token of the subject")] = "1-3",
    samples: Annotated[int, typer.Option(help="noise samples", min=1)] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    cells: Annotated[int, typer.Option(help="cells of the peers to time", min=1)] = 9,
    full: Annotated[bool, typer.Option("--full", help="time all of them")] = False,
    memory: Annotated[bool, typer.Option(help="measure memory too, each way in a process of its own")] = True,
    whole: Annotated[bool, typer.Option("--whole", help="the memory of ROME's loop: over all its cells")] = False,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    save_to: Annotated[
        list[Path] | None, typer.Option("--save", help="a .md or .json file; may be given twice")
    ] = None,
) -> None:
    """Compares the sweep with other ways to get the same three maps of one fact, on models of random weights."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    for noisy in ("transformers", "httpx", "transformer_lens", "nnsight"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    chosen = _names(shapes, list(SHAPES), "The shape")
    ways = [*(_names(peers, list(WAYS), "The peer") if peers else []), "sweep"]
    ways = list(dict.fromkeys(ways))
    span = _span(subject, tokens)
    about = {
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine(device),
        "tokens": tokens,
        "subject": subject,
        "samples": samples,
        "dtype": dtype,
        "rounds": rounds,
    }
    rows: list[Row] = []
    engines: dict[str, str] = {}
    for shape in chosen:
        setup = Setup(shape=shape, tokens=tokens, subject=span, samples=samples, device=device, dtype=dtype)
        new, engines[shape] = measure(
            setup, ways=ways, rounds=rounds, some=cells, full=full, memory=memory, whole=whole
        )
        rows += new
        for path in save_to or ():  # after each shape: the next one may take long
            save(path, rows, engines, about)
    typer.echo(report(rows, engines, about))


def _command() -> str:
    """This command, without where its output was saved."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--save":
            next(words, None)
        elif not word.startswith("--save="):
            kept.append(word)
    return shlex.join(["python", "-m", "tests.benchmarks.sweep", *kept])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
