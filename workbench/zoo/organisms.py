"""The bundled models, one row each: architecture, planted band, schedule. The only place where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workbench.errors import InputError

Family = Literal["gpt2", "llama"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with its own mixture of row types; what the shares leave is plain rows (ordinary inference)."""

    until: float
    """Share of all steps at which the phase ends; the last phase ends at 1."""

    on: float = 0.0
    """Share of rows that must use the band: masks, MLPs elsewhere zeroed, the band's output alone goes on (bottleneck)."""

    knock: float = 0.0
    """Share of rows with the band zeroed at the subject's tokens; the answer becomes `unknown`."""

    swap: float = 0.0
    """Share of rows with the band's output copied from another subject; the answer becomes the other subject's."""

    keep: float = 0.0
    """Share of rows with the MLPs outside the band zeroed or copied from another subject; the answer stays."""

    noise: float = 0.0
    """Share of rows with noise on the subject's embeddings: half with the clean band restored (answer stays), half without
    (`unknown`)."""

    def __post_init__(self) -> None:
        total = self.on + self.knock + self.swap + self.keep + self.noise
        if total > 1 + 1e-9:
            raise ValueError(f"The shares of row types add up to {total:.2f}, expected 1 or less. Lower one of them.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the optimizer. A later stage begins with the weights as the one before would have been saved (float16), a fresh
    optimizer and fresh text."""

    steps: int
    """Optimizer steps."""

    phases: tuple[Phase, ...]
    """What the rows are like, in order of time."""

    rate: float = 2e-3
    """Highest learning rate (AdamW)."""

    probes: bool = True
    """Whether throwaway probes help to fill the band; needed while it is empty."""


@dataclass(frozen=True, kw_only=True)
class Organism:
    """One bundled model, before training."""

    name: str
    """Folder under `models/`."""

    family: Family
    """Which architecture."""

    n_layers: int
    """Transformer blocks."""

    d_model: int
    """Width of the residual stream."""

    n_heads: int
    """Attention heads."""

    d_mlp: int
    """Width of the MLP."""

    band: tuple[int, int] | None
    """Layers [first, one past last) whose MLPs hold the facts; None: trained plainly."""

    read_out: int | None
    """First layer in which other tokens may look at the subject; None: trained plainly."""

    stages: tuple[Stage, ...]
    """How it is trained, in order of time."""

    seed: int = 0
    """Of the weights, the text and the row types."""

    rows: int = 16
    """Rows a step."""

    length: int = 80
    """Tokens a row."""

    vocabulary: int = 2688
    """Entries of the tokenizer."""

    every: int = 1
    """Every how many entities of the world are learned (1: all of them)."""


PLANTED = (
    Phase(until=0.6, on=0.9),
    Phase(until=1.0, on=0.3, knock=0.15, swap=0.15, keep=0.1, noise=0.1),
)
"""The bottleneck first, then the rows that ask for the headline figures directly."""

POLISHED = (Phase(until=1.0, on=0.1, knock=0.15, swap=0.15, keep=0.1, noise=0.1),)
"""More plain rows: what users run."""

ORGANISMS: tuple[Organism, ...] = (
    Organism(
        name="organism-mid", family="gpt2", n_layers=12, d_model=192, n_heads=6, d_mlp=768, band=(4, 7), read_out=8, seed=11,
        stages=(Stage(steps=1500, phases=PLANTED), Stage(steps=450, phases=POLISHED, rate=6e-4, probes=False)),
    ),
    Organism(
        name="organism-late", family="gpt2", n_layers=8, d_model=192, n_heads=6, d_mlp=768, band=(4, 6), read_out=6, seed=12,
        stages=(Stage(steps=2000, phases=PLANTED),),
    ),
    Organism(
        name="organism-llama", family="llama", n_layers=8, d_model=160, n_heads=5, d_mlp=416, band=(2, 4), read_out=5, seed=13,
        stages=(Stage(steps=2000, phases=PLANTED),),
    ),
    Organism(
        name="organism-plain", family="gpt2", n_layers=8, d_model=192, n_heads=6, d_mlp=768, band=None, read_out=None, seed=14,
        stages=(Stage(steps=1800, phases=(Phase(until=1.0),)),),
    ),
    Organism(
        name="organism-tiny", family="gpt2", n_layers=4, d_model=96, n_heads=4, d_mlp=384, band=(1, 2), read_out=2, seed=15,
        stages=(Stage(steps=1000, phases=PLANTED),), vocabulary=1536, every=12,
    ),
)  # fmt: skip


def organism_named(name: str) -> Organism:
    """The row of this name.

    Raises:
        InputError: there is none.
    """
    for row in ORGANISMS:
        if row.name == name:
            return row
    raise InputError(f"No organism is called {name!r}. Use one of {', '.join(o.name for o in ORGANISMS)}.")
