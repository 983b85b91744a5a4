"""Where the sweep's time goes: `python -m tests.benchmarks.profile`.

Every operation that torch runs is labelled by whose weights it touches, and torch.profiler times the labels. What is left of the
wall-clock time of a run without profiler is overhead: Python, and torch's way to its kernels. On a busy machine, where the run with
the profiler may be slowed down more than those without, that is too little.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.benchmarks.meters import machine, timed
from tests.benchmarks.shapes import SHAPES, Setup, build, pose
from tests.benchmarks.ways import WAYS
from workbench.models import LM

GROUPS = ("attention", "projections", "MLP", "unembedding", "norms and elementwise", "copies", "overhead")

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_linear_pointwise", "einsum")
_COPIES = (
    "cat", "stack", "copy_", "clone", "_to_copy", "index", "index_put_", "index_select", "gather", "repeat",
    "repeat_interleave", "embedding", "contiguous", "reshape", "flatten", "to",
)  # fmt: skip


@dataclass(eq=False)
class _Labels(TorchDispatchMode):
    """Runs every operation under a label of the profiler."""

    roles: Mapping[int, str]
    """By place in memory, what a weight is for."""

    ops: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By group, how often each operation was found in it."""

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if op.is_view and name not in _COPIES:  # no work but torch's own
            return op(*args, **(kwargs or {}))
        group = self._group(name, args)
        self.ops[group][name] += 1
        with record_function(group):
            return op(*args, **(kwargs or {}))

    def _group(self, name: str, args: Any) -> str:
        if "scaled_dot_product" in name or "softmax" in name:
            return "attention"
        if name in _PRODUCTS:
            places = [_place(x) for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            return next((self.roles[place] for place in places if place in self.roles), "attention")
        return "copies" if name in _COPIES else "norms and elementwise"


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _roles(lm: LM) -> dict[int, str]:
    """What each matrix is for, by its place in memory."""
    roles: dict[int, str] = {}

    def note(module: nn.Module, role: str) -> None:
        roles.update({_place(weight): role for weight in module.parameters()})

    for layer in range(lm.n_layers):
        note(lm.part(layer, lm.layout.attn), "projections")
        note(lm.part(layer, lm.layout.mlp_out), "MLP")
    note(lm.unembed, "unembedding")
    return roles


def shares(lm: LM, call: Callable[[], Any], *, runs: int) -> tuple[dict[str, float], float, Mapping[str, Counter[str]]]:
    """Seconds by group, seconds of a run without profiler (the median), and the operations of each group."""
    call()
    whole = statistics.median(timed(call, lm.device)[1] for _ in range(runs))
    on_gpu = lm.device.type == "cuda"
    labels = _Labels(_roles(lm))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler, labels:
        call()
    events = {event.key: event for event in profiler.key_averages()}
    found = {
        group: (events[group].device_time_total if on_gpu else events[group].cpu_time_total) / 1e6
        for group in GROUPS
        if group in events
    }
    return {**found, "overhead": max(0.0, whole - sum(found.values()))}, whole, labels.ops


def report(found: Mapping[str, float], whole: float, ops: Mapping[str, Counter[str]]) -> str:
    """Groups and their shares, as lines of markdown."""
    total = sum(found.values())
    lines = ["| part | seconds | share | operations |", "| --- | ---: | ---: | --- |"]
    for group in GROUPS:
        if group in found:
            names = [name for name, _ in ops.get(group, Counter()).most_common()]
            listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            lines.append(f"| {group} | {found[group]:.3g} | {found[group] / total:.1%} | {listed} |")
    return "\n".join([*lines, f"| whole run, without profiler | {whole:.3g} | | |"])


app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: Annotated[str, typer.Option(help=f"one of {', '.join(SHAPES)}")] = "gpt2-small",
    way: Annotated[str, typer.Option(help=f"one of {', '.join(WAYS)}; all but the sweep on 9 cells")] = "sweep",
    tokens: int = 10,
    subject: Annotated[str, typer.Option(help="first and last token of the subject")] = "1-3",
    samples: int = 10,
    runs: Annotated[int, typer.Option(help="runs without profiler", min=1)] = 3,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prints which share of a run goes where."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    first, last = (int(x) for x in subject.split("-"))
    lm = build(Setup(shape=shape, device=device, dtype=dtype))
    problem, cells = pose(
        lm, Setup(shape=shape, tokens=tokens, subject=(first, last), samples=samples, device=device, dtype=dtype)
    )
    made = WAYS[way](lm, problem)
    some = cells if way == "sweep" else cells[:: len(cells) // 9]
    found, whole, ops = shares(lm, lambda: made(some), runs=runs)
    typer.echo(f"{way} on {shape}, {len(some)} cells, {machine(device)}\n\n{report(found, whole, ops)}")


if __name__ == "__main__":
    app()
