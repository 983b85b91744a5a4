"""Facts edited one by one by several editors: where the questions about editing methods start from.

An edit is kept in the store's folder `edits/`, under the question that it answers, so that all analyses share it and a run that was
stopped goes on.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from workbench.editors import editor_named
from workbench.editors.base import Editor
from workbench.edits import Edit, EditError
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.models import LM
from workbench.progress import track
from workbench.results import manifest, question_key
from workbench.store import Store


def fitted_editors(lm: LM | None, names: Sequence[str]) -> dict[str, Editor]:
    """Editors as they are written, e.g. `Rome` or `FineTune(stop_below=0.0)`, with the preset of the model for the rest.

    Raises:
        FactError: no editor has such a name, or it has no such option.
    """
    return {name: _fitted(lm, name) for name in names}


def _fitted(lm: LM | None, name: str) -> Editor:
    try:
        written = ast.parse(name.strip(), mode="eval").body
        options: dict[str, Any] = {}
        if isinstance(written, ast.Call) and not written.args:
            options = {one.arg or "": ast.literal_eval(one.value) for one in written.keywords}
            written = written.func
    except (SyntaxError, ValueError) as error:
        raise FactError(f"{name!r} is no editor. Write e.g. Rome, or FineTune(stop_below=0.0).") from error
    return editor_named(ast.unparse(written)).fitted(lm, **options)


def edit_one(lm: LM, editor: Editor, fact: Fact, *, store: Store | None = None) -> Edit:
    """The edit of one fact, from the store where it is there.

    Raises:
        InputError: the fact cannot be edited by this editor on this model.
    """
    if store is None:
        return editor(lm, [fact])
    asked = manifest(type(editor).__name__, model=lm.protocol, parameters=editor, facts=[fact])
    folder = store.folder / "edits" / question_key(asked)
    if folder.is_dir():
        try:
            edit = Edit.load(folder)
            edit.check(lm)
        except EditError:
            pass  # damaged: made anew
        else:
            return edit
    edit = editor(lm, [fact])
    edit.save(folder)
    return edit


def edit_each(
    lm: LM,
    editors: Mapping[str, Editor],
    facts: Sequence[Fact],
    *,
    left_out: MutableMapping[str, str],
    store: Store | None = None,
) -> Iterator[tuple[str, Fact, Edit]]:
    """Every fact edited alone by every editor, editor by editor: label, fact and edit.

    Args:
        lm: the model.
        editors: by label.
        facts: with `target_new`.
        left_out: here goes why a fact could not be edited, by `label: id`.
        store: where edits are kept.
    """
    pairs = [(label, editor, fact) for label, editor in editors.items() for fact in facts]
    for label, editor, fact in track(pairs, "edits", len(pairs)):
        try:
            edit = edit_one(lm, editor, fact, store=store)
        except InputError as error:
            left_out[f"{label}: {fact.id}"] = str(error)
        else:
            yield label, fact, edit
