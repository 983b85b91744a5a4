"""What the page on editing shows: edits in a list, what a model says with some of them, and where each of them is.

Everything is computed on a twin of the model that shares its memory, so that a model other people look at is never edited.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.forms import FormField, form_of, methods_of, read_option
from workbench.progress import track
from workbench.results import Footprint, record
from workbench.store import Store

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from workbench.editors.base import Editor
    from workbench.edits import Edit
    from workbench.models import LM

EDITORS = "workbench.editors"

WORDS = 24
"""Tokens of text that a model goes on with."""

MOST_CELLS = (64, 120)
"""Rows and columns of a matrix as it is drawn, at most."""

NEURONS = 8
"""Of how many columns the words are told."""

MEASURES = {
    "efficacy": "Efficacy",
    "paraphrase": "In other words",
    "neighborhood": "Other subjects",
    "other": "Other relations",
}
"""What is counted, and what it is called."""

FILES = ("edit.json", "edit.safetensors")
"""What an edit consists of on disk."""

LARGEST = 2**31
"""Bytes of an edit that is loaded."""


# -- the question ------------------------------------------------------------------------------------------------------


def editor_names() -> tuple[str, ...]:
    """Every editor, found without importing any."""
    return tuple(methods_of(EDITORS, "Editor"))


def editor_fields(name: str) -> tuple[FormField, ...]:
    """The hyperparameters of an editor, found without importing it."""
    return form_of(methods_of(EDITORS, "Editor")[name], name)


def editor_words(name: str) -> str:
    """The first paragraph of an editor's docstring, found without importing it."""
    found = importlib.util.find_spec(EDITORS)
    assert found is not None
    assert found.submodule_search_locations
    file = methods_of(EDITORS, "Editor")[name].rpartition(".")[2] + ".py"
    tree = ast.parse((Path(found.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


def read_options(fields: Sequence[FormField], typed: Mapping[str, str]) -> dict[str, Any]:
    """The options that were typed, as values.

    Args:
        fields: the editor's.
        typed: texts by field; an empty one means the editor's own value.

    Raises:
        InputError: a text spells no value of its field.
    """
    return {field.name: read_option(field, typed[field.name]) for field in fields if typed.get(field.name, "").strip()}


def starting_values(lm: LM, name: str) -> dict[str, Any]:
    """What an editor takes on this model where nothing is typed: the preset, else the paper's."""
    from workbench.editors import editor_named

    editor = editor_named(name).fitted(lm)
    return {field.name: getattr(editor, field.name) for field in editor_fields(name)}


@dataclass(frozen=True, kw_only=True)
class EditQuestion:
    """One fact with its new answer, one model, one editor, some options."""

    model: str
    """A bundled model, a folder or a hub name."""

    dtype: str = "float32"
    """Precision of the weights."""

    fact: Fact
    """What is edited, with `target_new`."""

    editor: str
    """Class name of the editor."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the editor that differ from what `Editor.fitted` takes without them."""

    below: tuple[str, ...] = ()
    """Keys of the edits on top of which it is made, in order."""

    @property
    def key(self) -> str:
        """Names this question."""
        parts = [self.model, self.dtype, record(self.fact), self.editor, dict(self.options), self.below]
        text = json.dumps(parts, sort_keys=True, default=str)
        return f"edit-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    @property
    def title(self) -> str:
        """In a few words."""
        return f"{self.editor}: {self.fact.subject} → {self.fact.target_new}"


def checked(lm: LM, question: EditQuestion) -> Editor:
    """The editor, if the question can be put to this model; a look before any long work.

    Raises:
        InputError: no new answer, one that the model gives already, an option of a wrong value, or layers that are not there.
    """
    from workbench.editors import editor_named

    fact, target = question.fact, (question.fact.target_new or "").strip()
    if not target:
        raise FactError(f"The new answer is empty. Say what the model shall answer to {fact.text!r}.")
    if target == fact.target_true.strip():
        raise FactError(f"The new answer {target!r} is the old one. Name another answer.")
    editor = editor_named(question.editor).fitted(lm, **question.options)
    layers = question.options.get("layers")
    if layers is not None and (
        not layers or len(set(layers)) < len(layers) or not all(0 <= layer < lm.n_layers for layer in layers)
    ):
        raise FactError(
            f"layers is {', '.join(map(str, layers))}, expected different ones of 0 to {lm.n_layers - 1} of {lm.name}."
        )
    lm.target_ids(fact.text, target)
    if not question.below:
        _refuse_known(lm, fact)
    return editor


def _refuse_known(lm: LM, fact: Fact) -> None:
    from analyses.edit_quality import says

    if says(lm, [fact.text], fact.target_new) == 1:
        raise FactError(f"The model says {fact.target_new!r} after {fact.text!r} already. Name another answer.")


# -- the work, for a worker --------------------------------------------------------------------------------------------


def make_edit(lm: LM, question: EditQuestion, below: Sequence[Edit], store: Store) -> Edit:
    """The edit, on top of others; one of the model itself is looked for in the store.

    Raises:
        InputError: it cannot be made.
        Cancelled: it was stopped.
    """
    from analyses.editing import edit_one

    editor = checked(lm, question)
    if not below:
        return edit_one(_twin(lm), editor, question.fact, store=store)
    with ExitStack() as stack:
        twin = _put_on(lm, below, stack)
        _refuse_known(twin, question.fact)
        return editor(twin, [question.fact])


def is_stored(lm: LM, question: EditQuestion, store: Store) -> bool:
    """Whether the edit of a question to the model itself was made before, so that it takes no time."""
    from workbench.editors import editor_named
    from workbench.results import manifest, question_key

    editor = editor_named(question.editor).fitted(lm, **question.options)
    asked = manifest(question.editor, model=lm.protocol, parameters=editor, facts=[question.fact])
    return not question.below and (store.folder / "edits" / question_key(asked)).is_dir()


def export_model(lm: LM, edits: Sequence[Edit], folder: Path) -> Path:
    """Writes the model with these edits as a checkpoint.

    Raises:
        EditError: they cannot be merged, or the folder is there already.
    """
    return added_up(edits).merge(_twin(lm), folder)


def added_up(edits: Sequence[Edit]) -> Edit:
    """Several edits as one."""
    first, *rest = edits
    for one in rest:
        first = first + one
    return first


@dataclass(frozen=True, kw_only=True)
class Saying:
    """What a model says after a prompt."""

    top: tuple[tuple[str, float], ...]
    """Next tokens and their probabilities, the most probable first."""

    text: str
    """The most probable continuation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A fact with the model and with the edited one."""

    before: Saying
    """The model itself."""

    after: Saying
    """With the edits."""

    counts: pd.DataFrame
    """One row a measure of `MEASURES` that has prompts: `measure`, `before` and `after` (of how many prompts it is true), `n`."""

    prompts: pd.DataFrame
    """One row a prompt: `about`, `prompt`, `wanted`, `before`, `after` (the next token)."""


def view(lm: LM, edits: Sequence[Edit], fact: Fact) -> View:
    """What the model says about a fact without and with edits; where there is none, both are the model itself.

    Raises:
        EditError: the edits do not belong to this model.
    """
    before = _measured(lm, fact, "the model itself")
    if not edits:
        return View(before=before[0], after=before[0], counts=pd.DataFrame(), prompts=pd.DataFrame())
    with ExitStack() as stack:
        after = _measured(_put_on(lm, edits, stack), fact, "the edited model")
    asked = _asked_about(fact)
    prompts = pd.DataFrame(asked, columns=["about", "prompt", "wanted"]).assign(before=before[1], after=after[1])
    other = prompts["about"] == "other relation"
    kept = float((prompts["before"] == prompts["after"])[other].mean()) if other.any() else float("nan")
    sizes = {"efficacy": 1, "paraphrase": len(fact.paraphrases), "neighborhood": len(_other_answers(fact))}
    rows = [
        (name, round(before[2][name] * n), round(after[2][name] * n), n)
        for name, n in sizes.items()
        if n and after[2][name] == after[2][name]
    ]
    if other.any():
        rows.append(("other", int(other.sum()), round(kept * int(other.sum())), int(other.sum())))
    counts = pd.DataFrame(rows, columns=["measure", "before", "after", "n"])
    return View(before=before[0], after=after[0], counts=counts, prompts=prompts)


def _asked_about(fact: Fact) -> list[tuple[str, str, str]]:
    """All prompts about an edit: what each is about, the prompt, and the answer it should get."""
    new = fact.target_new or ""
    return [
        ("the fact", fact.text, new),
        *(("in other words", prompt, new) for prompt in fact.paraphrases),
        *(("another subject", probe.prompt, probe.target) for probe in fact.neighbors),
        *(("other relation", probe.prompt, probe.target) for probe in fact.locality),
    ]


def _other_answers(fact: Fact) -> list[tuple[str, str]]:
    """Neighbors whose own answer is not the new one: prompt and answer."""
    return [(probe.prompt, probe.target) for probe in fact.neighbors if probe.target != fact.target_new]


def _measured(lm: LM, fact: Fact, what: str) -> tuple[Saying, list[str], dict[str, float]]:
    """What a model says to the prompt, its next token after every prompt, and the measures between two answers."""
    from analyses.answers import log_p
    from analyses.edit_quality import wins
    from workbench.generation import continue_prompts
    from workbench.hooks import run
    from workbench.metrics import top_tokens

    steps = iter(track(("predictions", "prompts", "measures", "text"), what, 4))
    next(steps)
    logits = run(lm, lm.encode([fact.text])).last_logits[0].float()
    top = tuple(top_tokens(lm, logits, 8))
    next(steps)
    asked = run(lm, lm.encode([prompt for _, prompt, _ in _asked_about(fact)])).last_logits
    said = [lm.word(int(token)).strip() or repr(lm.word(int(token))) for token in asked.argmax(-1)]
    next(steps)
    new, old = fact.target_new, fact.target_true
    measures = {
        "efficacy": wins(lm, [fact.text], new, old),
        "paraphrase": wins(lm, fact.paraphrases, new, old),
        "neighborhood": float("nan"),
    }
    if new and (others := _other_answers(fact)):
        prompts, answers = [prompt for prompt, _ in others], [answer for _, answer in others]
        own = log_p(lm, [*prompts, *prompts], [*answers, *[new] * len(prompts)])
        measures["neighborhood"] = float((own[: len(prompts)] > own[len(prompts) :]).float().mean())
    next(steps)
    text = continue_prompts(lm, [fact.text], n=WORDS)[0]
    for _ in steps:
        pass
    return Saying(top=top, text=text), said, measures


def _twin(lm: LM) -> LM:
    """The model once more on the same memory."""
    from workbench.editors._gradients import shadow

    twin = shadow(lm)
    _ = lm.weight_hash
    twin._hashed = lm._hashed  # the same weights; where they were not, they would be hashed again
    return twin


def _put_on(lm: LM, edits: Sequence[Edit], stack: ExitStack) -> LM:
    """A twin with these edits on it until the stack is left."""
    twin = _twin(lm)
    for edit in edits:
        stack.enter_context(edit.on(twin))
    return twin


# -- where an edit is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where an edit is."""

    weights: Footprint | None
    """Which matrices it changes; None where it changes none of a block."""

    moved: Footprint
    """How far it moves activations on the prompts of its facts."""

    modules: tuple[str, ...]
    """Paths of all matrices of a block."""

    hooks: tuple[tuple[int, str], ...]
    """Layer and module of what stands beside the weights."""

    beside: tuple[str, ...]
    """What that is, in a sentence each."""

    introduction: str
    """What is put before the first fact's prompt; empty: nothing."""


def place_of(lm: LM, edit: Edit, below: Sequence[Edit]) -> Place:
    """Where an edit is, measured on top of the edits that it was made on.

    Raises:
        EditError: it does not belong to this model.
    """
    from workbench.edit_footprints import functional_footprint, weight_footprint
    from workbench.edits import EditError, Introducing, Memory

    steps = iter(track(("weights", "activations"), "footprints", 2))
    with ExitStack() as stack:
        twin = _put_on(lm, below, stack)
        edit.check(twin)
        next(steps)
        weights = None
        with suppress(EditError):  # it changes no weights of a block
            weights = weight_footprint(twin, edit)
        next(steps)
        moved = functional_footprint(twin, edit)
        for _ in steps:
            pass
    hooks, beside, introduction = [], [], ""
    for side in edit.sides:
        if isinstance(side, Memory):
            found = re.fullmatch(rf"{re.escape(lm.layout.blocks)}\.(\d+)\.(.+)", side.module)
            if found:
                hooks.append((int(found[1]), found[2]))
            where = f"{found[2]} of layer {found[1]}" if found else side.module
            beside.append(f"{type(side).__name__} beside {where}: it may give another output there.")
        elif isinstance(side, Introducing):
            introduction = side(edit.facts[0].text)
            beside.append(f"{type(side).__name__} before prompts: the weights stay as they are.")
    return Place(
        weights=weights,
        moved=moved,
        modules=_matrices(lm),
        hooks=tuple(hooks),
        beside=tuple(beside),
        introduction=introduction,
    )


def _matrices(lm: LM) -> tuple[str, ...]:
    found = [name.rpartition(".")[0] for name, part in lm.blocks[0].named_parameters() if part.ndim == 2]
    return tuple(dict.fromkeys(found))


def weight_map(place: Place) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Relative change |dW| / |W| by module (rows) and layer (columns), 0 where there is none; and what is said of each cell."""
    n_layers = int(place.moved.table["layer"].max()) + 1
    table = pd.DataFrame() if place.weights is None else place.weights.extras["matrices"]
    rows = list(dict.fromkeys([*place.modules, *table.get("module", [])]))
    values = pd.DataFrame(0.0, index=rows, columns=range(n_layers))
    notes = pd.DataFrame("unchanged", index=rows, columns=range(n_layers))
    if len(table):
        for _, part in table.groupby(["module", "layer"]):
            module, layer = str(part["module"].iloc[0]), int(part["layer"].iloc[0])
            relative = float(np.sqrt((part["norm"] ** 2).sum() / (part["base_norm"] ** 2).sum()))
            strongest = part.sort_values("norm").iloc[-1]
            values.loc[module, layer] = relative
            notes.loc[module, layer] = (
                f"|ΔW| / |W| = {relative:.3g}\nrank {strongest['rank']}, cosine of W and W + ΔW {strongest['cosine']:.4f}"
            )
    for layer, module in place.hooks:
        if module in notes.index:
            notes.loc[module, layer] = "a memory stands beside it\nthe weights are unchanged"
    return values, notes


def changed_cells(place: Place) -> list[tuple[int, str]]:
    """Layer and module of every matrix that is changed, the most changed one first."""
    values = weight_map(place)[0].T.stack()
    order = values[values > 0].sort_values(ascending=False, kind="stable")
    return [(int(layer), str(module)) for layer, module in order.index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """The change of one matrix, (out, in)."""

    parameter: str
    """Its name in the model."""

    cells: Float[np.ndarray, "row column"]
    """The mean |dW| of blocks of rows and columns."""

    rows: Float[np.ndarray, " row"]
    """The norm of the change in each block of rows."""

    columns: Float[np.ndarray, " column"]
    """The norm of the change in each block of columns."""

    shape: tuple[int, int]
    """Of the matrix itself."""

    told: Mapping[str, Any]
    """Its row of the weight footprint."""

    neurons: pd.DataFrame
    """The most changed columns, where they are value vectors: `neuron`, `share` (of |dW|^2), `relative` (of its norm), and in words
    what it promoted `before` and `after`, and what is `added`."""


def matrix_of(lm: LM, edit: Edit, place: Place, *, layer: int, module: str) -> Matrix | None:
    """The change of a matrix itself, made small enough to be looked at; None where the edit does not change it."""
    import torch
    from torch import nn

    from workbench.edits import LowRank

    if place.weights is None:
        return None
    table = place.weights.extras["matrices"]
    table = table[(table["layer"] == layer) & (table["module"] == module)].sort_values("norm", ascending=False)
    found = [row for row in table.to_dict("records") if _dimensions(edit.changes[row["parameter"]]) == 2]
    if not found:
        return None
    told = found[0]
    change = edit.changes[told["parameter"]]
    delta = (change.dense() if isinstance(change, LowRank) else change).detach().float().cpu()
    weight = lm.model.get_parameter(told["parameter"]).detach()
    if not isinstance(lm.part(layer, module), nn.Linear):
        delta, weight = delta.T, weight.T
    sizes = [
        -(-length // min(length, most)) for length, most in zip(delta.shape, MOST_CELLS, strict=True)
    ]  # of a block
    padded = [-length % size for length, size in zip(delta.shape, sizes, strict=True)]
    whole = torch.nn.functional.pad(delta, (0, padded[1], 0, padded[0]))
    blocks = whole.reshape(whole.shape[0] // sizes[0], sizes[0], whole.shape[1] // sizes[1], sizes[1])
    neurons = pd.DataFrame()
    if module == lm.layout.down_proj:
        neurons = _in_words(lm, layer, weight, delta)
    return Matrix(
        parameter=told["parameter"],
        cells=blocks.abs().mean((1, 3)).numpy(),
        rows=blocks.square().sum((1, 2, 3)).sqrt().numpy(),
        columns=blocks.square().sum((0, 1, 3)).sqrt().numpy(),
        shape=(int(delta.shape[0]), int(delta.shape[1])),
        told=told,
        neurons=neurons,
    )


def _dimensions(change: Any) -> int:
    return 2 if not hasattr(change, "ndim") else int(change.ndim)


def _in_words(
    lm: LM, layer: int, weight: Float[Tensor, "d_model d_mlp"], delta: Float[Tensor, "d_model d_mlp"]
) -> pd.DataFrame:
    """The most changed value vectors before and after, and what is added to them, by the tokens that they promote."""
    import torch

    from workbench.vocabulary import project, readable, words

    squares = delta.square().sum(0)
    top = squares.argsort(descending=True)[:NEURONS]
    top = top[squares[top] > 0]
    old = weight[:, top.to(weight.device)].T.float().cpu()
    new = delta[:, top].T
    vectors = readable(lm, layer, torch.cat([old, old + new, new]).to(lm.device), projection="normed")
    best = project(lm, vectors).topk(3, dim=1).indices.cpu()
    texts = [words(lm, row.tolist()) for row in best]
    n = len(top)
    table: pd.DataFrame = pd.DataFrame({
        "neuron": top.tolist(), "share": (squares[top] / squares.sum()).tolist(),
        "relative": (new.norm(dim=1) / old.norm(dim=1).clamp(min=1e-12)).tolist(),
        "before": texts[:n], "after": texts[n : 2 * n], "added": texts[2 * n :],
    })  # fmt: skip
    return table


def moved_neighbors(place: Place, *, fact: str, kind: str) -> pd.DataFrame:
    """How far the last token moves by layer: on the fact's own prompt (the first row) and on each neighbor's prompt."""
    table = place.moved.table
    own = table[(table["fact"] == fact) & (table["kind"] == kind)]
    own = own[own["position"] == own["position"].max()].set_index("layer")["value"]
    rows = {"the fact itself": own}
    others = place.moved.extras.get("neighbors", pd.DataFrame(columns=["fact", "kind", "prompt"]))
    for prompt, part in others[(others["fact"] == fact) & (others["kind"] == kind)].groupby("prompt", sort=False):
        rows[str(prompt)] = part.set_index("layer")["value"]
    found: pd.DataFrame = pd.DataFrame(rows).T
    return found


def lens_moved(place: Place, *, fact: str) -> pd.DataFrame:
    """KL between what the lens reads of each state before and after, in nats: position (rows) by layer."""
    lens = place.moved.extras["lens"]
    grid: pd.DataFrame = lens[lens["fact"] == fact].pivot(index="position", columns="layer", values="kl")
    return grid


# -- a list of edits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """An edit in a list."""

    edit: Edit
    """The edit."""

    key: str
    """Its key, which takes a while to compute."""

    title: str
    """What it is called."""

    applied: bool = True
    """Whether it is wanted on the model."""

    @classmethod
    def of(cls, edit: Edit, *, applied: bool = True) -> Kept:
        """An edit with its key, and a title of its editor and facts."""
        about = ", ".join(f"{fact.subject} → {fact.target_new}" for fact in edit.facts[:2])
        more = f" and {len(edit.facts) - 2} more" if len(edit.facts) > 2 else ""
        what = str(edit.run.get("what", "Edit"))
        return cls(edit=edit, key=edit.key, title=f"{what}: {about}{more}", applied=applied)


List = tuple[Kept, ...]


def with_edit(kept: List, edit: Edit) -> List:
    """The list with an edit at its end, applied; one that is in it already is applied where it is."""
    new = Kept.of(edit)
    if any(one.key == new.key for one in kept):
        return with_applied(kept, new.key, True)
    return (*kept, new)


def with_applied(kept: List, key: str, applied: bool) -> List:
    """The list with one edit applied, or not."""
    return tuple(replace(one, applied=applied) if one.key == key else one for one in kept)


def without(kept: List, key: str) -> List:
    """The list without an edit."""
    return tuple(one for one in kept if one.key != key)


def stacked(kept: List, weights: str) -> tuple[List, List]:
    """The edits that are on a model, in order; and those that wait, since one that they were made on is not applied."""
    on: list[Kept] = []
    waiting: list[Kept] = []
    for one in kept:
        if one.applied and one.edit.base == weights:
            there = {other.key for other in on}
            (on if set(one.edit.after) <= there else waiting).append(one)
    return tuple(on), tuple(waiting)


def made_on(kept: List, one: Kept) -> tuple[Edit, ...] | None:
    """The edits of a list on top of which one was made, in order; None where one of them is not in the list."""
    below = [other for other in kept if other.key in one.edit.after]
    return tuple(other.edit for other in below) if len(below) == len(one.edit.after) else None


# -- files -------------------------------------------------------------------------------------------------------------


def zip_of(edit: Edit) -> bytes:
    """An edit as a zip file of its safetensors and JSON."""
    data = io.BytesIO()
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = edit.save(Path(temporary) / "edit")
        for name in FILES:
            archive.write(folder / name, name)
    return data.getvalue()


def unzipped(data: bytes) -> Edit:
    """The inverse of `zip_of`.

    Raises:
        EditError: the file is no zip of an edit.
    """
    from workbench.edits import Edit, EditError

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "the zip file"
            folder.mkdir()
            entries = {Path(entry.filename).name: entry for entry in archive.infolist()}
            for name in FILES:
                if name not in entries:
                    raise EditError(f"The zip file holds no {name}. Choose one that was downloaded here.")
                if entries[name].file_size > LARGEST:
                    raise EditError(f"{name} in the zip file is larger than 2 GiB. Load the edit from its folder.")
                (folder / name).write_bytes(archive.read(entries[name]))
            return Edit.load(folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise EditError("The file is no zip file. Choose one that was downloaded here.") from error


def load_edit(lm: LM, source: bytes | Path) -> Edit:
    """An edit of this model, from a zip file or a folder. Those that it was made on may be missing.

    Raises:
        EditError: there is no complete edit, or it belongs to another model.
    """
    from workbench.edits import Edit

    edit = unzipped(source) if isinstance(source, bytes) else Edit.load(source)
    replace(edit, after=()).check(lm)
    if not edit.facts:
        raise FactError(
            "This edit tells of no facts, so there is nothing to ask the model. Load one that was made here."
        )
    return edit


def named_folder(base: Path, name: str) -> Path:
    """A new folder of a name in a folder.

    Raises:
        InputError: the name is none for a folder, or is taken.
    """
    name = name.strip()
    if not re.fullmatch(r"\w[\w .+-]{0,79}", name):
        raise InputError(f"{name!r} is no name for a folder. Use letters, digits, dots, dashes and spaces.")
    if (base / name).exists():
        raise InputError(f"There is a folder {str(base / name)!r} already. Take another name.")
    return base / name


def file_stem(kept: Kept) -> str:
    """A name for the files of an edit: of letters, digits and dashes."""
    return re.sub(r"[^\w]+", "-", kept.title).strip("-").lower()[:60]
