"""What differs between two checkpoints: read piece by piece, so that neither model is ever held in memory.

Both may be folders of safetensors or of PyTorch's `.bin` files, sharded or not; the edited one also a folder with a PEFT adapter of
the LoRA kind (Hu et al. 2021, arXiv 2106.09685), with the whole tensors that PEFT saves beside it. Names are matched with or
without a leading `model.`, `transformer.` or the like, since libraries differ in them.

For each tensor: the Frobenius norm of the change, its share of the base's, and from a random sketch of 32 directions (Halko et al.
2011, arXiv 0909.4061) how much of the change few directions hold. A change whose sketch holds all of it has at most that rank.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workbench.charts import CellPlot, Chart
from workbench.errors import InputError
from workbench.progress import track
from workbench.results import Result, manifest

SKETCH = 32
"""Directions of the sketch."""

AT_ONCE = 2**24
"""Numbers of a tensor that are read together."""

HELD = 1 - 1e-6
"""Share of the change from which on the sketch is said to hold all of it."""

FEW = 0.25
"""A change of at most this part of its full rank is of low rank."""


class DiffError(InputError):
    """Checkpoints that cannot be compared; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """The tensors of a folder, read when they are asked for."""

    folder: Path
    """Where they lie."""

    shapes: Mapping[str, tuple[int, ...]]
    """By name."""

    rows: Callable[[str, int, int], Tensor]
    """Of a tensor by name, the rows from the first to before the second number; a tensor without dimensions has one."""

    added: Callable[[str, int, int], Tensor | None] = lambda _name, _first, _stop: None
    """What stands beside these rows and is added to them, in float32 and never rounded to their dtype; None: nothing."""


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """A folder of weights.

    Raises:
        DiffError: there are none, or a file is damaged.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise DiffError(
            f"{str(folder)!r} holds no weights, expected *.safetensors or pytorch_model*.bin. Name a folder of a checkpoint."
        )
    try:
        if files[0].suffix == ".bin":
            loaded = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
            tensors = {name: tensor for part in loaded for name, tensor in part.items()}
            return Checkpoint(
                folder=folder,
                shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
                rows=lambda name, first, stop: torch.atleast_1d(tensors[name])[first:stop],
            )
        places, shapes = {}, {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    places[name], shapes[name] = file, tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise DiffError(f"A file of {str(folder)!r} cannot be read: {error}. Load the checkpoint anew.") from error

    def rows(name: str, first: int, stop: int) -> Tensor:
        with safe_open(places[name], framework="pt") as opened:
            part: Tensor = opened.get_slice(name)[first:stop] if shapes[name] else opened.get_tensor(name)[None]
            return part

    return Checkpoint(folder=folder, shapes=shapes, rows=rows)


def diff_checkpoints(base: Path | str, edited: Path | str, *, seed: int = 0) -> Result:
    """Every tensor that both have, and how it changed.

    Args:
        base: folder of the model before.
        edited: folder of the model after, or of a LoRA adapter.
        seed: of the sketch.

    Returns:
        One row a tensor in the base's order: `tensor`, `layer` (0-based, -1 outside of the blocks), `module`, `shape`, `changed`,
        `norm`, `base_norm`, `relative` (|dW| / |W|), `largest` (of |dW|'s entries), `cosine`, `sketch` (share of |dW|^2 in its best
        32 directions), `rank` (where those hold all of it, else missing), `stable_rank`, `top_rows` and `top_columns` (share of
        |dW|^2 in the 5 most changed). Where dtypes differ, what rounding to the coarser one explains does not count; what an
        adapter adds is never rounded. The manifest has `verdict`, and `only_base` and `only_edited`: tensors without a
        counterpart.

    Raises:
        DiffError: nothing to compare: no weights, other shapes, or no name in common; or an adapter that does more than to add
            products of two matrices to its model's weights, or to replace tensors of it.
    """
    first = open_checkpoint(base)
    adapter = _adapter(Path(edited), first)
    second = adapter or open_checkpoint(edited)
    pairs = _paired(first.shapes, second.shapes)
    if not pairs:
        raise DiffError(
            f"No tensor of {str(base)!r} has a counterpart in {str(edited)!r}, e.g. {next(iter(first.shapes))!r} and "
            f"{next(iter(second.shapes))!r}. Name two checkpoints of one model."
        )
    for name, other in pairs.items():
        if first.shapes[name] != second.shapes[other]:
            raise DiffError(
                f"{name} has shape {first.shapes[name]} in the base and {second.shapes[other]} in the edited model. "
                "Name two checkpoints of one model."
            )
    rows = [_row(first, second, name, other, seed) for name, other in track(pairs.items(), "tensors", len(pairs))]
    table = pd.DataFrame(rows)
    table["rank"] = table["rank"].astype("Int64")
    run = manifest(
        "Checkpoint diff", model={}, parameters={"base": str(base), "edited": str(edited), "seed": seed}, facts=(),
        verdict=verdict(table), adapter=adapter is not None,
        only_base=sorted(set(first.shapes) - set(pairs)),
        only_edited=[] if adapter else sorted(set(second.shapes) - set(pairs.values())),
    )  # fmt: skip
    return Result(table=table, run=run)


def chart(result: Result) -> Chart:
    """What changed where: |dW| / |W| of every module of the blocks, by layer (0-based).

    Raises:
        DiffError: neither checkpoint has blocks with numbered layers.
    """
    table = result.table[result.table["layer"] >= 0]
    if table.empty:
        raise DiffError(
            "No tensor belongs to a numbered layer, so there is nothing to draw by layer. Look at the table."
        )
    squares = table.assign(new=table["norm"] ** 2, old=table["base_norm"] ** 2)
    sums = squares.groupby(["module", "layer"], sort=False)[["new", "old"]].sum()
    values = (sums["new"] / sums["old"].where(sums["old"] > 0)).pow(0.5).unstack("layer").sort_index(axis=1)
    outside = int((result.table["changed"] & (result.table["layer"] < 0)).sum())
    return Chart(
        title="What differs between the checkpoints",
        plots=(
            CellPlot(values=values, name="|ΔW| / |W|", row_title="Module", column_title="Layer (0-based)", low=0.0),
        ),
        caption=f"{result.run['verdict']} Outside of the blocks, {outside} tensors changed. Layers count from 0.",
    )


def verdict(table: pd.DataFrame) -> str:
    """What kind of change it is, in a sentence; only matrices are judged by their rank."""
    broken = table[~np.isfinite(table["norm"].astype(float))]
    if not broken.empty:
        told = verdict(table.drop(index=broken.index)) if len(broken) < len(table) else ""
        where = f"in {len(broken)} of {len(table)} tensors, e.g. {broken['tensor'].iloc[0]}"
        return f"{told} Not compared, since there is NaN or infinity: {where}.".strip()
    changed = table[table["changed"]]
    if changed.empty:
        return f"Nothing changed: all {len(table)} tensors are equal."
    matrices = changed[changed["shape"].map(len) == 2]
    if matrices.empty or not all(map(_is_low, matrices["rank"], matrices["shape"])):
        where = _where(changed, table)
        if changed.loc[changed["layer"] >= 0, "layer"].nunique() == 1:
            return f"A dense change of one layer: {where}."
        return f"A dense change, as fine-tuning leaves: {where}."
    most, rest = int(matrices["rank"].max()), changed.drop(index=matrices.index)
    kind = "rank-one edit" if most == 1 else f"low-rank change (at most {most})"
    if len(matrices) == 1 and matrices["layer"].iloc[0] >= 0:
        told = f"A single matrix changed by a {kind}: {matrices['tensor'].iloc[0]}."
    else:
        told = f"A {kind} of {_where(matrices, table)}."
    if rest.empty:
        return told
    return f"{told} Changed beside it, and no matrix: {_where(rest, table)}, e.g. {rest['tensor'].iloc[0]}."


def _is_low(rank: Any, shape: list[int]) -> bool:
    """Whether a change of a matrix is of clearly lower rank than its shape allows."""
    full = min(shape)
    return not pd.isna(rank) and rank < full and (rank == 1 or rank <= FEW * full)


def _where(rows: pd.DataFrame, table: pd.DataFrame) -> str:
    layers = sorted(set(rows.loc[rows["layer"] >= 0, "layer"]))
    return f"{len(rows)} of {len(table)} tensors, in {_layer_words(layers)}"


def _layer_words(layers: list[int]) -> str:
    if not layers:
        return "no block"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]} to {layers[-1]}" if whole else f"layers {', '.join(map(str, layers))}"


def _row(first: Checkpoint, second: Checkpoint, name: str, other: str, seed: int) -> dict[str, Any]:
    """One tensor, in two walks over its rows: one for norms and the sketch, one for what the sketch's directions hold."""
    shape = first.shapes[name]
    width = int(np.prod(shape[1:]))
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(width, SKETCH, generator=generator) if len(shape) == 2 else None
    old = new = change = inner = largest = 0.0
    sketched, by_row, by_column = [], [], torch.zeros(width, dtype=torch.float64)
    for before, delta in _pieces(first, second, name, other):
        squares = delta.double() ** 2
        old, change = old + float((before.double() ** 2).sum()), change + float(squares.sum())
        new, inner = (
            new + float(((before + delta).double() ** 2).sum()),
            inner + float((before * (before + delta)).double().sum()),
        )
        largest = max(largest, float(delta.abs().max()) if delta.numel() else 0.0)
        by_row.append(squares.sum(1))
        by_column += squares.sum(0)
        if probe is not None:
            sketched.append(delta @ probe)
    found = re.search(r"\.(\d+)\.(.+?)(\.\w+)?$", f".{name}")
    row = {
        "tensor": name, "layer": int(found[1]) if found else -1, "module": found[2] if found else name, "shape": list(shape),
        "changed": change > 0,
        "norm": change**0.5, "base_norm": old**0.5, "relative": (change / old) ** 0.5 if old else float("nan"), "largest": largest,
        "cosine": inner / (old * new) ** 0.5 if old and new else float("nan"), "sketch": float("nan"), "rank": None,
        "stable_rank": float("nan"), "top_rows": float("nan"), "top_columns": float("nan"),
    }  # fmt: skip
    if not np.isfinite(change):
        return {**row, "changed": True}
    if change == 0 or probe is None:
        return row
    basis = torch.linalg.qr(torch.cat(sketched)).Q.double()
    held, start = torch.zeros(basis.shape[1], width, dtype=torch.float64), 0
    for _, delta in _pieces(first, second, name, other):
        held += basis[start : start + len(delta)].T @ delta.double()
        start += len(delta)
    values = torch.linalg.svdvals(held)
    share = float((values**2).sum()) / change
    rank = int((values > values[0] * 1e-4).sum())
    return {
        **row, "sketch": min(share, 1.0), "stable_rank": change / float(values[0] ** 2),
        "rank": rank if share > HELD and rank < SKETCH else None,
        "top_rows": float(torch.cat(by_row).topk(min(5, shape[0])).values.sum()) / change,
        "top_columns": float(by_column.topk(min(5, width)).values.sum()) / change,
    }  # fmt: skip


def _pieces(first: Checkpoint, second: Checkpoint, name: str, other: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the base, and by how much they changed; float32, (row, everything else)."""
    shape = first.shapes[name]
    n = shape[0] if shape else 1
    step = max(1, AT_ONCE // max(1, int(np.prod(shape[1:]))))
    for start in range(0, n, step):
        before, after = first.rows(name, start, start + step), second.rows(other, start, start + step)
        if (
            before.dtype != after.dtype and before.is_floating_point() and after.is_floating_point()
        ):  # what rounding explains is no change
            coarser = min(before.dtype, after.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
            before, after = before.to(coarser), after.to(coarser)
        old = before.float().reshape(len(before), -1)
        delta, added = after.float().reshape(len(after), -1) - old, second.added(other, start, start + step)
        yield old, delta if added is None else delta + added


_PREFIX = re.compile(r"^(base_model\.model\.|module\.|transformer\.|model\.|gpt_neox\.)+")


def _paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, str]:
    """By the base's name, the edited one's, as far as both have a tensor."""
    bare = {_PREFIX.sub("", name): name for name in second}
    found = {name: name if name in second else bare.get(_PREFIX.sub("", name)) for name in first}
    return {name: other for name, other in found.items() if other is not None}


_OTHER_KINDS = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens",
    "layer_replication",
)  # fmt: skip
"""Settings of PEFT with which an adapter does something else than to add B A to weights."""

_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where PEFT changes the model's own weights before it puts the adapter on them."""


@dataclass(frozen=True, kw_only=True)
class _Product:
    """What LoRA adds to one matrix: scale * B A."""

    a: str
    """Name of A, (rank, in)."""

    b: str
    """Name of B, (out, rank)."""

    scale: float
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""

    turned: bool
    """Whether the model keeps the matrix as (in, out)."""


def _adapter(folder: Path, base: Checkpoint) -> Checkpoint | None:
    """The base with a LoRA adapter on it; None where the folder holds none.

    Raises:
        DiffError: an adapter of another kind, or for another model.
    """
    if not (folder / "adapter_config.json").is_file():
        return None
    config, parts = _lora_config(folder), open_checkpoint(folder)
    bare = {_PREFIX.sub("", name): name for name in base.shapes}
    products = _products(config, parts, base=base, bare=bare)
    used = {name for product in products.values() for name in (product.a, product.b)}
    whole: dict[str, str] = {}
    for name in (name for name in parts.shapes if name not in used):
        plain = name.replace(".base_layer.", ".")
        target = bare.get(_PREFIX.sub("", plain), "")
        if parts.shapes[name] != base.shapes.get(target) or (plain == name and target in products):
            raise DiffError(
                f"The adapter in {str(folder)!r} holds {name}, expected pairs of lora_A and lora_B and whole tensors in the place "
                f"of some of {str(base.folder)!r}. Merge it into its model first, and name that folder."
            )
        whole[target] = name

    def rows(name: str, first: int, stop: int) -> Tensor:
        return parts.rows(whole[name], first, stop) if name in whole else base.rows(name, first, stop)

    def added(name: str, first: int, stop: int) -> Tensor | None:
        if name not in products:
            return None
        one = products[name]
        a, b = (parts.rows(part, 0, parts.shapes[part][0]).float() for part in (one.a, one.b))
        return one.scale * (a.T[first:stop] @ b.T if one.turned else b[first:stop] @ a)

    return Checkpoint(folder=folder, shapes=dict(base.shapes), rows=rows, added=added)


def _lora_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of a plain LoRA adapter.

    Raises:
        DiffError: it cannot be read, or is of another kind.
    """
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DiffError(f"{str(file)!r} cannot be read: {error}. Save the adapter anew.") from error
    if not isinstance(config, dict):
        raise DiffError(f"{str(file)!r} holds a {type(config).__name__}, expected settings. Save the adapter anew.")
    if config.get("peft_type") != "LORA":
        raise DiffError(
            f"The adapter in {str(folder)!r} is of kind {config.get('peft_type')}, expected LORA. Merge it first."
        )
    start = config.get("init_lora_weights")
    other = [name for name in _OTHER_KINDS if config.get(name)]
    if isinstance(start, str) and start.lower().startswith(_OTHER_STARTS):
        other.append("init_lora_weights")
    if other:
        raise DiffError(
            f"The adapter in {str(folder)!r} has {other[0]} = {config[other[0]]!r}, expected plain LoRA. Merge it into its model "
            "first, and name that folder."
        )
    return config


def _products(
    config: Mapping[str, Any], parts: Checkpoint, *, base: Checkpoint, bare: Mapping[str, str]
) -> dict[str, _Product]:
    """By the base's names, what the adapter adds; alpha and rank of each by PEFT's own rules.

    Args:
        config: PEFT's.
        parts: the adapter's tensors.
        base: the model's.
        bare: by a name without its prefix, the base's name.

    Raises:
        DiffError: a pair that does not fit the base or the configuration.
    """
    found: dict[str, _Product] = {}
    turned: dict[str, bool] = {}
    for name, a_shape in parts.shapes.items():
        match = re.fullmatch(r"(.+)\.lora_A(?:\.default)?\.weight", name)
        if match is None:
            continue
        target = bare.get(_PREFIX.sub("", f"{match[1]}.weight"))
        if target is None:
            raise DiffError(
                f"The adapter changes {match[1]}, which {str(base.folder)!r} has not. Name its own model, or merge it first."
            )
        b_name = name.replace(".lora_A", ".lora_B")
        b_shape, wanted = parts.shapes.get(b_name, ()), base.shapes[target]
        shape = b_shape[:1] + a_shape[1:]
        if wanted not in (shape, shape[::-1]) or b_shape[1:] != a_shape[:1]:
            raise DiffError(
                f"The adapter's change of {target} has shape {shape}, expected {wanted}. Name its own model."
            )
        if shape != shape[::-1]:
            turned[target] = shape != wanted
        scale = _scale(config, match[1].removeprefix("base_model.model."), rank=a_shape[0], folder=parts.folder)
        found[target] = _Product(a=name, b=b_name, scale=scale, turned=False)
    # Shapes tell the orientation, and for square matrices those of the others; PEFT corrects its setting by the module's type too.
    ways = set(turned.values())
    square = ways.pop() if len(ways) == 1 else bool(config.get("fan_in_fan_out"))
    return {target: replace(product, turned=turned.get(target, square)) for target, product in found.items()}


def _scale(config: Mapping[str, Any], module: str, *, rank: int, folder: Path) -> float:
    """What a module's B A is multiplied with.

    The first pattern in the file that is the end of the module's path is taken, as in PEFT's `get_pattern_key`.

    Raises:
        DiffError: the configuration tells no alpha, or another rank.
    """

    def of_module(patterns: str, default: str) -> float:
        own = dict(config.get(patterns) or {})
        return float(next((n for key, n in own.items() if re.match(rf"(.*\.)?({key})$", module)), config[default]))

    try:
        alpha, told = of_module("alpha_pattern", "lora_alpha"), of_module("rank_pattern", "r")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, re.error) as error:
        raise DiffError(
            f"{str(folder / 'adapter_config.json')!r} tells no rank and scale of {module}. Save the adapter anew."
        ) from error
    if told != rank:
        raise DiffError(
            f"{str(folder / 'adapter_config.json')!r} tells rank {told:g} of {module}, whose matrices have {rank}. "
            "Save the adapter anew."
        )
    return scale
