"""What a step of a search for a value costs, of whose prompts only the blocks above the edited one are run: `python -m
tests.benchmarks.value_search`.

The baseline, in the same run: the same step through the whole model, with the logits of all tokens. A step is a forward pass of 21
contexts of 15 tokens, as ROME takes them, and the gradient of the answer's log-probability for a delta at `mlp_out`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from tests.benchmarks.meters import machine, timed
from tests.benchmarks.shapes import SHAPES, Setup, build, pose
from workbench.above import Above
from workbench.hooks import run
from workbench.models import LM, Tokens
from workbench.sites import Site

CONTEXTS, LENGTH, ANSWER = 21, 15, 7
"""How many contexts, their tokens, and the token whose probability is raised."""

HEAD = """\
| shape | layer of | ms a step, whole model | ms a step, from the layer on | ratio | largest difference of the gradients |
| --- | --- | ---: | ---: | ---: | ---: |"""


def measure(shape: str, *, rounds: int) -> list[str]:
    """The lines of a model's table: layers at the first third, the middle, and seven eighths."""
    setup = Setup(shape=shape, tokens=LENGTH)
    lm = build(setup)
    tokens = pose(lm, setup)[0].clean.repeat(CONTEXTS)
    return [
        _line(lm, shape, tokens, layer, rounds) for layer in (lm.n_layers // 3, lm.n_layers // 2, 7 * lm.n_layers // 8)
    ]


def _line(lm: LM, shape: str, tokens: Tokens, layer: int, rounds: int) -> str:
    delta = torch.zeros(lm.d_model, device=lm.device, requires_grad=True)
    above, rows = Above(lm, tokens, layer), torch.arange(len(tokens), device=lm.device)

    def add(x: Tensor) -> Tensor:
        return x + delta.to(x)

    def whole() -> Tensor:
        return run(lm, tokens, write={Site(layer=layer, kind="mlp_out"): add}, grad=True).logits[rows, tokens.last]

    def part() -> Tensor:
        return above.logits(rows, tokens.last, write={"mlp_out": add})

    def step(logits: Callable[[], Tensor]) -> Tensor:
        (slope,) = torch.autograd.grad(logits().float().log_softmax(-1)[:, ANSWER].mean(), [delta])
        return slope

    slopes = [step(whole), step(part)]
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):  # in turn, so that what else the machine does meets both
        for seconds, way in zip(taken, (whole, part), strict=True):
            seconds.append(timed(partial(step, way), lm.device)[1])
    slow, fast = (1e3 * statistics.median(seconds) for seconds in taken)
    off = float((slopes[1] - slopes[0]).norm() / slopes[0].norm())
    return f"| {shape} | {layer} of {lm.n_layers} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} | {off:.0e} |"


def main(
    shapes: Annotated[str, typer.Option(help="comma-separated")] = "bundled,gpt2-small,gpt2-medium",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    save: Annotated[Path | None, typer.Option(help="a .md file")] = None,
) -> None:
    """Times a step of a search for a value, through the whole model and from the edited block on."""
    asked = [name.strip() for name in shapes.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in SHAPES]:
        raise typer.BadParameter(f"{', '.join(unknown)} is no shape. Use {', '.join(SHAPES)}.")
    torch.set_num_threads(threads)
    text = "\n".join([machine("cpu"), "", HEAD, *(line for name in asked for line in measure(name, rounds=rounds))])
    typer.echo(text)
    if save is not None:
        save.write_text(text + "\n")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)


if __name__ == "__main__":
    app()
