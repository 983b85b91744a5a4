"""What an editor does to a model, as data: a change of named weights, and what stands beside modules or before prompts.

`with edit.on(lm):` applies it, and leaving undoes it bit for bit: the model's own parameter objects are put aside and put back,
never written to. Edits may be applied within each other and left in any order.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

from workbench.errors import InputError
from workbench.facts import Fact, Probe
from workbench.guard import editing
from workbench.hooks import beside, nothing_beside
from workbench.models import LM, Tokens, introduced, unintroduced
from workbench.registry import discover
from workbench.results import record

FORMAT = 1
"""Of the files that `Edit.save` writes."""


class EditError(InputError):
    """An edit that cannot be made or used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """A change of a matrix as a product, in the parameter's own orientation: rows @ columns.T."""

    rows: Float[Tensor, "n_rows rank"]
    """What is added along the rows."""

    columns: Float[Tensor, "n_columns rank"]
    """By how much in each column."""

    def __post_init__(self) -> None:
        if self.rows.ndim != 2 or self.columns.ndim != 2 or self.rows.shape[1] != self.columns.shape[1]:
            raise EditError(
                f"The parts of a low-rank change have shapes {tuple(self.rows.shape)} and {tuple(self.columns.shape)}, "
                "expected (rows, rank) and (columns, rank)."
            )

    @property
    def rank(self) -> int:
        """How many columns the parts have; the rank of the change is not larger."""
        return int(self.rows.shape[1])

    def dense(self) -> Float[Tensor, "n_rows n_columns"]:
        """The change as a matrix."""
        return self.rows @ self.columns.T


Change = Tensor | LowRank
"""What is added to a parameter, in its own shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Something that works beside the weights. Its fields are tensors or plain values; that is what is saved.

    Subclasses are `Memory` (beside a module) or `Introducing` (before prompts).
    """


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory(Side):
    """A memory beside a module, which may give another output in its place."""

    module: str
    """Path of the module in the model, e.g. `transformer.h.5.mlp.c_proj`."""

    @abstractmethod
    def __call__(
        self,
        module: nn.Module,
        x: Float[Tensor, "row pos d_in"],
        y: Float[Tensor, "row pos d_out"],
        tokens: Tokens | None,
    ) -> Float[Tensor, "row pos d_out"]:
        """The module's output with the memory: of its input `x`, its own output `y`, and the prompts where they are known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Introducing(Side):
    """Text before every prompt."""

    @abstractmethod
    def __call__(self, prompt: str) -> str:
        """What is put before a prompt; empty for nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A change of a model, as an editor made it. It holds no model.

    Raises:
        EditError: nothing is changed, or by something that is not finite.
    """

    base: str
    """`LM.weight_hash` of the model without any edit."""

    after: tuple[str, ...] = ()
    """Keys of the edits that were on the model when this one was made; it can only be applied where they are."""

    changes: Mapping[str, Change] = field(default_factory=dict)
    """What is added to which parameter, by its name in the model."""

    sides: tuple[Side, ...] = ()
    """What stands beside the weights."""

    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What an editor has to know when it goes on from here, by name; rows of several edits are put below each other."""

    facts: tuple[Fact, ...] = ()
    """What was edited, in order."""

    run: Mapping[str, Any] = field(default_factory=dict)
    """The manifest: editor, hyperparameters, model, versions, what the editor measured."""

    def __post_init__(self) -> None:
        if not self.changes and not self.sides:
            raise EditError("This edit changes nothing.")
        for name, change in self.changes.items():
            for part in (change.rows, change.columns) if isinstance(change, LowRank) else (change,):
                if not bool(torch.isfinite(part).all()):
                    raise EditError(f"The change of {name} is not finite. Try smaller steps, or float32.")

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that name this very change."""
        digest = hashlib.blake2b(f"{self.base} {self.after}".encode(), digest_size=8)
        tensors, described = _taken_apart(self)
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """The editor that made it, with its hyperparameters."""
        return str(self.run.get("label", "an edit"))

    @contextmanager
    def on(self, lm: LM) -> Iterator[None]:
        """Within, the model is edited; other threads wait for it meanwhile.

        Raises:
            EditError: the edit was made on other weights, or on top of edits that are not there.
        """
        with editing(lm.model):
            self.check(lm)
            if lm.model not in _applied:
                _applied[lm.model] = _Applied(base=lm.weight_hash, hashed=lm._hashed)
            applied = _applied[lm.model]
            applied.edits.append(self)
            try:
                _renew(lm, applied, self.changes)
                memories = [(side.module, _bound(lm, side)) for side in self.sides if isinstance(side, Memory)]
                texts = [side for side in self.sides if isinstance(side, Introducing)]
                with beside(lm, memories), introduced(lm, texts):
                    yield
            finally:
                applied.edits.remove(self)
                _renew(lm, applied, self.changes)
                if not applied.edits:
                    del _applied[lm.model]
                    lm._hashed = applied.hashed  # the weights are those again, and need not be hashed again

    def check(self, lm: LM) -> None:
        """Raises EditError where the edit does not belong to this model as it is now."""
        here = base_of(lm)
        if here != self.base:
            raise EditError(
                f"This edit was made on weights {self.base}, and {lm.name} has {here}. "
                "Load the model that it was made on, or make it again on this one."
            )
        there = {edit.key for edit in edits_on(lm)} if self.after else set()
        if missing := [key for key in self.after if key not in there]:
            raise EditError(
                f"This edit was made on top of {len(self.after)} other edit(s), of which {', '.join(missing)} is not applied. "
                "Apply the earlier edits first, or add them up: first + this."
            )
        modules, parameters = dict(lm.model.named_modules()), dict(lm.model.named_parameters())
        for side in self.sides:
            if isinstance(side, Memory) and side.module not in modules:
                raise EditError(f"{lm.name} has no module {side.module}. Was it loaded another way?")
        for name, change in self.changes.items():
            shape = (len(change.rows), len(change.columns)) if isinstance(change, LowRank) else tuple(change.shape)
            if name not in parameters or tuple(parameters[name].shape) != shape:
                raise EditError(f"{lm.name} has no parameter {name} of shape {shape}. Was it loaded another way?")

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What is told of each edit that is in this one, in order: `what`, its facts' ids, its seconds, and what was measured.

        Of what was measured the plain values; curves stay in the manifest of the single edit.
        """
        if "parts" in self.run:
            return list(self.run["parts"])
        told = {name: self.run.get(name) for name in ("what", "seconds")}
        told["facts"] = [fact.id for fact in self.facts]
        measured = [
            {name: value for name, value in one.items() if isinstance(value, (str, int, float))}
            for one in self.run.get("edited", ())
        ]
        return [{**told, "edited": measured} if measured else told]

    def __add__(self, other: Edit) -> Edit:
        """Both edits as one: changes are added up.

        Raises:
            EditError: they were made on different weights.
        """
        if self.base != other.base:
            raise EditError(f"Edits of different weights, {self.base} and {other.base}, cannot be added.")
        names = dict.fromkeys((*self.changes, *other.changes))
        both = {name: [edit.changes[name] for edit in (self, other) if name in edit.changes] for name in names}
        own = {self.key, *self.run.get("sum_of", ())}
        return Edit(
            base=self.base,
            after=tuple(key for key in dict.fromkeys((*self.after, *other.after)) if key not in own),
            changes={name: added(changes) for name, changes in both.items()},
            sides=(*self.sides, *other.sides),
            state=joined(self.state, other.state),
            facts=(*self.facts, *other.facts),
            run={
                **other.run,
                "label": self.label if self.label == other.label else f"{self.label} + {other.label}",
                "sum_of": sorted({*own, other.key, *other.run.get("sum_of", ())}),
                "parts": [*self.parts, *other.parts],
            },
        )

    def merge(self, lm: LM, folder: Path | str) -> Path:
        """Writes the edited model as a normal checkpoint, which `from_pretrained` loads; returns the folder.

        Raises:
            EditError: a part of the edit stands beside the weights, or the folder holds something already.
        """
        folder = Path(folder)
        if self.sides:
            kinds = ", ".join(sorted({type(side).__name__ for side in self.sides}))
            raise EditError(
                f"{kinds} stands beside the weights, so it cannot be merged into them. Save the edit instead."
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EditError(f"{str(folder)!r} is there already and not empty. Name a new folder.")
        self.check(lm)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary, self.on(lm):
            new = Path(temporary) / folder.name
            lm.model.save_pretrained(new)
            lm.tokenizer.save_pretrained(new)
            new.replace(folder)
        return folder

    def save(self, folder: Path | str) -> Path:
        """Writes `edit.safetensors` and `edit.json` into `folder`, both or none, and returns it."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        tensors, described = _taken_apart(self)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            new = Path(temporary) / folder.name
            new.mkdir()
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / "edit.safetensors"
            )
            text = {
                **described,
                "format": FORMAT,
                "facts": [record(fact) for fact in self.facts],
                "run": dict(self.run),
            }
            text["digest"] = _digest(self, text)
            (new / "edit.json").write_text(json.dumps(text, indent=1, ensure_ascii=False, default=str) + "\n")
            if folder.is_dir():
                folder.replace(Path(temporary) / "old")
            new.replace(folder)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Reads what `save` wrote. It is checked against a model when it is applied.

        Raises:
            EditError: the folder holds no complete edit, or not what was saved.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / "edit.json").read_text())
            tensors = load_file(folder / "edit.safetensors")
            if described["format"] != FORMAT:
                raise EditError(f"{str(folder)!r} was written in format {described['format']}, expected {FORMAT}.")
            known = discover("workbench.editors", Side) if described["sides"] else {}
            edit = cls(**_put_together(described, tensors, known))
            if described.pop("digest", None) not in (None, _digest(edit, described)):
                raise EditError(
                    f"{str(folder)!r} is not what was saved: edit.json or edit.safetensors was altered. Make the edit again."
                )
            return edit
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if isinstance(error, EditError):
                raise
            raise EditError(
                f"{str(folder)!r} holds no complete edit ({type(error).__name__}), expected edit.json and edit.safetensors."
            ) from error


def edits_on(lm: LM) -> tuple[Edit, ...]:
    """The edits that are on the model now, in the order in which they were applied."""
    applied = _applied.get(lm.model)
    return tuple(applied.edits) if applied else ()


def base_of(lm: LM) -> str:
    """The hash of the model's weights without the edits that are on it."""
    applied = _applied.get(lm.model)
    return applied.base if applied else lm.weight_hash


@contextmanager
def unedited(lm: LM) -> Iterator[None]:
    """Within, the model is what it is without the edits that are on it now."""
    applied = _applied.get(lm.model)
    if applied is None:
        yield
        return
    with editing(lm.model), nothing_beside(), unintroduced():
        names = {name: change for edit in applied.edits for name, change in edit.changes.items()}
        edits, applied.edits = applied.edits, []
        hashed, lm._hashed = lm._hashed, applied.hashed
        try:
            _renew(lm, applied, names)
            yield
        finally:
            applied.edits = edits
            _renew(lm, applied, names)
            lm._hashed = hashed


def joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of two edits as one: rows below each other."""
    names = dict.fromkeys((*first, *second))
    return {name: torch.cat([part[name] for part in (first, second) if name in part]) for name in names}


# --- weights ---


@dataclass(eq=False)
class _Applied:
    """What is done to one model now."""

    base: str
    """The hash of its own weights."""

    hashed: Any
    """What the `LM` noted with it."""

    edits: list[Edit] = field(default_factory=list)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    """The model's own parameters that are put aside, by name."""


_applied: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()


def _renew(lm: LM, applied: _Applied, names: Mapping[str, Change]) -> None:
    """Puts the parameters of these names as the applied edits want them; the model's own where none does."""
    for name in names:
        changes = [edit.changes[name] for edit in applied.edits if name in edit.changes]
        now = lm.model.get_parameter(name)
        own = applied.own.setdefault(name, now)
        if changes:
            wanted = nn.Parameter(changed(own, changes), requires_grad=own.requires_grad)
        else:
            wanted = applied.own.pop(name)
        for module in lm.model.modules():  # a tied parameter stands in several
            for attribute, parameter in module._parameters.items():
                if parameter is now:
                    module._parameters[attribute] = wanted


def changed(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """A weight with changes added, computed in float32 (float64 where it is) and cast once."""
    kept = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.detach().to(kept)
    for change in changes:
        delta = change.dense() if isinstance(change, LowRank) else change
        total = total + delta.to(total)
    return total.to(weight.dtype)


def added(changes: Sequence[Change]) -> Change:
    """Changes of one parameter as one; it stays a product as long as that is smaller."""
    if len(changes) == 1:
        return changes[0]
    products = [change for change in changes if isinstance(change, LowRank)]
    if len(products) == len(changes):
        n_rows, n_columns = len(products[0].rows), len(products[0].columns)
        if 2 * sum(change.rank for change in products) <= min(n_rows, n_columns):
            rows, columns = (
                torch.cat([getattr(one, part).to(products[0].rows) for one in products], 1)
                for part in ("rows", "columns")
            )
            return LowRank(rows=rows, columns=columns)
    dense = [change.dense() if isinstance(change, LowRank) else change for change in changes]
    return sum(dense[1:], dense[0])


def _bound(lm: LM, memory: Memory) -> Callable[[Tensor, Tensor, Tokens | None], Tensor]:
    module = lm.model.get_submodule(memory.module)
    return lambda x, y, tokens: memory(module, x, y, tokens)


# --- files ---


def _taken_apart(edit: Edit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An edit's tensors by name, and the rest as JSON data."""
    tensors: dict[str, Tensor] = {f"state/{name}": tensor for name, tensor in edit.state.items()}
    for name, change in edit.changes.items():
        if isinstance(change, LowRank):
            tensors |= {f"rows/{name}": change.rows, f"columns/{name}": change.columns}
        else:
            tensors[f"dense/{name}"] = change
    sides = []
    for index, side in enumerate(edit.sides):
        values = {f.name: getattr(side, f.name) for f in fields(side)}
        tensors |= {f"side{index}/{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        sides.append(
            {"class": type(side).__name__, **{name: v for name, v in values.items() if not isinstance(v, Tensor)}}
        )
    return tensors, {"base": edit.base, "after": list(edit.after), "sides": sides}


def _digest(edit: Edit, text: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of all that is written of an edit."""
    plain = json.loads(json.dumps(text, default=str))
    written = f"{edit.key} {json.dumps(plain, sort_keys=True)}"
    return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()


def _put_together(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], known: Mapping[str, type[Side]]
) -> dict[str, Any]:
    """The fields of an edit from its files."""
    of: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, rest = name.partition("/")
        of.setdefault(place, {})[rest] = tensor
    changes: dict[str, Change] = dict(of.get("dense", {}))
    for name, rows in of.get("rows", {}).items():
        changes[name] = LowRank(rows=rows, columns=of["columns"][name])
    sides = []
    for index, values in enumerate(described["sides"]):
        plain: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name != "class"
        }
        if values["class"] not in known:
            raise EditError(
                f"There is no side {values['class']!r} in this version. Known are {', '.join(known) or 'none'}."
            )
        sides.append(known[values["class"]](**plain, **of.get(f"side{index}", {})))
    return {
        "base": described["base"],
        "after": tuple(described["after"]),
        "changes": changes,
        "sides": tuple(sides),
        "state": of.get("state", {}),
        "facts": tuple(_fact(values) for values in described["facts"]),
        "run": described["run"],
    }


def _fact(values: Mapping[str, Any]) -> Fact:
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    for name in ("neighbors", "portability", "locality"):
        plain[name] = tuple(Probe(**probe) for probe in plain.get(name, ()))
    return Fact(**plain)
